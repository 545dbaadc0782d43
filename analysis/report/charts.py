"""The report's charts: a frame with axes, and lines over layers, as HTML and SVG without a library or a script.

The data are drawn in an SVG that stretches to the width of the page, and every label is HTML over it, so that text
keeps its size on a phone and colours follow the reader's light or dark theme (report.css). All text is escaped here.
Positions are fractions of the plot's width and height, from the left and from the bottom.
"""

import base64
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from analysis.report.data import Results

VIRIDIS = (
    *("440154", "48186a", "472d7b", "424086", "3b528b", "33638d", "2c728e", "26828e", "21918c"),
    *("1fa088", "28ae80", "3fbc73", "5ec962", "84d44b", "addc30", "d8e219", "fde725"),
)
"""Seventeen evenly spaced colours of viridis, which is perceptually uniform and safe for colour-blind readers."""

AFTER_BLOCK = "layer (after block)"
"""Label of an axis of layers."""


class Plot:
    """A frame with axes: add lines, marks and labels in fractions of it, then render."""

    def __init__(self, label: str, height_rem: float) -> None:
        """`label` is what a screen reader says; the numbers themselves are in a table of the report."""
        self._label, self._height = label, height_rem
        self._shapes: list[str] = []
        self._texts: list[str] = []

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through `points`, broken where one is not finite (one alone is a dash); kind: class of report.css."""
        path, known = [], [*(math.isfinite(x) and math.isfinite(y) for x, y in points), False]
        for i, (x, y) in enumerate(points):
            if known[i]:
                alone = not (known[i - 1] or known[i + 1])  # known[-1] is False
                left, down = 1000 * x - 10 * alone, (1 - y) * 1000
                path.append(f"{'L' if known[i - 1] else 'M'}{left:.1f} {down:.1f}{'h20' * alone}")
        self._shapes.append(f'<path class="{kind}" d="{"".join(path)}"/>')

    def image(self, png: bytes) -> None:
        """A picture that fills the frame."""
        href = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        self._shapes.append(f'<image href="{href}" width="1000" height="1000" preserveAspectRatio="none"/>')

    def mark(self, x: float, y: float, kind: str) -> None:
        """A dot, round at any width."""
        self._texts.append(f'<i class="dot {kind}" style="{_at(x, y)}"></i>')

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Words placed by class: "xt" tick below, "yt" tick at the left, "xl" and "yl" axis names, "tag" inside."""
        self._texts.append(f'<span class="{kind}" style="{_at(x, y)}">{escape(words)}</span>')

    def x_ticks(self, ticks: Sequence[tuple[float, str]], name: str) -> None:
        """Labels below the frame, and the axis label with its unit."""
        for at, words in ticks:
            self.text(at, 0, words, "xt")
        self.text(0.5, 0, name, "xl")

    def y_ticks(self, ticks: Sequence[tuple[float, str]], *, grid: bool = True) -> None:
        """Labels on the left, with a faint grid line at each."""
        for at, words in ticks:
            if grid:
                self.line([(0, at), (1, at)], "grid")
            self.text(0, at, words, "yt")

    def render(self) -> str:
        return (
            f'<div class="plot" role="img" aria-label="{escape(self._label)}" style="height:{self._height}rem">'
            f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{"".join(self._shapes)}</svg>'
            f"{''.join(self._texts)}</div>"
        )


def layer_chart(results: Results, lines: Sequence[tuple[str, str, str]], name: str, x_name: str = AFTER_BLOCK) -> str:
    """Columns of layers.parquet as lines over the layers, with the bounds of their intervals if there are any.

    lines: column, legend, classes of report.css.
    """
    bounds = [(f"{column}_{end}", "", f"{kind} bound") for column, _, kind in lines for end in ("low", "high")]
    known = [line for line in (*lines, *bounds) if line[0] in results.layers]
    series = [(results.layers[column], words, kind) for column, words, kind in known]
    return lines_chart(series, name, results.layer_numbers, x_name)


def lines_chart(
    series: Sequence[tuple[np.ndarray, str, str]],
    name: str,
    numbers: Sequence[int],
    x_name: str = AFTER_BLOCK,
    height_rem: float = 13,
) -> str:
    """Lines over L columns, from 0 or the lowest value up, with a legend if several lines have text for it.

    series: values [L], legend, classes of report.css; numbers: [L] of the columns.
    """
    series = [line for line in series if np.isfinite(line[0]).any()]
    highest = max([0.0, *(float(np.nanmax(values)) for values, _, _ in series)])
    lowest = min([0.0, *(float(np.nanmin(values)) for values, _, _ in series)])
    step = round_step((highest - lowest) or 1.0, 4)
    first = math.floor(lowest / step)
    last = max(math.ceil((highest if lowest else highest or 1.0) * 1.04 / step), first + 1)
    bottom, span = step * first, step * (last - first)
    plot = Plot(f"{name}, by {x_name}; the means are in a table of this page.", height_rem)
    plot.y_ticks([((i - first) / (last - first), f"{i * step:g}") for i in range(first, last + 1)])
    plot.x_ticks([((i + 0.5) / len(numbers), words) for i, words in layer_ticks(numbers)], x_name)
    legend = []
    for values, words, kind in series:
        heights = enumerate((values - bottom) / span)
        plot.line([((i + 0.5) / len(numbers), float(height)) for i, height in heights], f"curve {kind}")
        if words:
            key = f'<svg viewBox="0 0 28 8"><path class="curve {kind}" d="M0 4H28"/></svg>'
            legend.append(f"<span>{key}{escape(words)}</span>")
    shown = f'<div class="legend">{"".join(legend)}</div>' if len(legend) > 1 else ""
    return f'<p class="yname">{escape(name)}</p>{shown}{plot.render()}'


def layer_ticks(numbers: Sequence[int]) -> list[tuple[int, str]]:
    """At most eight (column, label) pairs, evenly spaced from the first."""
    return [(i, str(numbers[i])) for i in range(0, len(numbers), max(1, -(-len(numbers) // 8)))]


def log_ticks(end: float, at_most: int) -> list[int]:
    """At most `at_most` of 1, 2, 5, 10, 20, ... 10,000 up to `end`, evenly spaced from 1."""
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if tick <= end]
    return ticks[:: -(-len(ticks) // at_most)]


def round_step(span: float, at_most: int) -> float:
    """The smallest of 1, 2, 5 x 10^n that cuts `span` into at most `at_most` steps."""
    rough = span / at_most
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)


def _at(x: float, y: float) -> str:
    return f"left:{100 * x:.2f}%;bottom:{100 * y:.2f}%"
