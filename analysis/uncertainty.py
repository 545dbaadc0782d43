"""How sure the numbers are: the bootstrap over documents.

Tokens of one document are alike, so documents, not tokens, are drawn. Sums are kept for groups of whole documents
(`analysis.selection`), all of about the same size; a replicate draws as many groups with replacement, adds their sums,
and takes the numbers of the total. No token is looked at again.

Shapes: G document groups, R replicates, M n_latents.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.moments import VARIANCE_NAMES, WEIGHTINGS, LayerMoments, variances
from analysis.persistence import PAIR_WEIGHTINGS, PERSISTENCE_NAMES, persistence_numbers
from analysis.quality import GroupQuality, QualityResult

MIN_INTERVAL_GROUPS = 8
"""With fewer groups of documents no interval is given: the bootstrap would make it too narrow."""

LEVEL = 0.95

_REPLICATES_AT_ONCE_BYTES = 64 * 2**20


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


Intervals = dict[str, dict[str, Interval | None]]
"""weighting -> name -> interval; None where the number is not defined in every replicate."""


def draw_groups(n_groups: int, n_replicates: int, seed: int) -> NDArray[np.float64] | None:
    """[R, G] how often each replicate takes each document group; None if there are fewer than `MIN_INTERVAL_GROUPS`."""
    if n_groups < MIN_INTERVAL_GROUPS or n_replicates == 0:
        return None
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), n_replicates).astype(np.float64)


def basic_intervals(values: NDArray[np.float64], replicates: NDArray[np.float64]) -> list[Interval | None]:
    """The interval of each of N values [N] from its replicates [N, R]: the basic one, widened to hold the value."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(replicates, [tail, 100 - tail], axis=1)
    return [_interval(float(value), low[i], high[i]) for i, value in enumerate(values)]


def bootstrap_persistence(moments: LayerMoments, n_replicates: int, seed: int) -> Intervals:
    """As `bootstrap`, of the numbers of `analysis.persistence`, from the same draws."""
    draws = draw_groups(len(moments.groups), n_replicates, seed)
    if draws is None:
        return {}
    sums = moments.persistence
    pooled, drawn = sums.drawn(np.ones((1, len(moments.groups)))), sums.drawn(draws)
    intervals: Intervals = {}
    for weighting in PAIR_WEIGHTINGS:
        value = np.stack(persistence_numbers(pooled[0], pooled[1], moments.layers, weighting))  # [N, 1]
        replicates = np.stack(persistence_numbers(drawn[0], drawn[1], moments.layers, weighting))  # [N, R]
        intervals[weighting] = dict(zip(PERSISTENCE_NAMES, basic_intervals(value[:, 0], replicates), strict=True))
    return intervals


class ReconstructionIntervals(NamedTuple):
    """Of the means over layers, and of FVU by layer [L]; None where a number is not defined in every replicate."""

    fvu: Interval | None
    mse: Interval | None
    l0: Interval | None
    fvu_by_layer: list[Interval | None]


def bootstrap_reconstruction(
    sums: GroupQuality, found: QualityResult, d_model: int, n_replicates: int, seed: int
) -> ReconstructionIntervals | None:
    """As `bootstrap`, of the numbers of `analysis.quality`, from the same draws; None with too few groups.

    A replicate's FVU is its squared error over its squared deviation from one fixed vector by layer, times a constant
    that makes it the found FVU where every group is drawn once: so the layers' means need not be kept by group.
    """
    draws = draw_groups(len(sums.groups), n_replicates, seed)
    if draws is None:
        return None
    whole, drawn = sums.sums.sum(axis=0)[None], np.tensordot(draws, sums.sums, 1)  # [1, 3, L], [R, 3, L]
    tokens = draws @ sums.n_tokens.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = found.fvu * whole[0, 1] / whole[0, 0]
        fvu = np.where(found.fvu == 0, 0.0, drawn[:, 0] / drawn[:, 1] * scale)  # [R, L]
    mse = drawn[:, 0].mean(axis=1) / tokens / d_model
    l0 = drawn[:, 2].mean(axis=1) / tokens
    values = np.array([found.fvu.mean(), found.mse.mean(), found.l0.mean(), *found.fvu])
    intervals = basic_intervals(values, np.stack([fvu.mean(axis=1), mse, l0, *fvu.T]))
    fvu_mean, mse_mean, l0_mean, *by_layer = intervals
    return ReconstructionIntervals(fvu_mean, mse_mean, l0_mean, by_layer)


def bootstrap(moments: LayerMoments, n_replicates: int, seed: int) -> Intervals:
    """weighting -> name (`VARIANCE_NAMES`) -> interval; None where the number is not defined in every replicate.

    The decomposition is of ratios and squares, so in a finite sample it is biased, and a replicate is biased once more
    against the sample. So the interval is the basic one: with q the quantiles of the replicates and v the value, [2 v -
    q(97.5 %), 2 v - q(2.5 %)], which the bias does not shift. Empty if there are fewer than `MIN_INTERVAL_GROUPS`
    groups.
    """
    n_groups = len(moments.groups)
    draws = draw_groups(n_groups, n_replicates, seed)
    if draws is None:
        return {}
    live = moments.counts.any(axis=1)
    sums = moments.sums[:, :, live]  # [G, 8, live latents]
    pooled = sums.sum(axis=0)
    flat = sums.reshape(n_groups, -1)
    replicates: dict[str, list[NDArray[np.float64]]] = {weighting: [] for weighting in WEIGHTINGS}
    step = max(1, _REPLICATES_AT_ONCE_BYTES // (flat[0].nbytes or 1))
    for start in range(0, n_replicates, step):
        drawn = (draws[start : start + step] @ flat).reshape(-1, *pooled.shape)
        for weighting in WEIGHTINGS:
            found = variances(drawn, weighting)
            replicates[weighting].append(np.stack([getattr(found, name) for name in VARIANCE_NAMES]))
    intervals: Intervals = {}
    for weighting in WEIGHTINGS:
        found = variances(pooled, weighting)
        values = np.array([float(getattr(found, name)) for name in VARIANCE_NAMES])
        drawn = np.concatenate(replicates[weighting], axis=1)
        intervals[weighting] = dict(zip(VARIANCE_NAMES, basic_intervals(values, drawn), strict=True))
    return intervals


def _interval(value: float, low: float, high: float) -> Interval | None:
    if not np.isfinite([value, low, high]).all():
        return None
    return Interval(min(2 * value - float(high), value), max(2 * value - float(low), value))
