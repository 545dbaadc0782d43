"""Statistics of each latent, all of its layers together: the columns of latents.parquet that are made from the sums.

They are those that the reference publishes as its `-dists` data sets, and the latent's own two parts of variance and
persistence. Tested in tests/analysis/test_moments.py. Not here: the file (`analysis.results.tables`).

Shapes: M n_latents, L layers.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.moments import LayerMoments, ratio_or_zero
from analysis.persistence import LatentPersistence, latent_persistence


class LatentTable(NamedTuple):
    """Per-latent statistics, all layers of a latent together; NaN where a latent never fired."""

    n_fired: NDArray[np.int64]
    """[M] (token, layer) pairs at which it fired."""

    n_tokens: NDArray[np.int64]
    """[M] tokens at which it fired at one layer at least."""

    total: NDArray[np.float64]
    """[M] summed activation."""

    mean: NDArray[np.float64]
    """[M] total / n_fired."""

    layer_mean: NDArray[np.float64]
    """[M] mean of P(layer | latent), in the model's layer numbers."""

    layer_var: NDArray[np.float64]
    """[M] population variance of P(layer | latent), layers squared."""

    within_token: NDArray[np.float64]
    """[M] Var(L | J = j, T) averaged over tokens by mass; layer_var = within_token + between_tokens."""

    between_tokens: NDArray[np.float64]
    """[M] variance by mass of the tokens' mean layers."""

    entropy: NDArray[np.float64]
    """[M] of P(layer | latent), in bits."""

    n_layers_active: NDArray[np.int64]
    """[M] layers at which it fired."""

    means: NDArray[np.float64]
    """[M, L] totals / counts, 0 where the count is 0."""

    probs: NDArray[np.float64]
    """[M, L] P(layer | latent) = totals / total; 0 for a latent that never fired."""

    persistence: LatentPersistence
    """When it switches on and off, in the mean over its tokens."""


def latent_table(moments: LayerMoments) -> LatentTable:
    """From the sums over all tokens."""
    sums = moments.pooled()
    total = moments.totals.sum(axis=1)
    live = total > 0
    probs = ratio_or_zero(moments.totals, total[:, None], live[:, None])
    layer_mean, layer_var = profile_mean_and_variance(probs, moments.layers)
    count = moments.counts.sum(axis=1)
    between = np.maximum(sums[3] - ratio_or_zero(sums[1] ** 2, sums[0], live), 0.0)
    log_probs = np.log2(probs, out=np.zeros_like(probs), where=probs > 0)
    dead = np.where(live, 0.0, np.nan)
    return LatentTable(
        n_fired=count,
        n_tokens=np.rint(sums[4]).astype(np.int64),
        total=total,
        mean=ratio_or_zero(total, count, live) + dead,
        layer_mean=layer_mean + dead,
        layer_var=layer_var + dead,
        within_token=ratio_or_zero(sums[2], sums[0], live) + dead,
        between_tokens=ratio_or_zero(between, sums[0], live) + dead,
        entropy=np.abs((probs * log_probs).sum(axis=1)) + dead,
        n_layers_active=(moments.counts > 0).sum(axis=1),
        means=ratio_or_zero(moments.totals, moments.counts, moments.counts > 0),
        probs=probs,
        persistence=latent_persistence(moments.persistence, sums[4], moments.centre),
    )


def profile_mean_and_variance(
    probs: NDArray[np.float64], layers: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [M] and population variance [M] of the layer under profiles `probs` [M, L]; `layers` [L] are the model's
    layer numbers."""
    mean = probs @ layers.astype(np.float64)
    deviation = layers[None, :] - mean[:, None]
    return mean, (probs * deviation**2).sum(axis=1)
