"""The four figures of an analysis as files: layer profile, variance, reconstruction and downstream by layer.

`write_figures` draws each with matplotlib as PNG (200 dpi) and SVG (text stays text), to fill half a page of a paper;
the same results give the same bytes. Without matplotlib (`pip install residscope[plots]`) nothing is written.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from analysis.report.charts import AFTER_BLOCK, layer_ticks, log_ticks
from analysis.report.data import PARTS, WEIGHTINGS, Results
from analysis.report.markup import EN_DASH, between, percent, show
from analysis.report.sections.downstream import COSTS, X_NAME, downstream_title, recovered_lines
from analysis.report.sections.layers import SHARE_TICKS, heat_map, layer_profile_title
from analysis.report.sections.reconstruction import fvu_lines, reconstruction_title
from analysis.report.sections.variance import variance_shares, variance_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072b2", "#e69f00"
"""From the palette of Okabe and Ito, safe for colour-blind readers; line styles differ as well."""

COLOURS = {"within_token": BLUE, "between_tokens": ORANGE, "between_latents": "#b8bec6"}
"""The two parts of the aggregate in colour, the rest in grey."""

INK, FAINT, GRID, REFERENCE = "#1d2530", "#6b7480", "#e3e6ea", "#b5378a"
CURVES = {"ours": (BLUE, "-"), "ours dotted": (BLUE, ":"), "other dashed": (ORANGE, "--"), "base dashed": (FAINT, "--")}
"""Colour and dashes for the report.css classes of the sections' lines."""

STYLE: dict[str, Any] = (
    {"font.family": "sans-serif", "font.size": 9.5}
    | {"axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 8}
    | dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK)
    | dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), FAINT)
    | {"axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False}
    | {"legend.frameon": True, "legend.framealpha": 1, "legend.edgecolor": "none"}
    | {"svg.fonttype": "none", "svg.hashsalt": "residscope"}
    | {"savefig.dpi": 200, "savefig.bbox": "tight", "savefig.pad_inches": 0.08}
)


def write_figures(results: Results, out_dir: Path) -> list[Path]:
    """Write layer_profile, variance, reconstruction and downstream (.png and .svg) into `out_dir`.

    Returns the paths: none without matplotlib, no layer_profile where no latent fired, no downstream without the model.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        return []
    with rc_context(cast("Any", STYLE)):
        figures = {"layer_profile": _layer_profile(results), "variance": _variance(results)}
        figures |= {"reconstruction": _reconstruction(results), "downstream": _downstream(results)}
        return [path for name, figure in figures.items() if figure for path in save_figure(figure, out_dir, name)]


def save_figure(figure: "Figure", out_dir: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG without dates or versions; returns the paths."""
    paths = [out_dir / f"{name}.png", out_dir / f"{name}.svg"]
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):
        figure.savefig(path, metadata=metadata)
    return paths


