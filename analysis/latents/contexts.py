"""Whether a latent means the same at each layer: how far the tokens at which it is most active agree between layers.

The top contexts of a latent at a layer are the n tokens at which it is most active there; they are defined where it
fired at n tokens of the layer at least. Of two such layers of a latent

    overlap   share of one layer's top contexts that are the other's too
    chance    n / tokens at which the latent fired at any layer: the mean overlap if, at each layer, the latent's
              activations were put at random on the tokens at which it fires at all

so overlap / chance says how many times better the layers agree than a latent would that fires at the same tokens and
ranks them at random at each layer. At which tokens a latent fires is kept, because a latent that fires rarely agrees
with itself for that reason alone. All pairs of layers count, also grouped by their distance.

Shapes: M n_latents, L layers, n contexts.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.quality import defined, ratio

N_CONTEXTS = 5
"""Top contexts of a latent at a layer."""

MAX_CONTEXTS = 2**23
"""With so many latents and layers that there would be more, fewer are kept of each, at least two."""


class ContextAgreement(NamedTuple):
    """Agreement of top contexts between layers."""

    overlap: NDArray[np.float64]
    """[M] mean over the pairs of layers; NaN with fewer than two layers that have n contexts."""
    chance: NDArray[np.float64]
    """[M] the same by chance, where there is an overlap."""
    by_distance: NDArray[np.float64]
    """[L - 1] mean over all pairs of layers of all latents that are 1 .. L - 1 analysed layers apart; NaN without."""
    chance_by_distance: NDArray[np.float64]
    """[L - 1] of the same pairs."""
    n: int
    """Contexts of a latent at a layer."""


def contexts_per_layer(n_latents: int, n_layers: int) -> int:
    """How many are kept of each latent at each layer."""
    return max(2, min(N_CONTEXTS, MAX_CONTEXTS // (n_latents * n_layers)))


def context_agreement(token: NDArray[np.int64], n_tokens: NDArray[np.int64]) -> ContextAgreement:
    """From the top contexts token [M, L, n] (-1: fewer) and the tokens at which a latent fired at any layer [M]."""
    n_latents, n_layers, n = token.shape
    shared, pairs = np.zeros((2, n_latents, n_layers), np.int64)  # tokens, pairs of layers by distance; column 0: 0
    has = np.all(token >= 0, axis=2)
    for distance in range(1, n_layers):
        both = has[:, :-distance] & has[:, distance:]
        same = token[:, :-distance, :, None] == token[:, distance:, None]  # [M, L - distance, n, n]
        shared[:, distance] = (both * np.count_nonzero(same, axis=(2, 3))).sum(axis=1)
        pairs[:, distance] = both.sum(axis=1)
    of_latent, of_distance = pairs.sum(axis=1), pairs.sum(axis=0)
    chance = ratio(np.full(n_latents, float(n)), n_tokens)
    expected = np.where(pairs > 0, pairs * chance[:, None], 0.0).sum(axis=0)
    return ContextAgreement(
        overlap=ratio(shared.sum(axis=1) / n, of_latent),
        chance=np.where(of_latent > 0, chance, np.nan),
        by_distance=ratio(shared.sum(axis=0) / n, of_distance)[1:],
        chance_by_distance=ratio(expected, of_distance)[1:],
        n=n,
    )


def agreement_summary(found: ContextAgreement) -> dict[str, Any]:
    """Means over the latents that have an overlap, each counting once; None for what is not defined."""
    some = ~np.isnan(found.overlap)
    overlap, chance = (float(of[some].mean()) if some.any() else None for of in (found.overlap, found.chance))
    return {
        "n": found.n,
        "latents": int(some.sum()),
        "overlap": overlap,
        "chance": chance,
        "overlap_over_chance": overlap / chance if overlap is not None and chance else None,
        "overlap_by_distance": [defined(x) for x in found.by_distance],
        "chance_by_distance": [defined(x) for x in found.chance_by_distance],
    }
