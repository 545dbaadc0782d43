"""The course of a run as a figure, ckpt.loss.png beside the checkpoint: FVU and loss, L0 and dead latents.

Drawn from the metrics file only, so that any run can be drawn again.
"""

import io
import math
from pathlib import Path
from typing import Any

from residscope.escape import figure_text
from store.files import atomic_write
from train.metrics import read_metrics
from train.validation import INTERIM_TOKENS


def write_loss_figure(metrics: Path, path: Path, title: str) -> None:
    """Draw the lines of a metrics file; does nothing if matplotlib is not installed or there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:  # not installed, or broken
        return
    lines = read_metrics(metrics)
    there = [line for line in lines if line.get("fvu") is not None]  # None if no vector came or the run diverged
    training = [line for line in there if "split" not in line and line.get("loss") is not None]
    validation = [line for line in there if line.get("split") == "validation"]
    if not training:
        return

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    x = _column(training, "vectors", 1e-6)
    above.plot(x, _column(training, "fvu"), label="FVU, training", color="tab:blue")
    above.plot(x, _column(training, "loss"), label="loss, training", color="tab:gray", linewidth=0.9)
    for tokens in sorted({line.get("validation_tokens", 0) for line in validation}):  # the last has more
        of_size = [line for line in validation if line.get("validation_tokens", 0) == tokens]
        at, held_out = _column(of_size, "vectors", 1e-6), _column(of_size, "fvu")
        style: dict[str, Any] = {"color": "tab:orange", "fillstyle": "full" if tokens > INTERIM_TOKENS else "none"}
        above.plot(at, held_out, "o", label=f"FVU, {tokens:,} held-out tokens", **style)
    above.set(yscale="log", ylabel="share of variance, lower is better")
    above.set_title(figure_text(title), fontsize=10)
    above.grid(alpha=0.3, which="both")
    above.legend(fontsize=8)

    below.plot(x, _column(training, "dead_fraction", 100), color="tab:red")
    below.set(xlabel="vectors trained on, millions", ylabel="dead latents, %", ylim=(0, None))
    below.grid(alpha=0.3)
    active = below.twinx()
    active.plot(x, _column(training, "l0"), color="tab:green")
    active.set(ylabel="L0, active latents a vector", ylim=(0, None))
    below.yaxis.label.set_color("tab:red")
    active.yaxis.label.set_color("tab:green")

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    atomic_write(path, [data.getvalue()])


def _column(lines: list[dict[str, Any]], name: str, scale: float = 1) -> list[float]:
    return [math.nan if line.get(name) is None else line[name] * scale for line in lines]
