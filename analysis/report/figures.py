"""The three figures of an analysis as files: layer profile, variance decomposition, reconstruction by layer.

`write_figures` draws them with matplotlib, each as PNG (200 dpi) and SVG (text kept as text), the same bytes for the
same results. They stand on their own in a README or a paper: the title states the finding, axes and colour bars have
units, sizes are chosen for half a page. matplotlib is an extra (`pip install residscope[plots]`); without it nothing is
written. The report does not need these files: it draws the same three itself (`analysis.report.charts`).
"""

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from analysis.report.data import (
    EN_DASH,
    PARTS,
    WEIGHTINGS,
    Results,
    between,
    heat_map,
    integer,
    layer_profile_title,
    percent,
    reconstruction_title,
    show,
    variance_title,
)
from analysis.report.figures_downstream import draw_downstream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"within_token": "#0072b2", "between_tokens": "#e69f00", "between_latents": "#b8bec6"}
"""Okabe and Ito's blue and orange for the two parts of the aggregate, grey for the rest."""

SHARE_TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)

INK, FAINT, REFERENCE = "#1d2530", "#6b7480", "#b5378a"

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": True,
    "legend.framealpha": 1,
    "legend.edgecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "residscope",
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.08,
}


def write_figures(results: Results, out_dir: Path) -> list[Path]:
    """Write layer_profile, variance, reconstruction and downstream (.png and .svg) into `out_dir`.

    Returns the paths written: none where matplotlib is not installed, no layer_profile where no latent fired, no
    downstream where the model was not run.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        return []

    written: list[Path] = []
    with rc_context(cast("Any", STYLE)):
        for name, draw in (
            ("layer_profile", _layer_profile),
            ("variance", _variance),
            ("reconstruction", _reconstruction),
            ("downstream", _downstream),
        ):
            figure = draw(results)
            if figure is None:
                continue
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                path = out_dir / f"{name}{suffix}"
                figure.savefig(path, metadata=metadata)
                written.append(path)
    return written


def new_figure(width: float, height: float) -> "Figure":
    """A figure without pyplot: no window system, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _layer_profile(results: Results) -> "Figure | None":
    """P(layer | latent): a column per bin of latents in the order of their mean layer, a row per layer."""
    from matplotlib.colors import PowerNorm

    heat = heat_map(results)
    if heat.n_latents == 0:
        return None
    figure = new_figure(6.4, 3.4)
    axes = figure.add_subplot()
    n_layers = len(results.layer_numbers)
    image = axes.imshow(
        heat.share,
        aspect="auto",
        origin="lower",
        interpolation="none",
        cmap="viridis",
        norm=PowerNorm(0.5, vmin=0, vmax=heat.top),
        extent=(0, heat.n_latents, -0.5, n_layers - 0.5),
    )
    axes.spines[:].set_visible(False)
    axes.set_title(layer_profile_title(results))
    each = f"; a column: mean of {show(heat.per_bin, 2)}" if heat.per_bin > 1 else ""
    axes.set_xlabel(f"live latents, sorted by mean layer{each}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("layer (after block)")
    _layer_ticks(axes.yaxis, results.layer_numbers)
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
    rows = list(WEIGHTINGS)
    for row, weighting in enumerate(rows):
        total = results.number("variance", weighting, "total")
        left = 0.0
        for part, colour in COLOURS.items():
            value = results.number("variance", weighting, part)
            if not total or value is None:
                continue
            share = value / total
            label = PARTS[part] if row == 0 else None
            shares.barh(row, share, left=left, color=colour, height=0.6, edgecolor="white", linewidth=0.8, label=label)
            if share > 0.09:
                ink = "white" if part == "within_token" else INK
                shares.text(left + share / 2, row, percent(share), ha="center", va="center", color=ink)
            left += share
    note = "silent tokens count as mass 0\nat layer 0: not variances" if results.reference_ratio else EN_DASH
    shares.text(0, len(rows), note, va="center", color=FAINT, fontsize=8.5)
    shares.set(xlim=(0, 1), ylim=(len(rows) + 0.5, -0.5), xlabel="share of the variance of the layer")
    names = [f"{WEIGHTINGS[name].replace(' (', chr(10) + '(')}" for name in rows]
    shares.set_ylabel("weighted by")
    shares.set_yticks(range(len(rows) + 1), [*names, "reference's\nformula"])
    shares.set_xticks([0, 0.5, 1], ["0", percent(0.5), percent(1)])
    shares.tick_params(axis="y", length=0)
    shares.spines["left"].set_visible(False)
    if shares.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", ncols=3, handlelength=1, columnspacing=1.2)
    _ratio_axes(ratios, results, rows)
    return figure


def _ratio_axes(axes: Any, results: Results, rows: list[str]) -> None:
    """Aggregate over token-level variance on a logarithmic axis: a row per weighting, and the reference's below."""
    ratios = [results.number("variance", name, "aggregate_over_token") for name in rows]
    end = 4 * max([1.0, *(ratio for ratio in (*ratios, results.reference_ratio) if ratio is not None)])
    axes.axvline(1, color=FAINT, linewidth=0.8)
    for row, (name, ratio) in enumerate(zip(rows, ratios, strict=True)):
        if ratio is None:
            axes.text(1.1, row, "not defined", va="center", color=FAINT)
            continue
        bounds = results.interval(name, "aggregate_over_token")
        axes.plot(
            bounds or (ratio, ratio), [row, row], "|-", color=COLOURS["within_token"], linewidth=1.4, markersize=9
        )
        axes.plot(ratio, row, "o", color=COLOURS["within_token"], markersize=4.5)
        label = show(ratio) + (f"  ({percent(0.95)}: {between(bounds)})" if bounds else "")
        axes.annotate(label, (ratio, row), (0, 7), textcoords="offset points", ha="left", fontsize=8.5)
    if results.reference_ratio is not None:
        place = (results.reference_ratio, len(rows))
        axes.plot(*place, "D", color=REFERENCE, markersize=5.5, markerfacecolor="white", markeredgewidth=1.5)
        label = show(results.reference_ratio)
        axes.annotate(label, place, (0, 7), textcoords="offset points", ha="center", fontsize=8.5, color=REFERENCE)
    axes.set(xscale="log", xlim=(0.9, end), ylim=(len(rows) + 0.5, -0.5), xlabel="aggregate / token-level variance")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= end]
    axes.set_xticks(ticks[:: -(-len(ticks) // 5)], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _reconstruction(results: Results) -> "Figure":
    """FVU by layer with the baseline, and L0 below, on one layer axis."""
    figure = new_figure(6.4, 4.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    layer = np.arange(len(results.layer_numbers))
    lines = [("fvu", "SAE", COLOURS["within_token"], "-")]
    if results.get("split", "name") != "validation":
        lines.append(("validation_fvu", "SAE, held-out text", COLOURS["within_token"], ":"))
    lines.append(
        ("pca_fvu", f"PCA of {integer(results.get('baseline', 'pca', 'k'))} components, held-out text", FAINT, "--")
    )
    for name, label, colour, dash in lines:
        values = results.layers[name]
        if np.isfinite(values).any():
            upper.plot(layer, values, dash, color=colour, linewidth=1.8, label=label, marker="o", markersize=2.5)
    low, high = (results.layers.get(f"fvu_{end}") for end in ("low", "high"))
    if low is not None and high is not None and np.isfinite(low).all():
        label = "95 % interval"
        upper.fill_between(layer, low, high, color=COLOURS["within_token"], alpha=0.2, linewidth=0, label=label)
    upper.set_title(fill(reconstruction_title(results), 70))
    upper.set_ylabel("FVU (lower is better)")
    upper.set_ylim(0, 1.25 * max([0.1, *(float(np.nanmax(line.get_ydata())) for line in upper.lines)]))
    if upper.lines:
        upper.legend(loc="upper left", ncols=3, fontsize=8.5, handlelength=2.2, columnspacing=1.4, borderaxespad=0.1)
    lower.plot(layer, results.layers["l0"], color=COLOURS["within_token"], linewidth=1.8, marker="o", markersize=2.5)
    lower.set_ylim(0, 1.2 * max(1.0, float(np.nanmax(results.layers["l0"], initial=0))))
    lower.set_ylabel("L0 (latents\nper vector)")
    lower.set_xlabel("layer (after block)")
    _layer_ticks(lower.xaxis, results.layer_numbers)
    for axes in (upper, lower):
        axes.grid(axis="y", color="#e3e6ea", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure


def _downstream(results: Results) -> "Figure | None":
    return draw_downstream(results, new_figure(6.4, 4.4)) if results.get("downstream") else None


def _layer_ticks(axis: Any, layer_numbers: list[int]) -> None:
    """At most eight ticks, labelled with the model's own block indices."""
    ticks = list(range(0, len(layer_numbers), max(1, -(-len(layer_numbers) // 8))))
    axis.set_ticks(ticks, [str(layer_numbers[tick]) for tick in ticks])
