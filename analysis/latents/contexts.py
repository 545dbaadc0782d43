"""Whether a latent means the same at each layer: how well the tokens at which it is most active agree between layers.

The top contexts of a latent at a layer are the n tokens at which it is most active there, if it fired at n or more
tokens at that layer. For two such layers of a latent

    overlap   share of one layer's top contexts that are also the other's
    chance    n / tokens at which the latent fired at any layer: the mean overlap if, at each layer, the latent's
              activations fell at random on the tokens at which it fires at all

so overlap / chance says how many times better the layers agree than those of a latent that fires at the same tokens
but ranks them at random at each layer. Chance keeps the tokens at which the latent fires, because a latent that fires
rarely agrees with itself for that reason alone. All pairs of layers count, and are also grouped by distance.

Shapes: M n_latents, L layers, n contexts.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.quality import defined, ratio

N_CONTEXTS = 5
"""Top contexts of a latent at a layer."""

MAX_CONTEXTS = 2**23
"""Most contexts in all: with many latents and layers, fewer than `N_CONTEXTS` are kept, but at least two."""


class ContextAgreement(NamedTuple):
    """Agreement of top contexts between layers."""

    overlap: NDArray[np.float64]
    """[M] mean over pairs of layers; NaN if fewer than two layers have n contexts."""
    chance: NDArray[np.float64]
    """[M] the same by chance; NaN if there is no overlap."""
    by_distance: NDArray[np.float64]
    """[L - 1] mean over all latents' pairs of layers that are 1 .. L - 1 analysed layers apart; NaN without any."""
    chance_by_distance: NDArray[np.float64]
    """[L - 1] the same by chance."""
    n: int
    """Contexts of a latent at a layer."""


def contexts_per_layer(n_latents: int, n_layers: int) -> int:
    """How many contexts of each latent are kept at each layer."""
    return max(2, min(N_CONTEXTS, MAX_CONTEXTS // (n_latents * n_layers)))


def context_agreement(token: NDArray[np.int64], n_tokens: NDArray[np.int64]) -> ContextAgreement:
    """From the top contexts `token` [M, L, n] (-1 for an empty place) and the number of tokens at which each latent
    fired at any layer, `n_tokens` [M]."""
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
    """Means over the latents that have an overlap, weighted equally; None for a number that is not defined."""
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
