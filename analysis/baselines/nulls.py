"""What chance alone would give: the same codes with their layers, or their tokens, permuted.

    layers_permuted   within each token, codes are permuted over the layers. Which latents share a token is kept; the
                      order of layers is lost, so any proximity or persistence that the observed numbers show beyond
                      this null is due to that order.
    tokens_permuted   within each layer, and separately for each, codes are permuted over the tokens of a chunk of the
                      store, so that none stays in place. Each latent's profile over layers stays exactly the same, and
                      with it the aggregate and between-latent variances by mass; the link between the layers of a
                      token is lost.

Permutations come from a hash of the seed, the token's position in the store and the layer, so they do not depend on the
grouping of shards or on the machine. A chunk is a run of neighbouring tokens, often of one document: the second null
keeps the effect of the passage and removes that of the token.

Shapes: T tokens of a tile, L layers.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.moments import LayerMoments, variance_numbers
from analysis.persistence import distributions, persistence_summary

Rows = NDArray[np.int64]


def permute_layers(seed: int, token: NDArray[np.int64], n_layers: int, chunk_tokens: int) -> Rows:
    """[T, L] which of the T * L vectors to use at each token and layer: one of the same token, randomly permuted."""
    order = np.argsort(_keys(seed, 0, token, n_layers), axis=1)
    return order + n_layers * np.arange(len(token))[:, None]


def permute_tokens(seed: int, token: NDArray[np.int64], n_layers: int, chunk_tokens: int) -> Rows:
    """[T, L] which of the T * L vectors to use at each token and layer: one of the same layer but of another token
    of the chunk, by a random cycle through the chunk's tokens per layer. A token alone in its chunk keeps its own."""
    keys = _keys(seed, 1, token, n_layers)
    source = np.empty(keys.shape, np.int64)
    chunk = token // chunk_tokens
    edges = [0, *(np.flatnonzero(np.diff(chunk)) + 1), len(token)]
    for start, stop in itertools.pairwise(edges):
        cycle = start + np.argsort(keys[start:stop], axis=0)  # [n, L]
        np.put_along_axis(source, cycle, np.roll(cycle, -1, axis=0), axis=0)
    return source * n_layers + np.arange(n_layers)


NULLS: Mapping[str, Callable[[int, NDArray[np.int64], int, int], Rows]] = {
    "layers_permuted": permute_layers,
    "tokens_permuted": permute_tokens,
}
"""name -> rows(seed, token [T] ascending positions in the store, n_layers, chunk_tokens)."""


def _keys(seed: int, stream: int, token: NDArray[np.int64], n_layers: int) -> NDArray[np.uint64]:
    """[T, L] numbers that look random: SplitMix64 (Steele et al. 2014) over seed, stream, token and layer in turn."""
    state = mixed(np.full(1, (2 * seed + stream) % 2**64, np.uint64))
    state = mixed(state ^ token.astype(np.uint64))
    return mixed(state[:, None] ^ np.arange(n_layers, dtype=np.uint64))


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64: maps each number to one that looks random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def null_numbers(variance: Mapping[str, Any], persistence: Mapping[str, Any], null: LayerMoments) -> dict[str, Any]:
    """Numbers of one null, and observed / null: what `nulls` in summary.json holds under its name.

    variance, persistence: the summary's own `variance` and `persistence`. The ratio's interval is the observed one
    divided by the null's value, which is taken as exact: it comes from equally many tokens.
    """
    null_variance, null_persistence = variance_numbers(null.pooled()), persistence_summary(null)
    return {
        "variance": null_variance,
        "persistence": null_persistence,
        "distributions": distributions(null),
        "ratio": {
            "variance": {w: _ratios(variance[w], numbers) for w, numbers in null_variance.items()},
            "persistence": {w: _ratios(persistence[w], numbers) for w, numbers in null_persistence.items()},
        },
    }


def _ratios(observed: Mapping[str, Any], null: Mapping[str, float | None]) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for name, value in null.items():
        ratios[name] = observed[name] / value if value and observed[name] is not None else None
        if name in observed["ci95"]:
            bounds = observed["ci95"][name]
            intervals[name] = [bound / value for bound in bounds] if value and bounds else None
    return {**ratios, "ci95": intervals}
