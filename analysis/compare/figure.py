"""The figure of `analyze --compare`, one row for each run: the decomposition over that of an evenly drawn layer, the
ratio of aggregate to token-level variance beside the reference's number, FVU, and delta cross-entropy where it was
measured, with 95 % intervals.

Drawn with matplotlib in the style of `analysis.report.figures`, as PNG and SVG. Not here: the numbers
(`analysis.compare.measure`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from matplotlib import rc_context

from analysis.compare.words import kind_words, layer_words
from analysis.report.data import PARTS, show
from analysis.report.figures import COLOURS, FAINT, INK, REFERENCE, STYLE, new_figure

RULE = "#d9dde2"


def write_comparison(runs: Sequence[Mapping[str, Any]], out: Path) -> list[str]:
    """Write compare.png and compare.svg into `out`; returns their names."""
    measured = any(run["delta_ce"] is not None for run in runs)
    with rc_context(cast("Any", STYLE)):
        figure = new_figure(12.6 if measured else 10.4, 1.9 + 0.52 * len(runs))
        axes = figure.subplots(
            1, 4 if measured else 3, sharey=True, width_ratios=[1.5, 1.1, 0.85, 0.95][: 3 + measured]
        )
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
        figure.suptitle(
            "How widely latents spread over layers, and how well they reconstruct them",
            x=0.01,
            ha="left",
            fontweight="bold",
            fontsize=10.5,
        )
        figure.legend(loc="outside lower left", ncols=6, handlelength=1, columnspacing=1.2, fontsize=8.5)
        names = []
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            names.append(f"compare{suffix}")
            figure.savefig(out / names[-1], metadata=metadata)
    return names


def _label(run: Mapping[str, Any]) -> str:
    """A run's name, and below it what it is."""
    what = kind_words(run).rpartition("/")[2]
    number = layer_words(run["layers"]) + (" layers" if len(run["layers"]) > 1 else "")
    return f"{run['run']}\n{what}; {number}, R {run['expansion_factor']:g}, k {run['k']}"


def _draw_means(axes: Any, runs: Sequence[Mapping[str, Any]], name: str, label: str) -> None:
    """A mean over layers and its interval, from 0 on."""
    highest, lowest = 0.0, 0.0
    for row, run in enumerate(runs):
        value, low, high = (run[f"{name}{end}"] for end in ("", "_low", "_high"))
        if value is None:
            axes.text(0.02, row, "not measured", va="center", color=FAINT, transform=axes.get_yaxis_transform())
            continue
        if low is not None:
            axes.plot([low, high], [row, row], "|-", color=INK, linewidth=1, markersize=7)
        axes.plot(value, row, "o", color=INK, markersize=4)
        axes.annotate(show(value), (value, row), (0, 6), textcoords="offset points", ha="center", fontsize=8.5)
        highest, lowest = max(highest, value, high or 0), min(lowest, value, low or 0)
    axes.set(xlim=(1.15 * lowest, 1.15 * highest or 1), xlabel=label)
    axes.locator_params(axis="x", nbins=4)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.axvline(0, color=FAINT, linewidth=0.8)


def _draw_parts(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """Stacked bars by mass; the whisker is the interval of the total."""
    for row, run in enumerate(runs):
        parts, left = run["normalised"]["mass"], 0.0
        for part, colour in COLOURS.items():
            value = parts[part]
            if value is None:
                break
            label = PARTS[part] if row == 0 else None
            axes.barh(row, value, left=left, color=colour, height=0.6, edgecolor="white", linewidth=0.8, label=label)
            left += value
        if parts["total"] is None:
            axes.text(0.02, row, "one layer", va="center", color=FAINT)
        if parts["ci95"].get("total"):
            axes.plot(parts["ci95"]["total"], [row, row], "|-", color=INK, linewidth=1, markersize=6)
    axes.set_yticks(range(len(runs)), [_label(run) for run in runs], fontsize=8)
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.axvline(1, color=FAINT, linewidth=0.8)
    parts = [run["normalised"]["mass"] for run in runs]
    ends = [(part["ci95"].get("total") or (0, part["total"] or 0))[1] for part in parts]
    axes.set_xlim(0, 1.05 * max([1.0, *ends]))
    axes.set_xlabel("variance of the layer, by mass, over that of\nan evenly drawn layer, (layers² - 1) / 12")


def _draw_ratios(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """Aggregate over token-level variance by mass, and the reference's number, on a logarithmic axis."""
    for row, run in enumerate(runs):
        ratio, reference = run["variance"]["mass"]["aggregate_over_token"], run["reference_ratio"]
        if ratio is None:
            axes.text(1.1, row, "not defined", va="center", color=FAINT)
        else:
            bounds = run["variance"]["mass"]["ci95"].get("aggregate_over_token") or (ratio, ratio)
            label = "our ratio, 95 % interval" if row == 0 else None
            axes.plot(bounds, [row, row], "|-", color=COLOURS["within_token"], markersize=9, label=label)
            axes.plot(ratio, row, "o", color=COLOURS["within_token"], markersize=4.5)
            axes.annotate(show(ratio), (ratio, row), (0, 6), textcoords="offset points", ha="center", fontsize=8.5)
        if reference is not None:
            label = "the reference's formula on the same codes" if row == 0 else None
            axes.plot(reference, row, "D", color=REFERENCE, markersize=5, markerfacecolor="white", label=label)
            axes.annotate(
                show(reference),
                (reference, row),
                (0, -14),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=REFERENCE,
            )
    axes.axvline(1, color=FAINT, linewidth=0.8)
    shown = [run["variance"]["mass"]["aggregate_over_token"] for run in runs] + [run["reference_ratio"] for run in runs]
    end = 1.5 * max([1.4, *(value for value in shown if value is not None)])
    axes.set(xscale="log", xlim=(0.93, end), xlabel="aggregate over token-level\nvariance, by mass (log scale)")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= end]
    axes.set_xticks(ticks, minor=False)
    axes.set_xticks([], minor=True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
