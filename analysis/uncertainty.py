"""How sure the variances are: the bootstrap over documents.

Tokens of one document are alike, so documents, not tokens, are drawn. Sums are kept for groups of whole documents
(`analysis.selection`), all of about the same size; a replicate draws as many groups with replacement, adds their sums,
and takes the decomposition of the total. No token is looked at again.

Shapes: G document groups, R replicates, M n_latents.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.moments import VARIANCE_NAMES, WEIGHTINGS, LayerMoments, variances

MIN_INTERVAL_GROUPS = 8
"""With fewer groups of documents no interval is given: the bootstrap would make it too narrow."""

LEVEL = 0.95

_REPLICATES_AT_ONCE_BYTES = 64 * 2**20


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def bootstrap(moments: LayerMoments, n_replicates: int, seed: int) -> dict[str, dict[str, Interval | None]]:
    """weighting -> name (`VARIANCE_NAMES`) -> interval; None where the number is not defined in every replicate.

    The decomposition is of ratios and squares, so in a finite sample it is biased, and a replicate is biased once more
    against the sample. So the interval is the basic one: with q the quantiles of the replicates and v the value, [2 v -
    q(97.5 %), 2 v - q(2.5 %)], which the bias does not shift. Empty if there are fewer than `MIN_INTERVAL_GROUPS`
    groups.
    """
    n_groups = len(moments.groups)
    if n_groups < MIN_INTERVAL_GROUPS or n_replicates == 0:
        return {}
    draws = np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), n_replicates)  # [R, G]
    live = moments.counts.any(axis=1)
    sums = moments.sums[:, :, live]  # [G, 8, live latents]
    pooled = sums.sum(axis=0)
    flat = sums.reshape(n_groups, -1)
    replicates: dict[str, list[NDArray[np.float64]]] = {weighting: [] for weighting in WEIGHTINGS}
    step = max(1, _REPLICATES_AT_ONCE_BYTES // (flat[0].nbytes or 1))
    for start in range(0, n_replicates, step):
        drawn = (draws[start : start + step].astype(np.float64) @ flat).reshape(-1, *pooled.shape)
        for weighting in WEIGHTINGS:
            found = variances(drawn, weighting)
            replicates[weighting].append(np.stack([getattr(found, name) for name in VARIANCE_NAMES]))
    tail = 100 * (1 - LEVEL) / 2
    intervals: dict[str, dict[str, Interval | None]] = {}
    for weighting in WEIGHTINGS:
        value = variances(pooled, weighting)
        low, high = np.percentile(np.concatenate(replicates[weighting], axis=1), [tail, 100 - tail], axis=1)
        intervals[weighting] = {
            name: _interval(float(getattr(value, name)), low[i], high[i]) for i, name in enumerate(VARIANCE_NAMES)
        }
    return intervals


def _interval(value: float, low: float, high: float) -> Interval | None:
    if not np.isfinite([value, low, high]).all():
        return None
    return Interval(min(2 * value - float(high), value), max(2 * value - float(low), value))
