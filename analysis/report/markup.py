"""What the report's sections are made of: numbers as text, HTML tables and figures, template files, packed data.

Undefined numbers (null, NaN, infinite) are shown as an en dash. Functions take HTML unless they say that they escape.
"""

import base64
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

import numpy as np

from analysis.report.data import Results, finite

EN_DASH = "\N{EN DASH}"
NBSP = "\N{NO-BREAK SPACE}"


class Section(NamedTuple):
    """A part of the page, named in its table of contents."""

    title: str
    """Heading, as plain text."""
    body: str
    """HTML."""
    data: str = ""
    """Data blocks for its script, from `pack_arrays`."""


def show(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits and thousands separators; an en dash where it is not defined."""
    number = finite(value)
    if number is None:
        return EN_DASH
    if number == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{number:.{digits - 1}e}"))))
    if not -4 <= exponent < 7:
        mantissa = f"{number / 10.0**exponent:.{digits - 1}f}"
        return f"{mantissa}\N{MULTIPLICATION SIGN}10^{exponent}".replace("-", "\N{MINUS SIGN}")
    return f"{number:,.{max(digits - 1 - exponent, 0)}f}".replace("-", "\N{MINUS SIGN}")


def integer(value: Any) -> str:
    """A count with thousands separators; an en dash where it is not defined."""
    number = finite(value)
    return EN_DASH if number is None else f"{round(number):,}"


def percent(value: Any) -> str:
    """A share as a percentage: whole numbers from 10 % on, two digits below."""
    if (number := finite(value)) is None:
        return EN_DASH
    return f"{number * 100:.0f}{NBSP}%" if number >= 0.0995 or number == 0 else f"{show(number * 100, 2)}{NBSP}%"


def between(bounds: tuple[float, float] | None) -> str:
    """An interval as "a to b"; empty where there is none."""
    return "" if bounds is None else f"{show(bounds[0])} to {show(bounds[1])}"


def small(bounds: tuple[float, float] | None) -> str:
    """An interval in small print, to follow its number; empty where there is none."""
    return "" if bounds is None else f"<small>{between(bounds)}</small>"


def with_interval(results: Results, *keys: str) -> str:
    """The number at a path of keys in the summary, and its interval in small print."""
    return show(results.number(*keys)) + small(results.bounds(*keys))


def prose(text: str) -> str:
    """A message as HTML: flags, and text between backticks, become code, so that no line breaks inside a flag."""
    return re.sub(r"`([^`]+)`|(--[\w-]+)", r"<code>\1\2</code>", escape(text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of numbers whose first column names the rows; on a narrow screen it scrolls sideways."""
    columns = "".join(f"<th>{words}</th>" for words in head)
    named = ((first, "".join(f"<td>{cell}</td>" for cell in cells)) for first, *cells in rows)
    lines = "".join(f"<tr><th>{first}</th>{cells}</tr>" for first, cells in named)
    return (
        f'<div class="scroll"><table class="numbers {kind}"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def layer_table(results: Results, shown: Sequence[tuple[str, str, Callable[[Any], str]]]) -> str:
    """Columns of layers.parquet (name, heading, formatter) as a table, with their intervals."""

    def cells(i: int) -> list[str]:
        return [form(results.layers[name][i]) + small(results.layer_bounds(name, i)) for name, _, form in shown]

    rows = [(str(layer), *cells(i)) for i, layer in enumerate(results.layer_numbers)]
    return table(("Layer", *(words for _, words, _ in shown)), rows)


def figure(title: str, chart: str, caption: str = "", kind: str = "") -> str:
    """A chart below its title, which states the finding and is escaped here."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{kind}"><h3>{escape(title)}</h3>{chart}{below}</figure>'


def columns(*parts: str) -> str:
    """Parts side by side; on a narrow screen, one below the other."""
    return f'<div class="columns">{"".join(parts)}</div>'


def tiles(numbers: Iterable[tuple[str, str, str]]) -> str:
    """Numbers in large print: name, value, and a few words on unit, direction or interval. All are escaped here."""
    shown = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(words)}</small></dd></div>"
        for name, value, words in numbers
    )
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def page_file(name: str) -> str:
    """A file of templates/ or assets/ as text."""
    folder = "templates" if name.endswith(".html") else "assets"
    return files("analysis.report").joinpath(folder, name).read_text(encoding="utf-8")


def fill(name: str, **html: str) -> str:
    """A template of templates/ with its $names replaced by HTML."""
    return Template(page_file(name)).substitute(html)


def pack_arrays(block_id: str, arrays: Mapping[str, np.ndarray], **attributes: Any) -> str:
    """Arrays as one <script> block of data that report.js' `unpack` reads: base64 of zlib of the bytes, C order.

    dtypes: <u2, <u4, <f4, <f8 and, for values from 0 to 1, <f2. The index holds (name, type, first byte, end).
    `attributes` become data-... attributes in JSON.
    """
    index, data = [], b""
    for name, values in arrays.items():
        start, data = len(data), data + values.tobytes()
        index.append((name, f"{values.dtype.kind}{values.dtype.itemsize}", start, len(data)))
    packed = base64.b64encode(zlib.compress(data, 9)).decode()
    extra = "".join(
        f' data-{name}="{escape(json.dumps(value, separators=(",", ":")))}"'
        for name, value in {"index": index, **attributes}.items()
    )
    return f'<script type="text/plain" id="{escape(block_id)}"{extra}>{packed}</script>'
