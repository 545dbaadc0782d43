"""The quality of a fitted lens by layer, as written to fit.json and as printed. Tested in test_fit.py."""

import json
import sys
from dataclasses import asdict, dataclass

from harvest.lens.measure import TOLERANCE
from residscope.console import aligned, human_seconds

_COLUMNS = {
    "translator": ("translator", "d"),
    "logit lens": ("kl_logit_lens", ".4f"),
    "ridge": ("kl_ridge", ".4f"),
    "KL-trained": ("kl_trained", ".4f"),
    "R2": ("r2", ".3f"),
    "condition": ("condition", ".3g"),
    "round trip": ("round_trip", ".1e"),
}
"""Headings of the table after "layer": a field of `LayerFit`, and its format."""


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """How good the lens is at one layer. KL in nats per token on held-out documents; lower is better."""

    layer: int | None
    """Block whose output this is; None for the embedding, the input of block 0."""
    translator: int | None
    """Its translator; None for the last block, which has none."""
    kl_logit_lens: float
    """KL without a translator."""
    kl_ridge: float | None = None
    """KL with the ridge translator."""
    kl_trained: float | None = None
    """KL with the KL-trained translator; None if none was trained."""
    penalty: float | None = None
    """Ridge penalty, in units of the mean eigenvalue of the inputs' scatter matrix."""
    r2: float | None = None
    """Share of the variance of (last output - this) that ridge explained on the documents that chose the penalty."""
    condition: float | None = None
    """Condition number of I + W of the saved translator."""
    round_trip: float | None = None
    """Worst |inverse(apply(x)) - x| / |x| over held-out vectors."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    out: str
    """Folder of the lens."""
    model: str
    architecture: str
    saved: str
    """Which translators were saved: ridge, or KL-trained."""
    init: str | None
    """Where KL training began; None without it."""
    fit_tokens: int
    """Kept tokens used for the ridge fit."""
    fit_documents: int
    kl_tokens: int
    """Tokens that KL training saw, including repeats."""
    kl_steps: int
    held_out_tokens: int
    """Kept tokens used for measuring."""
    held_out_documents: int
    seconds: dict[str, float]
    """Seconds by phase."""
    layers: tuple[LayerFit, ...]
    """The embedding, then each block."""


def print_fit(result: FitResult, *, as_json: bool) -> None:
    """Print a result on stdout, and its warnings on stderr."""
    for note in warnings(result):
        print(note, file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    trained = f", trained on {result.kl_tokens:,} in {result.kl_steps} steps from {result.init}"
    print(
        f"{result.out}: {result.saved} translators of {result.model} ({result.architecture}), fitted on"
        f" {result.fit_tokens:,} tokens of {result.fit_documents} documents{trained if result.kl_tokens else ''}"
    )
    print(
        f"KL to the model's final logits, nats per token (lower is better), on {result.held_out_tokens:,} tokens of"
        f" {result.held_out_documents} held-out documents:"
    )
    print(*aligned([("layer", *_COLUMNS), *(_row(layer) for layer in result.layers)]), sep="\n")
    times = ", ".join(f"{name} {human_seconds(seconds)}" for name, seconds in result.seconds.items())
    print(f"R2: of last output minus layer's, higher is better; round trip: worst error of inverse(apply(x)). {times}")


def warnings(result: FitResult) -> list[str]:
    """A line for each layer whose map cannot be inverted to within `TOLERANCE`, or is no better than no map."""
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
                f"warning: at layer {layer.layer} the lens ({best:.4g} nats per token) is no better than using no"
                f" lens ({layer.kl_logit_lens:.4g}): fit on more tokens"
            )
    return found


def _row(layer: LayerFit) -> tuple[str, ...]:
    values = [(getattr(layer, name), form) for name, form in _COLUMNS.values()]
    shown = ["-" if value is None else format(value, form) for value, form in values]
    return ("embedding" if layer.layer is None else str(layer.layer), *shown)