def new_figure(width: float, height: float) -> "Figure":
    """A figure without pyplot: no window system, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _layer_profile(results: Results) -> "Figure | None":
    """P(layer | latent): a column per bin of latents, sorted by mean layer, and a row per layer."""
    from matplotlib.colors import PowerNorm

    heat = heat_map(results)
    if heat.n_latents == 0:
        return None
    figure = new_figure(6.4, 3.4)
    axes = figure.add_subplot()
    norm, extent = PowerNorm(0.5, vmin=0, vmax=heat.top), (0, heat.n_latents, -0.5, len(results.layer_numbers) - 0.5)
    style: dict[str, Any] = {"aspect": "auto", "origin": "lower", "interpolation": "none", "cmap": "viridis"}
    image = axes.imshow(heat.share, norm=norm, extent=extent, **style)
    axes.spines[:].set_visible(False)
    axes.set_title(layer_profile_title(results))
    each = f"; each column the mean of {show(heat.per_bin, 2)}" if heat.per_bin > 1 else ""
    axes.set_xlabel(f"live latents, sorted by mean layer{each}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel(AFTER_BLOCK)
    axes.yaxis.set_ticks(*zip(*layer_ticks(results.layer_numbers), strict=True))
    bar = figure.colorbar(image, pad=0.015, aspect=24, extend="max", extendfrac=0.03)
    bar.set_ticks([tick for tick in SHARE_TICKS if tick <= heat.top], minor=False)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    bar.set_label("share of the latent's activation\nmass, P(layer | latent)")
    return figure


def _variance(results: Results) -> "Figure":
    """Left: shares of the total under three weightings. Right: aggregate over token-level, ours and the reference's."""
    figure = new_figure(6.8, 3.2)
    shares, ratios = figure.subplots(1, 2, width_ratios=[1.25, 1])
    figure.suptitle(fill(variance_title(results), 70), x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    _share_axes(shares, results)
    if shares.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", ncols=3, handlelength=1, columnspacing=1.2)
    _ratio_axes(ratios, results)
    return figure


def _share_axes(axes: Any, results: Results) -> None:
    """A stacked bar for each weighting and, for the reference, a note on why there is none."""
    for row, weighting in enumerate(WEIGHTINGS):
        shares = variance_shares(results, weighting)
        for part, bar in stacked_bar(axes, row, shares).items():
            if shares[part] > 0.09:
                ink = "white" if part == "within_token" else INK
                axes.bar_label(bar, [percent(shares[part])], label_type="center", color=ink)
    last = len(WEIGHTINGS)
    note = "silent tokens count as mass 0\nat layer 0: not variances" if results.reference_ratio else EN_DASH
    axes.text(0, last, note, va="center", color=FAINT, fontsize=8.5)
    axes.set(xlim=(0, 1), ylim=(last + 0.5, -0.5), xlabel="share of the variance of the layer")
    axes.set_ylabel("weighted by")
    names = [words.replace(" (", "\n(") for words in WEIGHTINGS.values()]
    axes.set_yticks(range(last + 1), [*names, "reference's\nformula"])
    axes.set_xticks([0, 0.5, 1], ["0", percent(0.5), percent(1)])
    no_left_axis(axes)


def _ratio_axes(axes: Any, results: Results) -> None:
    """Aggregate over token-level variance on a logarithmic axis: a row per weighting, and the reference's below."""
    reference, last = results.reference_ratio, len(WEIGHTINGS)
    keys = [("variance", weighting, "aggregate_over_token") for weighting in WEIGHTINGS]
    ratios = [results.number(*key) for key in keys]
    axes.axvline(1, color=FAINT, linewidth=0.8)
    for row, (key, ratio) in enumerate(zip(keys, ratios, strict=True)):
        bounds = results.bounds(*key)
        words = show(ratio) + (f"  ({percent(0.95)}: {between(bounds)})" if bounds else "")
        ratio_row(axes, row, ratio, bounds, words, ha="left")
    reference_mark(axes, last, reference, 7)
    axes.set_yticks([])
    axes.set_ylim(last + 0.5, -0.5)
    end = 4 * max([1.0, *(ratio for ratio in (*ratios, reference) if ratio is not None)])
    log_axis(axes, 0.9, end, "aggregate / token-level variance")
    no_left_axis(axes)


def stacked_bar(axes: Any, row: int, values: Mapping[str, float]) -> dict[str, Any]:
    """The parts of a variance end to end; returns the bars by part. The legend names those of row 0."""
    bars, left = {}, 0.0
    for part, value in values.items():
        label = PARTS[part] if row == 0 else None
        style = {"height": 0.6, "edgecolor": "white", "linewidth": 0.8, "label": label}
        bars[part] = axes.barh(row, value, left=left, color=COLOURS[part], **style)
        left += value
    return bars


def ratio_row(
    axes: Any, row: int, ratio: float | None, bounds: Any, words: str, legend: str | None = None, ha: str = "center"
) -> None:
    """A ratio with its interval (low, high) or None, and `words` above it."""
    if ratio is None:
        axes.text(1.1, row, "not defined", va="center", color=FAINT)
        return
    axes.plot(bounds or (ratio, ratio), [row, row], "|-", color=BLUE, linewidth=1.4, markersize=9, label=legend)
    axes.plot(ratio, row, "o", color=BLUE, markersize=4.5)
    number_beside(axes, words, ratio, row, 7, ha=ha)


def reference_mark(axes: Any, row: int, ratio: float | None, up: float, legend: str | None = None) -> None:
    """The ratio by the reference's formula, if there is one, with its number `up` points above."""
    if ratio is not None:
        style = {"color": REFERENCE, "markersize": 5.5, "markerfacecolor": "white", "markeredgewidth": 1.5}
        axes.plot(ratio, row, "D", label=legend, **style)
        number_beside(axes, show(ratio), ratio, row, up, color=REFERENCE)


def number_beside(axes: Any, words: str, x: float, y: float, up: float, ha: str = "center", color: str = INK) -> None:
    """A number `up` points above its mark."""
    axes.annotate(words, (x, y), (0, up), textcoords="offset points", ha=ha, fontsize=8.5, color=color)


def log_axis(axes: Any, start: float, end: float, label: str) -> None:
    """Make the x axis logarithmic, with at most five round numbers."""
    axes.set(xscale="log", xlim=(start, end), xlabel=label)
    axes.set_xticks(log_ticks(end, 5), minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def no_left_axis(axes: Any) -> None:
    """Hide the line and ticks on the left, which named rows do not need."""
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _reconstruction(results: Results) -> "Figure":
    """FVU by layer with the baseline, and L0 below."""
    upper = "FVU (lower is better)", _with_bounds(results, fvu_lines(results))
    lower = "L0 (latents\nper vector)", [(results.layers["l0"], "", "ours")]
    return _over_layers(results, reconstruction_title(results), AFTER_BLOCK, upper, lower)


def _downstream(results: Results) -> "Figure | None":
    """Delta CE and KL by layer, and loss recovered below; None where it was not measured."""
    if not results.get("downstream"):
        return None
    upper = "nats per token\n(lower is better)", _with_bounds(results, COSTS)
    lower = "loss recovered\n(higher is better)", recovered_lines(results)
    return _over_layers(results, downstream_title(results), X_NAME, upper, lower)


def _with_bounds(results: Results, lines: Sequence[tuple[str, str, str]]) -> list[Any]:
    """Columns of layers.parquet as lines for `_over_layers`, with the bounds that the file has for them."""
    ends, columns = ("low", "high"), results.layers
    return [
        (columns[name], words, kind, *(columns[f"{name}_{end}"] for end in ends if f"{name}_{end}" in columns))
        for name, words, kind in lines
    ]


def _over_layers(results: Results, title: str, x_name: str, *panels: tuple[str, Sequence[Any]]) -> "Figure":
    """Two plots, one above the other, that share the axis of layers.

    panels: label of the y axis, and lines: values [L], legend, class of report.css and, where known, the bounds [L] of
    their 95 % intervals.
    """
    figure = new_figure(6.4, 4.2)
    upper, lower = plots = figure.subplots(2, 1, sharex=True, height_ratios=[1.9, 1])
    for axes, (label, lines) in zip(plots, panels, strict=True):
        for values, words, kind, *bounds in lines:
            colour, dash = CURVES[kind]
            if np.isfinite(values).any():
                axes.plot(values, dash, color=colour, label=words, linewidth=1.8, marker="o", markersize=2.5)
            if bounds and np.isfinite(bounds).all():
                style: dict[str, Any] = {"alpha": 0.2, "linewidth": 0, "label": "95 % interval"}
                axes.fill_between(np.arange(len(values)), *bounds, color=colour, **style)
        lowest, highest = axes.dataLim.intervaly  # inf and -inf where nothing is drawn
        axes.set_ylim(min(0.0, 1.1 * lowest), 1.4 * highest if highest > 0 else 1.0)  # with room for the legend
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", ncols=2, fontsize=8.5, handlelength=2.2, borderaxespad=0.1)
        axes.set_ylabel(label)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
    upper.set_title(fill(title, 70))
    lower.set_xlabel(x_name)
    lower.xaxis.set_ticks(*zip(*layer_ticks(results.layer_numbers), strict=True))
    return figure
