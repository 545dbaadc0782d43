"""Reports of finished runs: text or a table for the terminal, plain values for `--json`, a parquet table."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residscope.console import aligned, counted, human_seconds
from residscope.errors import UsageError
from residscope.reading import reading
from train.grid import RunSpec, as_written
from train.metrics import finite
from train.objective.recipes import best_lr
from train.reporting.convergence import FVU_SETTLED, LEAST_STEPS, SETTLED, in_words, last_quarter
from train.resolve import RunPlan
from train.validation import FEW_DOCUMENTS, Validation

_SETTLED = {True: "yes", False: "no", None: "-"}
_HIGH = 10
"""Times the default: with a learning rate above this, the rate is more likely too high than the run too short."""

_LOW, _SMALL_BATCH = 0.5, 128
"""Multiple of the default learning rate below which it is called too low, and above whose inverse too high for latents
to stay alive; and the batch size below which no smaller one is proposed."""

_MANY_DEAD = 0.1
"""Share of dead latents above which the report gives advice."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    plan: RunPlan
    metrics: dict[str, Any]
    """The last line of training metrics, as logged or from the checkpoint."""
    validation: Validation | None
    """On held-out documents; None if none were held out."""
    curve: list[dict[str, Any]]
    """Held-out numbers over the run's steps (`train.reporting.convergence`)."""
    seconds: float
    """Time of this invocation, from the start to the last checkpoint."""

    @property
    def spec(self) -> RunSpec:
        return self.plan.spec

    @property
    def checkpoint(self) -> Path:
        """The file that holds the autoencoder."""
        return self.plan.config.out

    @property
    def diverged(self) -> bool:
        """Whether the last loss or the validation is not finite."""
        return not math.isfinite((self.metrics["loss"] or 0) + (self.validation.fvu if self.validation else 0))

    @property
    def worst_layer(self) -> int | None:
        """Position of the layer with the highest held-out FVU."""
        fvu = [] if self.validation is None else self.validation.fvu_per_layer
        return max(range(len(fvu)), key=fvu.__getitem__, default=None)


def summary(result: TrainResult) -> dict[str, Any]:
    """A run as plain values, for JSON."""
    return finite(
        {
            "checkpoint": str(result.checkpoint),
            "seconds": result.seconds,
            **({"name": result.spec.name} if result.spec.name else {}),
            "plan": result.plan.to_dict(),
            "training": {key: value for key, value in result.metrics.items() if key != "fvu_per_layer"},
            "validation": None if result.validation is None else result.validation.metrics(),
            "convergence": last_quarter(result.curve),
        }
    )


def describe(result: TrainResult) -> str:
    """A run in words."""
    plan, metrics, held_out = result.plan, result.metrics, result.validation
    limit = f"k {plan.model.active}, " if plan.model.active else ""
    lines = [
        f"{result.checkpoint}: {plan.model.n_latents:,} latents, {limit}after "
        f"{counted(metrics['step'], 'step')} ({metrics['vectors']:,} vectors of {len(plan.layers)} layers) in "
        f"{human_seconds(result.seconds)}",
        f"training: FVU {_number(metrics['fvu'], '.3f')}, L0 {_number(metrics['l0'], '.1f')}, "
        f"{metrics['dead_fraction']:.1%} of latents dead",
    ]
    if held_out is None or (worst := result.worst_layer) is None:
        lines.append("validation: none, as fewer than two tokens were held out")
    elif math.isinf(held_out.fvu):
        lines.append(f"validation on {held_out.tokens:,} tokens of held-out documents: no FVU, their vectors are equal")
    else:
        of, hint = "held-out documents", ""
        if held_out.documents is not None:
            of = counted(held_out.documents, "held-out document")
            way_out = "raise --validation-fraction, or harvest more documents"
            hint = f" (too few to be reliable: {way_out})" * (held_out.documents < FEW_DOCUMENTS)
        lines.append(
            f"validation on {held_out.tokens:,} tokens of {of}{hint}: FVU {held_out.fvu:.3f} (lower is "
            "better, 1 is no better than the layer's mean; mean over layers; "
            f"worst {held_out.fvu_per_layer[worst]:.3f} at layer {plan.layers[worst]}), L0 {held_out.l0:.1f}"
        )
    if effect := metrics.get("design_effect"):
        lines.append(f"each batch came from one part of the store: design effect {effect:.3g} (1: as from all of it)")
    return "\n".join([*lines, *_advice(result)])


