"""The figure of `analyze --compare`: the decomposition of each run over that of an evenly drawn layer, and the ratio of
aggregate to token-level variance with its 95 % interval, on one row axis.

Drawn with matplotlib in the style of `analysis.figures`, as PNG and SVG. Not here: the numbers (`analysis.compare`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from matplotlib import rc_context

from analysis.figures import COLOURS, FAINT, INK, REFERENCE, STYLE, new_figure
from analysis.report_data import PARTS, show


def write_comparison(runs: Sequence[Mapping[str, Any]], out: Path) -> list[str]:
    """Write compare.png and compare.svg into `out`; returns their names."""
    with rc_context(cast("Any", STYLE)):
        figure = new_figure(8.2, 1.7 + 0.42 * len(runs))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.4, 1])
        _draw_parts(left, runs)
        _draw_ratios(right, runs)
        figure.suptitle("How widely latents spread over layers", x=0.01, ha="left", fontweight="bold", fontsize=10.5)
        figure.legend(loc="outside lower left", ncols=5, handlelength=1, columnspacing=1.2, fontsize=8.5)
        names = []
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            names.append(f"compare{suffix}")
            figure.savefig(out / names[-1], metadata=metadata)
    return names


def _draw_parts(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """Stacked bars by mass; the whisker is the interval of the total."""
    for row, run in enumerate(runs):
        parts, left = run["normalised"]["mass"], 0.0
        for part, colour in COLOURS.items():
            value = parts[part]
            if value is None:
                continue
            label = PARTS[part] if row == 0 else None
            axes.barh(row, value, left=left, color=colour, height=0.6, edgecolor="white", linewidth=0.8, label=label)
            left += value
        if parts["ci95"].get("total"):
            axes.plot(parts["ci95"]["total"], [row, row], "|-", color=INK, linewidth=1, markersize=6)
    axes.set_yticks(range(len(runs)), [run["run"] for run in runs])
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.axvline(1, color=FAINT, linewidth=0.8)
    axes.set_xlim(0, 1.05 * max([1.0, *(run["normalised"]["mass"]["total"] or 0 for run in runs)]))
    axes.set_xlabel("variance of the layer, by mass, over that of\nan evenly drawn layer, (layers² - 1) / 12")


def _draw_ratios(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """Aggregate over token-level variance by mass, and the reference's number, on a logarithmic axis."""
    for row, run in enumerate(runs):
        ratio, reference = run["variance"]["mass"]["aggregate_over_token"], run["reference_ratio"]
        if ratio is None:
            axes.text(1.1, row, "not defined", va="center", color=FAINT)
        else:
            bounds = run["variance"]["mass"]["ci95"].get("aggregate_over_token") or (ratio, ratio)
            label = "95 % interval, ours" if row == 0 else None
            axes.plot(bounds, [row, row], "|-", color=COLOURS["within_token"], markersize=9, label=label)
            axes.plot(ratio, row, "o", color=COLOURS["within_token"], markersize=4.5)
            axes.annotate(show(ratio), (ratio, row), (0, 6), textcoords="offset points", ha="center", fontsize=8.5)
        if reference is not None:
            label = "the reference's formula" if row == 0 else None
            axes.plot(reference, row, "D", color=REFERENCE, markersize=5, markerfacecolor="white", label=label)
    axes.axvline(1, color=FAINT, linewidth=0.8)
    shown = [run["variance"]["mass"]["aggregate_over_token"] for run in runs] + [run["reference_ratio"] for run in runs]
    end = 1.5 * max([1.4, *(value for value in shown if value is not None)])
    axes.set(xscale="log", xlim=(0.93, end), xlabel="aggregate / token-level variance (log scale)")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= end]
    axes.set_xticks(ticks, minor=False)
    axes.set_xticks([], minor=True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
