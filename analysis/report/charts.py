"""The figures of the report, drawn as HTML and SVG: no library, no script, no raster but the heat map's cells.

`Plot` is the one frame that all of them use: the data are an SVG that stretches to the width it is given, and every
label is HTML beside it, so that text keeps its size on a telephone and colours follow the reader's light or dark theme
(classes and variables of report.css). Nothing here reads files or decides what to say; `analysis.report.data` does.

All text is escaped here. Fractions are of the plot's width and height, from the left and from the bottom.
"""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

from analysis.report.data import (
    PARTS,
    WEIGHTINGS,
    HeatMap,
    Results,
    between,
    heat_map,
    integer,
    percent,
    show,
)

VIRIDIS = (
    *("440154", "48186a", "472d7b", "424086", "3b528b", "33638d", "2c728e", "26828e", "21918c"),
    *("1fa088", "28ae80", "3fbc73", "5ec962", "84d44b", "addc30", "d8e219", "fde725"),
)
"""Seventeen evenly spaced colours of viridis, which is even in lightness and safe for colour-blind readers."""

SHARE_TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)


class Plot:
    """A frame with axes: add lines, marks and labels in fractions of it, then render."""

    def __init__(self, label: str, height_rem: float) -> None:
        """`label` is what a screen reader says; the numbers themselves stand in a table of the report."""
        self._label, self._height = label, height_rem
        self._shapes: list[str] = []
        self._texts: list[str] = []

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through `points`, broken where one is not finite; `kind` is a class of report.css."""
        path, pen_up = [], True
        for x, y in points:
            if math.isfinite(x) and math.isfinite(y):
                path.append(f"{'M' if pen_up else 'L'}{x * 1000:.1f} {(1 - y) * 1000:.1f}")
                pen_up = False
            else:
                pen_up = True
        self._shapes.append(f'<path class="{kind}" d="{"".join(path)}"/>')

    def image(self, png: bytes) -> None:
        """A picture that fills the frame."""
        data = base64.b64encode(png).decode()
        self._shapes.append(
            f'<image href="data:image/png;base64,{data}" width="1000" height="1000" preserveAspectRatio="none"/>'
        )

    def mark(self, x: float, y: float, kind: str) -> None:
        """A dot, round at any width."""
        self._texts.append(f'<i class="dot {kind}" style="{_at(x, y)}"></i>')

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Words placed by class: "xt" tick below, "yt" tick at the left, "xl" and "yl" axis names, "tag" inside."""
        self._texts.append(f'<span class="{kind}" style="{_at(x, y)}">{escape(words)}</span>')

    def x_ticks(self, ticks: Sequence[tuple[float, str]], name: str) -> None:
        """Labels below the frame and the axis' name with its unit."""
        for at, words in ticks:
            self.text(at, 0, words, "xt")
        self.text(0.5, 0, name, "xl")

    def y_ticks(self, ticks: Sequence[tuple[float, str]], *, grid: bool = True) -> None:
        """Labels at the left, with a faint line across at each."""
        for at, words in ticks:
            if grid:
                self.line([(0, at), (1, at)], "grid")
            self.text(0, at, words, "yt")

    def render(self) -> str:
        """The frame as HTML."""
        return (
            f'<div class="plot" role="img" aria-label="{escape(self._label)}" style="height:{self._height}rem">'
            f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{"".join(self._shapes)}</svg>'
            f"{''.join(self._texts)}</div>"
        )


