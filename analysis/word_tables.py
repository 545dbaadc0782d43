"""Numbers and tables as plain text for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def some(rows: Sequence[Any], limit: int = 12) -> list[Any]:
    """At most `limit` rows, evenly spread, first and last among them."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, limit).round().astype(int))]


def shown(value: float | None) -> str:
    """Three digits, or a dash for what is not defined."""
    return "-" if value is None else f"{value:.3g}"


def with_interval(variance: Mapping[str, Any], name: str) -> str:
    """A number with its 95 % interval, where it has one."""
    interval = variance["ci95"].get(name)
    value = shown(variance[name])
    return f"{value} [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column flush left, numbers flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
