"""The figure of `analyze --compare`, one row for each run: decomposition, ratio, FVU and delta cross-entropy.

All have 95 % intervals, in the style of `analysis.report.figures`. Tested in test_measure.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from analysis.compare.words import kind_words, layer_words
from analysis.report import figures
from analysis.report.data import PARTS
from analysis.report.markup import show
from residscope.escape import figure_text

RULE = "#d9dde2"
LEGEND = ("our ratio, 95 % interval", "the reference's formula on the same codes")


def write_comparison(runs: Sequence[Mapping[str, Any]], out: Path) -> list[str]:
    """Write compare.png and compare.svg into `out`; returns their names, none without matplotlib."""
    try:
        from matplotlib import rc_context
    except ImportError:
        return []
    measured = any(run["delta_ce"] is not None for run in runs)
    with rc_context(cast("Any", figures.STYLE)):
        figure = figures.new_figure(12.6 if measured else 10.4, 1.9 + 0.52 * len(runs))
        axes = figure.subplots(1, 3 + measured, sharey=True, width_ratios=[1.5, 1.1, 0.85, 0.95][: 3 + measured])
        _draw_parts(axes[0], runs)
        _draw_ratios(axes[1], runs)
        _draw_means(axes[2], runs, "fvu", "FVU, mean over layers\nlower is better")
        if measured:
            _draw_means(axes[3], runs, "delta_ce", "delta CE, mean over layers,\nnats per token; lower is better")
        cast("Any", figure.get_layout_engine()).set(wspace=0.06)
        for panel in axes:
            for row in range(1, len(runs)):
                if kind_words(runs[row]) != kind_words(runs[row - 1]):
                    panel.axhline(row - 0.5, color=RULE, linewidth=0.8, zorder=0)
        title = "How widely latents spread over layers, and how well they reconstruct them"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10.5)
        figure.legend(loc="outside lower left", ncols=6, handlelength=1, columnspacing=1.2, fontsize=8.5)
        return [path.name for path in figures.save_figure(figure, out, "compare")]


def _label(run: Mapping[str, Any]) -> str:
    """A run's name, and below it its model and settings."""
    what = kind_words(run).rpartition("/")[2]
    number = layer_words(run["layers"]) + (" layers" if len(run["layers"]) > 1 else "")
    kind = " ".join(filter(None, (run["activation"], run["k"] and f"k {run['k']}")))
    sizes = f"{number}, R {run['expansion_factor']:,.4g}, {kind}"
    return f"{figure_text(run['run'])}\n{figure_text(what)}; {sizes}"


def _draw_means(axes: Any, runs: Sequence[Mapping[str, Any]], name: str, label: str) -> None:
    """A mean over layers with its interval, on an axis that starts at 0."""
    highest, lowest = 0.0, 0.0
    for row, run in enumerate(runs):
        value, low, high = (run[f"{name}{end}"] for end in ("", "_low", "_high"))
        if value is None:
            axes.text(0.02, row, "not measured", va="center", color=figures.FAINT, transform=axes.get_yaxis_transform())
            continue
        if low is not None:
            axes.plot([low, high], [row, row], "|-", color=figures.INK, linewidth=1, markersize=7)
        axes.plot(value, row, "o", color=figures.INK, markersize=4)
        figures.number_beside(axes, show(value), value, row, 6)
        highest, lowest = max(highest, value, high or 0), min(lowest, value, low or 0)
    axes.set(xlim=(1.15 * lowest, 1.15 * highest or 1), xlabel=label)
    axes.locator_params(axis="x", nbins=4)
    figures.no_left_axis(axes)
    axes.axvline(0, color=figures.FAINT, linewidth=0.8)


def _draw_parts(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """Stacked bars by mass; the whisker is the interval for the total."""
    for row, run in enumerate(runs):
        parts = run["normalised"]["mass"]
        if parts["total"] is None:
            axes.text(0.02, row, "one layer", va="center", color=figures.FAINT)
        else:
            figures.stacked_bar(axes, row, {part: parts[part] for part in PARTS})
        if parts["ci95"].get("total"):
            axes.plot(parts["ci95"]["total"], [row, row], "|-", color=figures.INK, linewidth=1, markersize=6)
    axes.set_yticks(range(len(runs)), [_label(run) for run in runs], fontsize=8)
    axes.set_ylim(len(runs) - 0.4, -0.6)
    figures.no_left_axis(axes)
    axes.axvline(1, color=figures.FAINT, linewidth=0.8)
    parts = [run["normalised"]["mass"] for run in runs]
    ends = [(part["ci95"].get("total") or (0, part["total"] or 0))[1] for part in parts]
    axes.set_xlim(0, 1.05 * max([1.0, *ends]))
    axes.set_xlabel("variance of the layer index, by mass, over that of\na uniformly drawn layer")


def _draw_ratios(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """Aggregate over token-level variance by mass, and the reference's number, on a logarithmic axis."""
    for row, run in enumerate(runs):
        ours, theirs = LEGEND if row == 0 else (None, None)
        mass = run["variance"]["mass"]
        ratio = mass["aggregate_over_token"]
        figures.ratio_row(axes, row, ratio, mass["ci95"].get("aggregate_over_token"), show(ratio), ours)
        figures.reference_mark(axes, row, run["reference_ratio"], -14, theirs)
    axes.axvline(1, color=figures.FAINT, linewidth=0.8)
    shown = [run["variance"]["mass"]["aggregate_over_token"] for run in runs] + [run["reference_ratio"] for run in runs]
    end = 1.5 * max([1.4, *(value for value in shown if value is not None)])
    figures.log_axis(axes, 0.93, end, "aggregate over token-level\nvariance, by mass (log scale)")
    figures.no_left_axis(axes)
