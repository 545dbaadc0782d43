"""The figure of downstream quality by layer, as PNG and SVG. See `analysis.report.figures`."""

from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from analysis.report.charts import layer_ticks
from analysis.report.data import Results
from analysis.report.downstream import DRAWN_FROM, downstream_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072b2", "#e69f00"
"""Okabe and Ito's: told apart by colour-blind readers; line styles differ as well."""


def draw_downstream(results: Results, figure: "Figure") -> "Figure | None":
    """Delta CE and KL by layer, and loss recovered below, on one layer axis; None where it was not measured."""
    if not results.get("downstream"):
        return None
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
    layer = np.arange(len(results.layer_numbers))
    for axes, lines in ((upper, _COSTS), (lower, _RECOVERED)):
        for name, label, colour, dash in lines:
            values = results.layers[name]
            if axes is lower:
                values = np.maximum(values, DRAWN_FROM)
            axes.plot(layer, values, dash, color=colour, linewidth=1.8, label=label, marker="o", markersize=2.5)
            low, high = (results.layers[f"{name}_{end}"] for end in ("low", "high"))
            if axes is upper and np.isfinite(low).all():
                axes.fill_between(layer, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.grid(axis="y", color="#e3e6ea", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(loc="best", fontsize=8.5, handlelength=2.2)
    upper.set_title(fill(downstream_title(results), 70))
    bands = "bands: 95 % intervals; " if results.bounds("downstream", "kl") else ""
    upper.set_ylabel(f"nats per token\n({bands}lower is better)")
    upper.set_ylim(bottom=min(0.0, upper.get_ylim()[0]))
    lower.set_ylim(min(0.0, float(np.nanmin([line.get_ydata() for line in lower.lines], initial=0)) - 0.05), 1.05)
    lower.set_ylabel("loss recovered\n(higher is better)")
    lower.set_xlabel("layer replaced (after block)")
    ticks, labels = zip(*layer_ticks(results.layer_numbers), strict=True)
    lower.set_xticks(ticks, labels)
    return figure


_COSTS = (("delta_ce", "delta CE", BLUE, "-"), ("kl", "KL(true || reconstructed)", ORANGE, "--"))
_RECOVERED = (
    ("loss_recovered_mean", "against mean ablation", BLUE, "-"),
    ("loss_recovered_zero", "against zero ablation", ORANGE, "--"),
)