def layer_profile_chart(results: Results) -> str:
    """Heat map of P(layer | latent), latents sorted by mean layer, with its colour bar; empty without live latents."""
    heat = heat_map(results)
    if heat.n_latents == 0:
        return ""
    n_layers = len(results.layer_numbers)
    plot = Plot("Heat map: share of each latent's activation mass by layer; latents sorted by mean layer.", 20)
    plot.image(heat_png(heat))
    plot.y_ticks([((i + 0.5) / n_layers, name) for i, name in layer_ticks(results.layer_numbers)], grid=False)
    step = _round_step(heat.n_latents, 5)
    plot.x_ticks(
        [(rank / heat.n_latents, f"{rank:,}") for rank in range(0, heat.n_latents + 1, max(1, round(step)))],
        "live latents, sorted by mean layer",
    )
    stops = ", ".join(f"#{colour}" for colour in VIRIDIS)
    ticks = "".join(
        f'<span style="left:{100 * math.sqrt(tick / heat.top):.2f}%">{tick:g}</span>'
        for tick in SHARE_TICKS
        if tick <= heat.top
    )
    return (
        f'<p class="yname">layer (after block)</p>{plot.render()}<div class="bar"><div class="scale" '
        f'style="background:linear-gradient(to right, {stops})">{ticks}</div>'
        "P(layer | latent): share of the latent's activation mass, no unit; colours by its square root, "
        f"{show(heat.top, 2)} and above the same</div>"
    )


