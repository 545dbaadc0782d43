"""Per-layer statistics of stored vectors (mean, variance, norm over kept tokens), merged from the shards' sums.

How: each shard has the mean and the sum of squared deviations (M2) of each layer and dimension, in float64, of the
*stored* (rounded) values. Shards are merged in shard order by the update of Chan, Golub and LeVeque (1979), so that the
result is exact up to rounding, never negative, and the same after any interruption. pack.py computes a shard's sums.

Shapes: L stored layers, D = d_model.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShardMoments:
    """Sums over the kept tokens of one shard, or of several merged."""

    count: int
    """Kept tokens."""
    mean: np.ndarray
    """float64 [L, D]; zero where `count` is zero."""
    m2: np.ndarray
    """float64 [L, D]: sum of squared deviations from `mean`."""
    norm_sums: np.ndarray
    """float64 [L]: sum of the vectors' L2 norms."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics over kept tokens; NaN when there are none."""

    count: int
    """Kept tokens."""
    mean: np.ndarray
    """float64 [L, D]."""
    var: np.ndarray
    """float64 [L, D]: population variance, never negative."""
    norm: np.ndarray
    """float64 [L]: mean L2 norm of the vectors."""


def no_moments(n_layers: int, d_model: int) -> ShardMoments:
    """Moments of no tokens, with which a merge begins."""
    return ShardMoments(0, np.zeros((n_layers, d_model)), np.zeros((n_layers, d_model)), np.zeros(n_layers))


def merge(a: ShardMoments, b: ShardMoments) -> ShardMoments:
    """Moments of the tokens of both."""
    if a.count == 0 or b.count == 0:
        return b if a.count == 0 else a
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    m2 = a.m2 + b.m2 + delta**2 * (a.count * b.count / count)
    return ShardMoments(count, mean, m2, a.norm_sums + b.norm_sums)


def statistics(moments: ShardMoments) -> LayerStatistics:
    """Statistics from moments."""
    if moments.count == 0:
        none = np.full_like(moments.mean, np.nan)
        return LayerStatistics(0, none, none.copy(), np.full_like(moments.norm_sums, np.nan))
    n = moments.count
    return LayerStatistics(n, moments.mean, moments.m2 / n, moments.norm_sums / n)
