"""Downstream quality as rows by layer, as a part of summary.json, and in words.

Not here: how it is measured (`analysis.model.downstream`), how it is drawn (`analysis.report.sections.downstream`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.model.downstream import Downstream
from analysis.uncertainty import Interval

NAMES = {
    "delta_ce": "delta_ce",
    "kl": "kl",
    "recovered_mean": "loss_recovered_mean",
    "recovered_zero": "loss_recovered_zero",
    "mean_delta_ce": "mean_ablation_delta_ce",
    "zero_delta_ce": "zero_ablation_delta_ce",
    "mean_kl": "mean_ablation_kl",
    "zero_kl": "zero_ablation_kl",
}
"""Numbers of a `DownstreamResult` by layer, and what they are called in the files."""

BOUNDED = ("delta_ce", "kl", "recovered_mean", "recovered_zero")
"""Those whose intervals are columns of layers.parquet."""

COLUMNS = (
    *NAMES.values(),
    *(f"{NAMES[name]}_{end}" for name in BOUNDED for end in ("low", "high")),
)
"""Columns of layers.parquet, float64; null where downstream quality was not measured."""

_Intervals = Mapping[str, Sequence[Interval | None]]


def layer_columns(found: Downstream | None, intervals: _Intervals, n_layers: int) -> list[dict[str, float | None]]:
    """`COLUMNS` of each layer. intervals: of `Downstream.intervals`."""
    if found is None:
        return [dict.fromkeys(COLUMNS) for _ in range(n_layers)]
    result = found.result()
    rows: list[dict[str, float | None]] = []
    for i in range(n_layers):
        row = {column: _number(getattr(result, name)[i]) for name, column in NAMES.items()}
        for name in BOUNDED:
            interval = intervals[name][i] if intervals else None
            row[f"{NAMES[name]}_low"], row[f"{NAMES[name]}_high"] = interval or (None, None)
        rows.append(row)
    return rows


def downstream_summary(found: Downstream | None, intervals: _Intervals, which: str) -> dict[str, Any] | None:
    """The object `downstream` of summary.json: sizes, the untouched model, and means over layers with intervals.

    which: what the tokens are, "validation" or "analysed".
    """
    if found is None:
        return None
    result = found.result()
    return {
        "tokens": which,
        "n_tokens": int(result.n_tokens),
        "n_documents": len(found.documents),
        "true_ce": _number(result.true_ce),
        **{column: _number(getattr(result, name).mean()) for name, column in NAMES.items()},
        "ci95": {NAMES[name]: list(i[-1]) if i[-1] else None for name, i in intervals.items()},
    }


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
