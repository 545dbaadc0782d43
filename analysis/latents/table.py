"""Statistics of each latent over all layers: the columns of latents.parquet that are computed from the sums.

They are those that the reference publishes as its `-dists` data sets, the latent's own two parts of the variance,
persistence, and its kind, which depends on its profile P(layer | latent):

    persistent   2^entropy, the number of layers in a uniform profile with this entropy, is at least two thirds of all
    bimodal      two groups of layers with a valley between them: a layer with at most half of the highest share before
                 it and of the highest after it, at least a quarter of the mass on either side of it, and mean layers
                 of the two sides that are at least a quarter of all layers apart
    early, middle, late
                 the mean layer lies in the first, second or last third of the depth

The first rule that applies decides; a latent that never fired has no kind. Depth is the position among the analysed
layers, 0 at the first and 1 at the last. Profiles are shares of activation mass, not of counts.

Shapes: M n_latents, L layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.moments import LayerMoments
from analysis.persistence import LatentPersistence, latent_persistence
from analysis.quality import ratio_or_zero

KINDS = ("early", "middle", "late", "persistent", "bimodal")

PERSISTENT_SHARE = 2 / 3
"""Minimum of 2^entropy, as a share of all layers."""

VALLEY = 0.5
"""Maximum in a valley, as a share of the lower peak."""

SIDE_MASS = 0.25
"""Minimum mass on either side of the valley."""

SIDE_DISTANCE = 0.25
"""Minimum distance between the two sides' mean layers, as a share of all layers."""


class LatentTable(NamedTuple):
    """Statistics of each latent over all layers; NaN if it never fired."""

    n_fired: NDArray[np.int64]
    """[M] (token, layer) pairs at which it fired."""
    n_tokens: NDArray[np.int64]
    """[M] tokens at which it fired at one or more layers."""
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
    """[M] entropy of P(layer | latent), in bits."""
    n_layers_active: NDArray[np.int64]
    """[M] layers at which it fired."""
    means: NDArray[np.float64]
    """[M, L] totals / counts, 0 where the count is 0."""
    probs: NDArray[np.float64]
    """[M, L] P(layer | latent) = totals / total; 0 for a latent that never fired."""
    persistence: LatentPersistence
    """When it switches on and off, averaged over its tokens."""

    @property
    def kinds(self) -> Sequence[str | None]:
        """[M] each latent's kind, one of `KINDS` or None."""
        return profile_kinds(self.probs, self.entropy)


def latent_table(moments: LayerMoments) -> LatentTable:
    """The table from the sums over all tokens."""
    sums = moments.pooled()
    total = moments.totals.sum(axis=1)
    live = total > 0
    probs = ratio_or_zero(moments.totals, total[:, None], live[:, None])
    layers = moments.layers.astype(np.float64)
    layer_mean = probs @ layers
    layer_var = (probs * (layers - layer_mean[:, None]) ** 2).sum(axis=1)
    count = moments.counts.sum(axis=1)
    # As in `analysis.moments.variances`, for each latent by itself.
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
        persistence=latent_persistence(moments),
    )


def profile_kinds(probs: NDArray[np.float64], entropy: NDArray[np.float64]) -> Sequence[str | None]:
    """The kind of each latent, from its profile [M, L] (rows sum to 1, or to 0: no kind) and entropy in bits [M]."""
    n_layers = probs.shape[1]
    live = probs.sum(axis=1) > 0
    depth = probs @ np.linspace(0, 1, n_layers)
    kinds = np.where(depth < 1 / 3, "early", np.where(depth > 2 / 3, "late", "middle")).astype(object)
    kinds[_bimodal(probs)] = "bimodal"
    persistent = np.exp2(np.where(live, entropy, 0.0)) >= PERSISTENT_SHARE * n_layers * (1 - 1e-9)
    kinds[persistent] = "persistent"
    kinds[~live] = None
    return kinds.tolist()


def _bimodal(probs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[M] whether some layer is a valley between two sides."""
    n_layers = probs.shape[1]
    position = np.arange(n_layers)
    found = np.zeros(len(probs), bool)
    mass, moment = np.cumsum(probs, axis=1), np.cumsum(probs * position, axis=1)
    for v in range(1, n_layers - 1):
        before, after = probs[:, :v], probs[:, v + 1 :]
        left, right = mass[:, v - 1], mass[:, -1] - mass[:, v]
        sides = (left >= SIDE_MASS) & (right >= SIDE_MASS)
        valley = probs[:, v] <= VALLEY * np.minimum(before.max(axis=1), after.max(axis=1))
        with np.errstate(invalid="ignore", divide="ignore"):
            distance = (moment[:, -1] - moment[:, v]) / right - moment[:, v - 1] / left
            found |= sides & valley & (distance >= SIDE_DISTANCE * n_layers)
    return found
