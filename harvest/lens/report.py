"""What `residscope fit-lens` prints: a table by layer, or one JSON line. Computes nothing."""

import json
import sys
from typing import Any

from harvest.lens.fit import FitResult
from harvest.lens.measure import TOLERANCE
from residscope.console import human_seconds

_HEADINGS = ("layer", "translator", "logit lens", "ridge", "KL-trained", "R2", "condition", "round trip")


def print_fit(result: FitResult, *, as_json: bool) -> None:
    """Print a result on stdout, and on stderr a line for each layer that needs one."""
    for note in warnings(result):
        print(note, file=sys.stderr)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    print(
        f"{result.out}: {result.saved} translators of {result.model} ({result.architecture}), fitted on"
        f" {result.fit_tokens:,} tokens of {result.fit_documents} documents"
        + (
            f", trained on {result.kl_tokens:,} in {result.kl_steps} steps from {result.init}"
            if result.kl_tokens
            else ""
        )
    )
    print(
        f"KL to the model's final logits, nats per token (lower is better), on {result.held_out_tokens:,} tokens of"
        f" {result.held_out_documents} held-out documents:"
    )
    rows = [_HEADINGS, *(_row(layer) for layer in result.layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    times = ", ".join(f"{name} {human_seconds(seconds)}" for name, seconds in result.seconds.items())
    print(f"R2: of last output minus layer's, higher is better; round trip: worst error of inverse(apply(x)). {times}")


def warnings(result: FitResult) -> list[str]:
    """A line for each layer whose map cannot be undone to `TOLERANCE`, or is no better than none at all."""
    found = []
    for layer in result.layers:
        if layer.round_trip is not None and not layer.round_trip <= TOLERANCE:
            found.append(
                f"warning: layer {layer.layer} is ill-conditioned ({layer.condition:.3g}): inverse(apply(x)) is off by"
                f" {layer.round_trip:.2g} of x's norm, more than {TOLERANCE:.0e}; a lower --max-condition helps"
            )
        best = layer.kl_trained if layer.kl_trained is not None else layer.kl_ridge
        if best is not None and not best < layer.kl_logit_lens:
            found.append(
                f"warning: at layer {layer.layer} the lens ({best:.4g} nats per token) is no better than none"
                f" ({layer.kl_logit_lens:.4g}): fit on more tokens"
            )
    return found


def _row(layer: Any) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        "embedding" if layer.layer is None else str(layer.layer),
        "-" if layer.translator is None else str(layer.translator),
        shown(layer.kl_logit_lens, ".4f"),
        shown(layer.kl_ridge, ".4f"),
        shown(layer.kl_trained, ".4f"),
        shown(layer.r2, ".3f"),
        shown(layer.condition, ".3g"),
        shown(layer.round_trip, ".1e"),
    )
