"""A random sample of the tokens at which each latent is active, to see what it means when it is not at its strongest.

The most active examples make a latent look more specific than it is. These are drawn uniformly from all tokens at which
it is active at some layer, and shown at the layer where it is most active.

How: each token has a random number for each latent, the same in every run, and the tokens with the smallest are kept;
so the sample does not depend on how tokens are grouped.

Shapes: T tokens, L layers, k active latents a vector, M n_latents, n sampled tokens of a latent.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.baselines.nulls import mixed
from analysis.latents.examples import MAX_EXAMPLES, Examples
from analysis.loops import compiled
from analysis.tiles import CodeTile

PER_LATENT = 8
"""Sampled tokens of each latent; fewer if that would give more than `MAX_EXAMPLES` in all."""

_NONE = np.iinfo(np.uint64).max
_mixed = compiled()(mixed)


@dataclass(frozen=True, kw_only=True)
class SampledTokens:
    """Sampled tokens of each latent, unsorted; each array [M, n]."""

    key: NDArray[np.uint64]
    activation: NDArray[np.float32]
    layer: NDArray[np.int64]
    token: NDArray[np.int64]
    """Position in the store; -1 for an empty place."""

    @classmethod
    def zeros(cls, n_latents: int) -> "SampledTokens":
        none = np.zeros((n_latents, max(1, min(PER_LATENT, MAX_EXAMPLES // n_latents))), np.int64)
        key, activation = np.full_like(none, _NONE, np.uint64), none.astype(np.float32)
        return cls(key=key, activation=activation, layer=none, token=none - 1)

    def add(self, codes: CodeTile) -> None:
        """Take more tokens into account, in place; each token only once."""
        values, indices = np.ascontiguousarray(codes.values), np.ascontiguousarray(codes.indices)
        keys = mixed(codes.token.astype(np.uint64))
        _draw(values, indices, codes.token, keys, self.key, self.activation, self.layer, self.token)

    def found(self, document: NDArray[np.integer]) -> Examples:
        """The sample, sorted by latent and rank (by activation, then by token). document: [tokens of the store]."""
        latent, place = np.nonzero(self.token >= 0)
        activation, token, layer = self.activation[latent, place], self.token[latent, place], self.layer[latent, place]
        order = np.lexsort((token, -activation, latent))
        rank = np.arange(len(order)) - np.searchsorted(latent, latent)  # latents ascend before and after sorting
        token = token[order]
        return Examples(latent, layer[order], rank, activation[order], token, document[token].astype(np.int64))


@compiled()
def _draw(values, indices, token, keys, best, activation, layer, kept):
    """Take the positive activations of T tokens, with random numbers `keys` uint64 [T], into their latents' samples.

    values float32 or float64 [T, L, k]; indices int64 [T, L, k]; token int64 [T]. Changed in place, each [M, n]: best
    uint64 (their keys), activation float32, layer int64, kept int64 (-1: none).
    """
    n_tokens, n_layers, k = values.shape
    for t in range(n_tokens):
        for at in range(n_layers):
            for i in range(k):
                value, j = np.float32(values[t, at, i]), indices[t, at, i]
                if value <= 0:
                    continue
                place = -1  # where the token is already kept, otherwise that of the largest key
                for o in range(best.shape[1]):
                    if kept[j, o] == token[t]:
                        place = o
                        break
                    if place < 0 or best[j, o] > best[j, place]:
                        place = o
                key = _mixed(keys[t] ^ np.uint64(j))
                if kept[j, place] == token[t]:
                    if value > activation[j, place]:
                        activation[j, place], layer[j, place] = value, at
                elif key < best[j, place]:
                    best[j, place], kept[j, place] = key, token[t]
                    activation[j, place], layer[j, place] = value, at