def heat_png(heat: HeatMap) -> bytes:
    """The cells as a PNG with a palette, last layer on top. Cells are repeated so that smoothing blurs no border."""
    level = np.sqrt(np.clip(heat.share / heat.top, 0, 1)) if heat.top > 0 else np.zeros_like(heat.share)
    cells = np.repeat(np.round(level * 255).astype(np.uint8)[::-1], -(-240 // len(level)), axis=0)
    cells = np.repeat(cells, -(-480 // cells.shape[1]), axis=1)
    height, width = cells.shape
    anchors = np.array([list(bytes.fromhex(colour)) for colour in VIRIDIS], dtype=np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    palette = np.stack([np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T], axis=1)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), cells], axis=1)  # each row begins with its filter, none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", np.round(palette).astype(np.uint8).tobytes())
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def variance_chart(results: Results) -> str:
    """Shares of the total variance: a bar per weighting, split into the three parts."""
    rows = []
    for weighting, name in WEIGHTINGS.items():
        total = results.number("variance", weighting, "total")
        cells = ""
        for part, words in PARTS.items():
            value = results.number("variance", weighting, part)
            if total and value is not None:
                share = value / total
                tip = f"{words}: {percent(share)}, {show(value)} layers²"
                shown = percent(share) if share >= 0.08 else ""
                cells += f'<span class="{part}" style="flex:{share:.5f}" title="{escape(tip)}">{shown}</span>'
        cells = cells or '<span class="none">no variance to split</span>'
        rows.append(f'<div class="stack"><b>{escape(name)}</b><div>{cells}</div></div>')
    legend = "".join(f'<span><i class="swatch {part}"></i>{words}</span>' for part, words in PARTS.items())
    return (
        f'<div class="legend">{legend}</div>{"".join(rows)}'
        '<p class="axis">share of the total variance of the layer, by weighting; the two coloured parts are the '
        "aggregate variance</p>"
    )


def ratio_chart(results: Results) -> str:
    """Aggregate over token-level variance on a logarithmic axis: three weightings, and the reference's number."""
    rows = [
        (
            words,
            results.number("variance", name, "aggregate_over_token"),
            results.interval(name, "aggregate_over_token"),
        )
        for name, words in WEIGHTINGS.items()
    ]
    rows.append(("reference's formula (not variances)", results.reference_ratio, None))
    end = 1.6 * max([2.0, *(value for _, value, _ in rows if value is not None)])
    start = 0.8

    def place(value: float) -> float:
        return math.log(value / start) / math.log(end / start)

    plot = Plot("Aggregate over token-level variance, by weighting and by the reference's formula.", 13)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if tick <= end]
    ticks = ticks[:: -(-len(ticks) // 6)]
    for tick in ticks:
        plot.line([(place(tick), 0), (place(tick), 1)], "one" if tick == 1 else "grid")
    plot.x_ticks([(place(tick), f"{tick:,}") for tick in ticks], "aggregate / token-level variance (ratio, log scale)")
    for row, (words, value, bounds) in enumerate(rows):
        y = 1 - (row + 0.72) / len(rows)
        kind = "reference" if row == len(rows) - 1 else "ours"
        interval = f" ({between(bounds)})" if bounds else ""
        plot.text(place(1) + 0.015, y, f"{words}: {show(value)}{interval}", f"tag {kind}")
        if bounds:
            plot.line([(place(max(bound, start)), y) for bound in bounds], "interval")
        if value is not None:
            plot.mark(place(value), y, kind)
    return plot.render()


def fvu_chart(results: Results) -> str:
    """FVU by layer, with held-out text and the baseline where there are any."""
    lines = [("fvu", "these tokens", "ours")]
    if results.get("split", "name") != "validation":
        lines.append(("validation_fvu", "held-out text", "ours dotted"))
    components = integer(results.get("baseline", "pca", "k"))
    lines.append(("pca_fvu", f"PCA, {components} components, held-out text", "base dashed"))
    return _by_layer(results, lines, "FVU (no unit, lower is better)", 13)


def l0_chart(results: Results) -> str:
    """L0 by layer."""
    return _by_layer(results, [("l0", "latents per vector", "ours")], "L0 (active latents per vector)", 13)


def _by_layer(results: Results, lines: Sequence[tuple[str, str, str]], name: str, height_rem: float) -> str:
    """Columns of layers.parquet as lines over the layers; bounds of an interval, where a column has them."""
    bounds = [(f"{column}_{end}", "", "bound") for column, _, _ in lines for end in ("low", "high")]
    series = [
        (results.layers[column], words, kind) for column, words, kind in (*lines, *bounds) if column in results.layers
    ]
    return lines_chart(series, name, layer_ticks(results.layer_numbers), "layer (after block)", height_rem)


def lines_chart(
    series: Sequence[tuple[np.ndarray, str, str]],
    name: str,
    ticks: Sequence[tuple[int, str]],
    x_name: str,
    height_rem: float,
) -> str:
    """Lines over L columns, from 0 or the lowest value up, with a legend where several have words.

    series: values [L], words in the legend, classes of report.css; ticks: column and label.
    """
    series = [line for line in series if np.isfinite(line[0]).any()]
    n_columns = len(series[0][0]) if series else 1
    highest = max([0.0, *(float(np.nanmax(values)) for values, _, _ in series)])
    lowest = min([0.0, *(float(np.nanmin(values)) for values, _, _ in series)])
    step = _round_step((highest - lowest) or 1.0, 4)
    first = math.floor(lowest / step)
    last = max(math.ceil((highest if lowest else highest or 1.0) * 1.04 / step), first + 1)
    bottom, span = step * first, step * (last - first)
    plot = Plot(f"{name}, by {x_name}; the means are in a table of this page.", height_rem)
    plot.y_ticks([((i - first) / (last - first), f"{i * step:g}") for i in range(first, last + 1)])
    plot.x_ticks([((i + 0.5) / n_columns, words) for i, words in ticks], x_name)
    legend = []
    for values, words, kind in series:
        heights = enumerate((values - bottom) / span)
        plot.line([((i + 0.5) / n_columns, float(height)) for i, height in heights], f"curve {kind}")
        if words:
            key = f'<svg viewBox="0 0 28 8"><path class="curve {kind}" d="M0 4H28"/></svg>'
            legend.append(f"<span>{key}{escape(words)}</span>")
    shown = f'<div class="legend">{"".join(legend)}</div>' if len(legend) > 1 else ""
    return f'<p class="yname">{escape(name)}</p>{shown}{plot.render()}'


def layer_ticks(layer_numbers: Sequence[int]) -> list[tuple[int, str]]:
    """At most eight (column, label) pairs; labels are the model's own block indices."""
    step = max(1, -(-len(layer_numbers) // 8))
    return [(i, str(layer_numbers[i])) for i in range(0, len(layer_numbers), step)]


def _round_step(span: float, at_most: int) -> float:
    """The smallest of 1, 2, 5 x 10^n that cuts `span` into at most `at_most` steps."""
    rough = span / at_most
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)


def _at(x: float, y: float) -> str:
    return f"left:{100 * x:.2f}%;bottom:{100 * y:.2f}%"