def _advice(result: TrainResult) -> list[str]:
    """Advice: what looks badly chosen and what to try, one line each."""
    plan, metrics, held_out = result.plan, result.metrics, result.validation
    lines = [words] if (words := in_words(last_quarter(result.curve))) else []
    lr, share = plan.chosen.lr, len(plan.layers) / len(plan.stream_layers or plan.layers)
    times = lr / best_lr(plan.model.n_latents, plan.chosen.batch_size * share, plan.vectors * share)
    poor = held_out is not None and 1 < held_out.fvu < math.inf
    if poor and times > _HIGH:
        lines.append(f"an FVU above 1, at {times:.2g} times the default rate: lower --lr {lr:.2g}")
    elif poor:
        ways = [f"train longer ({'--epochs, or a larger store' if plan.config.data.steps is None else '--steps'})"]
        if plan.chosen.batch_size > _SMALL_BATCH:
            ways.append(f"with smaller batches than --batch-size {plan.chosen.batch_size}")
        if times < _LOW:
            ways.append(f"with a higher --lr than {lr:.2g}, which is {times:.2g} times the default rate")
        lines.append(
            f"an FVU above 1 after {counted(plan.steps, 'step')} mostly means too few steps: {', or '.join(ways)}"
        )
    if metrics["dead_fraction"] > _MANY_DEAD:
        lower = f"lower --lr {lr:.2g}, " * (times > 1 / _LOW)
        lines.append(
            f"{metrics['dead_fraction']:.0%} of the latents are dead: train longer, {lower}or ask for "
            f"fewer latents than --n-latents {plan.model.n_latents}"
        )
    if held_out is not None and metrics["fvu"] is not None and plan.epochs > 1 and held_out.fvu > 2 * metrics["fvu"]:
        lines.append(
            f"held-out FVU is {held_out.fvu / metrics['fvu']:.1f} times that of training: harvest more text rather "
            f"than train on the same for {plan.epochs} epochs"
        )
    return lines


def table_of(results: Sequence[TrainResult]) -> str:
    """One line per run: its settings, its size, and its quality on held-out documents."""
    swept = list(results[0].spec.settings)
    per_layer = results[0].spec.layer is not None
    head = [*swept, *(["layer"] if per_layer else []), "latents", "FVU", "worst FVU", "at layer", "L0", "dead"]
    lines = [[*head, "settled", "checkpoint"]]
    for result in results:
        lines.append(
            [
                *map(as_written, result.spec.settings.values()),
                *([str(result.spec.layer)] if per_layer else []),
                str(result.plan.model.n_latents),
                *_held_out_cells(result),
                _number(result.metrics["dead_fraction"], ".1%"),
                _SETTLED[(last_quarter(result.curve) or {}).get("settled")],
                result.checkpoint.name,
            ]
        )
    tokens = max(result.validation.tokens if result.validation else 0 for result in results)
    title = (
        f"{len(results)} runs in {human_seconds(results[0].seconds)}; FVU (lower is better) and L0 on {tokens:,} "
        "tokens of held-out documents, mean over layers; dead: share of the latents; settled: over the last quarter, "
        f"of {LEAST_STEPS} steps or more, the ratio of variances moved by less than {SETTLED:.0%} and FVU by less than "
        f"{FVU_SETTLED:.0%}"
    )
    return "\n".join([title, *aligned(lines)])


def _held_out_cells(result: TrainResult) -> list[str]:
    found, worst = result.validation, result.worst_layer
    if found is None or worst is None:
        return ["-"] * 4
    return [f"{found.fvu:.3f}", f"{found.fvu_per_layer[worst]:.3f}", str(result.plan.layers[worst]), f"{found.l0:.1f}"]


def table_path(out: Path, first: Path) -> Path:
    """Where the table of the runs of --out `out` goes; first: a run's checkpoint. `UsageError` over another file."""
    stem = out.stem if out.suffix == ".pt" and first.parent == out.parent else "ckpt"
    path = first.with_name(f"{stem}.runs.parquet")
    if os.path.lexists(path):
        import pyarrow.parquet as pq

        with reading(f"{path}: no table of runs", "remove it, or choose another --out", kind=UsageError):
            if "checkpoint" not in pq.read_schema(path).names:
                raise ValueError("it has no column checkpoint")
    return path


def write_table(out: Path, results: Sequence[TrainResult]) -> Path:
    """Write a parquet file beside the checkpoints, one row for each run and layer; returns its path.

    Rows of earlier sweeps with this --out stay as long as their checkpoints exist."""
    import pandas as pd

    from store.files import atomic_write

    rows = []
    for result in results:
        plan, found = result.plan, result.validation
        for position, layer in enumerate(plan.layers):
            rows.append(
                {
                    "run": result.spec.name,
                    **result.spec.settings,
                    "checkpoint": result.checkpoint.name,
                    "n_latents": plan.model.n_latents,
                    "active_at_most": plan.model.active or None,
                    "layer": layer,
                    "fvu": found and found.fvu_per_layer[position],
                    "l0": found and found.l0_per_layer[position],
                    "fvu_mean": found and found.fvu,
                    "dead_fraction": result.metrics["dead_fraction"],
                    "validation_tokens": found and found.tokens,
                    "vectors": result.metrics["vectors"],
                }
            )
    path, table = table_path(out, results[0].checkpoint), pd.DataFrame(rows)
    if path.exists():
        old, ours = pd.read_parquet(path), {result.checkpoint.name for result in results}
        others = old[[name not in ours and path.with_name(name).exists() for name in old["checkpoint"]]]
        table = pd.concat([others, table]) if len(others) else table
    table["active_at_most"] = table["active_at_most"].astype("Int64")
    atomic_write(path, [table.to_parquet(index=False)])
    return path


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
