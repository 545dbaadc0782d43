"""How sure the numbers are: 95 % intervals by leaving out documents.

Tokens of one document are alike, so the sampling unit is the document, not the token. Sums are kept for groups of whole
documents (`analysis.selection`), all of about the same size; a replicate recomputes every number from the sums of all
groups but one, without reading any token again.

From the replicates the jackknife (Tukey 1958) gives a number's bias, which is subtracted, and its standard error, on a
log scale if the number is positive by nature. Documents differ much and a few carry much weight, so at each end the
wider of two intervals is taken: the symmetric Student's t interval, with degrees of freedom from the replicates'
kurtosis (Satterthwaite 1946), and one corrected for their skewness (Hall 1992). On samples of a known process
(`benchmarks/bench_intervals.py`) this covered the truth more often than the basic, percentile and BCa bootstraps, which
are too narrow with few documents.

Shapes: G document groups, N numbers, M n_latents.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.moments import VARIANCE_NAMES, WEIGHTINGS, LayerMoments, Weighting, variances
from analysis.persistence import PAIR_WEIGHTINGS, PERSISTENCE_NAMES, persistence_numbers
from analysis.quality import QualityResult

MIN_INTERVAL_GROUPS = 20
"""With fewer groups no interval is given: at 16, those of some numbers covered the truth less than 9 times in 10."""

METHOD = "jackknife over groups of whole documents, with corrections for bias, skewness and heavy tails"

_NORMAL = 1.959963984540054  # 97.5 % of a normal distribution lie below
_LEAST_FREEDOM = 3.0
_AT_ONCE_BYTES = 64 * 2**20


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


Intervals = dict[str, dict[str, Interval | None]]
"""weighting -> name -> interval; None where the number is not defined in every replicate."""


def leave_one_out(n_groups: int) -> NDArray[np.float64]:
    """[G, G] how often each replicate uses each document group: once, but its own never."""
    return 1.0 - np.eye(n_groups)


def without_each(sums: NDArray[Any]) -> NDArray[np.float64]:
    """[..., G] the product of `sums` [..., G] and `leave_one_out`, by additions only and without a G x G matrix."""
    result = np.zeros(sums.shape)
    result[..., 1:] = np.cumsum(sums[..., :-1], axis=-1, dtype=np.float64)
    result[..., :-1] += np.cumsum(sums[..., :0:-1], axis=-1, dtype=np.float64)[..., ::-1]
    return result


def jackknife_intervals(
    values: NDArray[np.float64], replicates: NDArray[np.float64], *, signed: bool = False
) -> list[Interval | None]:
    """The interval of each value [N] from its replicates [N, G], widened to hold the value; None unless all are finite.
    signed: the numbers may be negative by nature, so no log scale is used for those that happen to be positive."""
    return [_interval(float(value), row, signed) for value, row in zip(values, replicates, strict=True)]


def _interval(value: float, replicates: NDArray[np.float64], signed: bool) -> Interval | None:
    if not (np.isfinite(value) and np.isfinite(replicates).all()):
        return None
    if not signed and value > 0 and (replicates > 0).all():
        low, high = np.exp(_bounds(np.log(value), np.log(replicates)))
    else:
        low, high = _bounds(value, replicates)
    return Interval(min(float(low), value), max(float(high), value))


def _bounds(value: float, replicates: NDArray[np.float64]) -> NDArray[np.float64]:
    """[low, high] on the scale of the arguments."""
    n = len(replicates)
    influence = (n - 1) * (replicates.mean() - replicates)  # [G] what each group adds, times G
    square = (influence**2).mean()
    if square <= (1e-12 * value) ** 2:  # rounding
        return np.array([value, value])
    centre = value - (n - 1) * (replicates.mean() - value)
    error = np.sqrt(square / (n - 1))
    skewness, kurtosis = (influence**3).mean() / square**1.5, (influence**4).mean() / square**2
    # The variance of a sample variance is (kurtosis - (n - 3) / (n - 1)) / n times its square: 2 / freedom for t.
    freedom = np.clip(2 * n / max(kurtosis - (n - 3) / (n - 1), 1e-9), _LEAST_FREEDOM, n - 1)
    t = t_quantile(float(freedom))
    low, high = (_hall(sign * t, skewness, n) for sign in (1, -1))
    return np.array([centre - error * max(t, low), centre - error * min(-t, high)])


def _hall(t: float, skewness: float, n: int) -> float:
    """The studentised mean of n skewed numbers whose cube-root transform (Hall 1992) is t; t without skewness."""
    if abs(skewness) < 1e-6:
        return t
    return float(np.sqrt(n) * 3 / skewness * (np.cbrt(1 + skewness * (t / np.sqrt(n) - skewness / (6 * n))) - 1))


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, to 0.005 from 3 degrees of freedom (Abramowitz and Stegun, 26.7.5)."""
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def variance_intervals(moments: LayerMoments) -> Intervals:
    """weighting -> name (`VARIANCE_NAMES`) -> interval."""
    draws = leave_one_out(len(moments.groups))
    live = moments.counts.any(axis=1)
    sums = moments.sums[:, :, live]  # [G, 8, live latents]
    pooled = sums.sum(axis=0)
    flat = sums.reshape(len(draws), -1)
    replicates: dict[Weighting, list[NDArray[np.float64]]] = {weighting: [] for weighting in WEIGHTINGS}
    step = max(1, _AT_ONCE_BYTES // (flat[0].nbytes or 1))
    for start in range(0, len(draws), step):
        rows = draws[start : start + step]
        drawn = (rows @ flat).reshape(len(rows), *pooled.shape)
        for weighting, parts in replicates.items():
            parts.append(_stacked(drawn, weighting))
    return {
        weighting: _named(VARIANCE_NAMES, _stacked(pooled, weighting), np.concatenate(parts, axis=1))
        for weighting, parts in replicates.items()
    }


def _stacked(sums: NDArray[np.float64], weighting: Weighting) -> NDArray[np.float64]:
    decomposition = variances(sums, weighting)
    return np.stack([getattr(decomposition, name) for name in VARIANCE_NAMES])


def _named(names: Sequence[str], values: NDArray, replicates: NDArray) -> dict[str, Interval | None]:
    return dict(zip(names, jackknife_intervals(values, replicates), strict=True))


def persistence_intervals(moments: LayerMoments) -> Intervals:
    """As `variance_intervals`, for the numbers of `analysis.persistence`."""
    draws = leave_one_out(len(moments.groups))
    pooled = moments.histograms.sum(axis=0), moments.run_sums.sum(axis=0), moments.layers
    drawn = np.tensordot(draws, moments.histograms, 1), np.tensordot(draws, moments.run_sums, 1), moments.layers
    intervals: Intervals = {}
    for weighting in PAIR_WEIGHTINGS:
        values = np.stack(persistence_numbers(*pooled, weighting))  # [N]
        replicates = np.stack(persistence_numbers(*drawn, weighting))  # [N, G]
        intervals[weighting] = _named(PERSISTENCE_NAMES, values, replicates)
    return intervals


class SumIntervals(NamedTuple):
    """Intervals of all numbers computed from the sums; empty if there are none, None as in `Intervals`."""

    variance: Intervals
    persistence: Intervals
    reconstruction: dict[str, Interval | None]
    """For the means over layers of fvu, mse and l0."""
    fvu_by_layer: list[Interval | None]
    """[L]"""


NO_INTERVALS = SumIntervals({}, {}, {}, [])


def all_intervals(moments: LayerMoments, quality: QualityResult) -> SumIntervals:
    """For the variances, persistence and reconstruction of the analysed tokens; none with too few document groups."""
    if len(moments.groups) < MIN_INTERVAL_GROUPS:
        return NO_INTERVALS
    means, by_layer = reconstruction_intervals(moments, quality)
    return SumIntervals(variance_intervals(moments), persistence_intervals(moments), means, by_layer)


def reconstruction_intervals(
    moments: LayerMoments, quality: QualityResult
) -> tuple[dict[str, Interval | None], list[Interval | None]]:
    """`reconstruction` and `fvu_by_layer` of `SumIntervals`.

    A replicate's FVU is its squared error over its squared deviation from one fixed vector per layer, scaled so that
    all groups together give the measured FVU: so the layers' means need not be kept per group.
    """
    draws = leave_one_out(len(moments.groups))
    whole = moments.errors.sum(axis=0)  # [3, L]
    drawn = np.tensordot(draws, moments.errors, 1)  # [G, 3, L]
    tokens = draws @ moments.n_tokens.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = quality.fvu * whole[1] / whole[0]
        fvu = np.where(quality.fvu == 0, 0.0, drawn[:, 0] / drawn[:, 1] * scale)  # [G, L]
    mse = drawn[:, 0].mean(axis=1) / tokens / quality.d_model
    l0 = drawn[:, 2].mean(axis=1) / tokens
    values = np.array([quality.fvu.mean(), quality.mse.mean(), quality.l0.mean(), *quality.fvu])
    intervals = jackknife_intervals(values, np.stack([fvu.mean(axis=1), mse, l0, *fvu.T]))
    return dict(zip(("fvu", "mse", "l0"), intervals, strict=False)), intervals[3:]
