"""Downstream quality: sums by document, the means and intervals computed from them, and their entries in summary.json
and layers.parquet. For definitions, and how the sums are measured, see `analysis.model.downstream`.

Shapes: L layers, C conditions, G documents. Tested in test_downstream.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.quality import defined
from analysis.uncertainty import MIN_INTERVAL_GROUPS, Interval, jackknife_intervals, without_each

RECONSTRUCTED, MEAN, ZERO = range(3)
"""What replaces the residual stream, in the order of the C axis."""


@dataclass(frozen=True, kw_only=True)
class Downstream:
    """Sums over the counted tokens of each document."""

    layers: NDArray[np.int64]
    """[L] the model's block indices; for groups of layers, the first of each."""
    documents: NDArray[np.int64]
    """[G] documents with a counted token, ascending."""
    n_tokens: NDArray[np.int64]
    """[G] counted tokens."""
    true_ce: NDArray[np.float64]
    """[G] summed cross-entropy of the unmodified model, nats."""
    ce: NDArray[np.float64]
    """[L, C, G] summed cross-entropy with the layer replaced, nats."""
    kl: NDArray[np.float64]
    """[L, C, G] summed KL(true || replaced), nats."""

    def result(self) -> "DownstreamResult":
        """The means over all counted tokens."""
        return _result(*(x.sum(axis=-1) for x in self._sums()))

    def intervals(self) -> dict[str, list[Interval | None]]:
        """95 % intervals over documents of the numbers of `result`, by name: one for each layer, then one for the mean
        over layers. Empty if there are fewer than `MIN_INTERVAL_GROUPS` documents.

        Each replicate leaves one document out (`analysis.uncertainty`). None unless a number is defined in all.
        """
        if len(self.documents) < MIN_INTERVAL_GROUPS:
            return {}
        value, drawn = self.result(), _result(*map(without_each, self._sums()))
        numbers = ((name, *(_with_mean(getattr(of, name)) for of in (value, drawn))) for name in PER_LAYER)
        return {name: jackknife_intervals(*pair, signed=not name.endswith("kl")) for name, *pair in numbers}

    def _sums(self) -> tuple[Any, ...]:
        return self.n_tokens, self.true_ce, self.ce, self.kl


class DownstreamResult(NamedTuple):
    """Means over tokens, each [L] except the first two. NaN if a number is not defined."""

    n_tokens: Any
    """Counted tokens."""
    true_ce: Any
    """Cross-entropy of the unmodified model, nats per predicted token."""
    delta_ce: NDArray[np.float64]
    """Increase of the cross-entropy by the reconstruction."""
    kl: NDArray[np.float64]
    """KL(true || reconstructed), nats per token."""
    loss_recovered_mean: NDArray[np.float64]
    """Against mean ablation."""
    loss_recovered_zero: NDArray[np.float64]
    """Against zero ablation."""
    mean_ablation_delta_ce: NDArray[np.float64]
    zero_ablation_delta_ce: NDArray[np.float64]
    mean_ablation_kl: NDArray[np.float64]
    zero_ablation_kl: NDArray[np.float64]


PER_LAYER = DownstreamResult._fields[2:]
"""Numbers with one value for each layer; also their names in the files."""

_LEAST_COST = 0.01
"""Loss recovered is not defined if the ablation costs less than this, in nats."""

BOUNDED = ("delta_ce", "kl", "loss_recovered_mean", "loss_recovered_zero")
"""Numbers whose intervals are columns of layers.parquet."""

COLUMNS = (*PER_LAYER, *(f"{name}_{end}" for name in BOUNDED for end in ("low", "high")))
"""Columns of layers.parquet, float64; null if downstream quality was not measured."""

_Intervals = Mapping[str, Sequence[Interval | None]]


def layer_columns(found: Downstream | None, intervals: _Intervals, n_layers: int) -> list[dict[str, float | None]]:
    """The `COLUMNS` of each layer. intervals: from `Downstream.intervals`."""
    if found is None:
        return [dict.fromkeys(COLUMNS) for _ in range(n_layers)]
    result = found.result()
    rows: list[dict[str, float | None]] = []
    for i in range(n_layers):
        row = {name: defined(getattr(result, name)[i]) for name in PER_LAYER}
        for name in BOUNDED:
            interval = intervals[name][i] if intervals else None
            row[f"{name}_low"], row[f"{name}_high"] = interval or (None, None)
        rows.append(row)
    return rows


def downstream_summary(found: Downstream | None, intervals: _Intervals, which: str) -> dict[str, Any] | None:
    """The object `downstream` of summary.json: sizes, the unmodified model, and means over layers with intervals.

    which: the kind of tokens, "validation" or "analysed".
    """
    if found is None:
        return None
    result = found.result()
    return {
        "tokens": which,
        "n_tokens": int(result.n_tokens),
        "n_documents": len(found.documents),
        "true_ce": defined(result.true_ce),
        **{name: defined(getattr(result, name).mean()) for name in PER_LAYER},
        "ci95": {name: list(i[-1]) if i[-1] else None for name, i in intervals.items()},
    }


def _result(n_tokens: Any, true_ce: Any, ce: NDArray[np.float64], kl: NDArray[np.float64]) -> DownstreamResult:
    """Means from sums: n_tokens [...], true_ce [...], ce and kl [L, C, ...]; ... is nothing, or replicates."""
    true_ce, ce, kl = true_ce / n_tokens, ce / n_tokens, kl / n_tokens
    delta = ce - true_ce  # [L, C, ...]
    # If an ablation costs almost nothing, as in a model with random weights, there is no loss to recover.
    recovered = 1 - delta[:, :1] / np.where(delta[:, 1:] >= _LEAST_COST, delta[:, 1:], np.nan)
    return DownstreamResult(
        n_tokens=n_tokens,
        true_ce=true_ce,
        delta_ce=delta[:, RECONSTRUCTED],
        kl=kl[:, RECONSTRUCTED],
        loss_recovered_mean=recovered[:, 0],
        loss_recovered_zero=recovered[:, 1],
        mean_ablation_delta_ce=delta[:, MEAN],
        zero_ablation_delta_ce=delta[:, ZERO],
        mean_ablation_kl=kl[:, MEAN],
        zero_ablation_kl=kl[:, ZERO],
    )


def _with_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L, ...] with the mean over layers appended, [L + 1, ...]."""
    return np.append(values, values.mean(axis=0, keepdims=True), axis=0)
