"""Finds a few tokens that carry much of a layer's variance, so that means, training and FVU depend on them.

Attention sinks in mid-sequence are an example: some models give a few tokens norms of a hundred times the median. A
token's share is its squared distance from the layer's mean. All chosen tokens are examined; in a large store, those in
chunks spread evenly over a few shards (512 MiB of vectors), because every shard that is opened is checked: a second or
two for a store of any size. Defined in docs/method.md. Shapes: n tokens examined, L layers examined.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from residscope.console import counted
from residscope.errors import ResidscopeError
from store.activations import ActivationStore

FEWEST, ONE_IN = 100, 1000  # Nothing is reported below 100 tokens; "few" is one in 1,000.
MUCH = 0.1  # Share of a layer's sum of squared distances.
FAR = 5  # Distance from the mean, in medians, beyond which a token is counted.
_MOST_BYTES = 512 * 2**20
_OPENED = 8  # The opened shards may have 8 times as many bytes.


class FewTokens(NamedTuple):
    """Few tokens that carry much of a layer's variance."""

    words: str
    tokens: tuple[int, ...]
    """Their places in the store."""


def few_tokens(
    store: ActivationStore,
    chosen: np.ndarray,
    texts: Callable[[list[int]], Sequence[str]] | None = None,
    layers: Sequence[int] | None = None,
) -> FewTokens | None:
    """The few of the kept tokens `chosen` (bool [T]) that carry more than a tenth of a layer's variance, at the layer
    where their share is largest, or None. texts: turns token ids into text, for the message; may raise
    `ResidscopeError`. layers: stored layers; default all."""
    meta, size = store.meta, store.meta.chunk_tokens
    chunks = np.flatnonzero(np.logical_or.reduceat(chosen, np.arange(0, len(chosen), size)))
    shards, most = chunks // meta.chunks_per_shard, max(_MOST_BYTES // (size * meta.bytes_per_token), 1)
    opened = _spread(np.unique(shards), max(_OPENED * most // meta.chunks_per_shard, 1))
    chunks = _spread(chunks[np.isin(shards, opened)], most)
    places = [start + np.flatnonzero(chosen[start : start + size]) for start in (chunks * size).tolist()]
    n = sum(map(len, places))
    if n < FEWEST:
        return None
    layers = range(meta.n_layers) if layers is None else layers
    mean = store.statistics().mean
    distance, norm = np.empty((2, n, len(layers)))  # both squared
    done = 0
    for place in places:
        rows = store.read(slice(int(place[0]), int(place[-1]) + 1), layers)[place - place[0]]
        part = slice(done, done := done + len(place))
        for i, layer in enumerate(layers):
            x = rows[:, i].astype(np.float64)
            norm[part, i] = np.einsum("nd,nd->n", x, x)
            x -= mean[layer]
            distance[part, i] = np.einsum("nd,nd->n", x, x)
    few = -(-n // ONE_IN)
    total, largest = distance.sum(0), np.partition(distance, -few, axis=0)[-few:].sum(0)
    with np.errstate(invalid="ignore"):
        worst = int(np.argmax(largest / np.maximum(total, np.finfo(float).tiny)))
    d = distance[:, worst]
    far = np.flatnonzero(d > FAR**2 * np.median(d))
    # False for NaN, too: whatever uses the vectors reports it.
    if not min(largest[worst], d[far].sum()) > MUCH * total[worst]:
        return None
    ratio = np.sqrt(norm[far, worst].min() / max(np.median(norm[:, worst]), np.finfo(float).tiny))
    tokens = np.concatenate(places)[far]
    most_common = dict(Counter(store.tokens.token_id[tokens].tolist()).most_common(5))
    names = [f"id {i}" for i in most_common]
    with contextlib.suppress(ResidscopeError):
        names = names if texts is None else [repr(text) for text in texts([*most_common])]
    named = ", ".join(f"{name} {count:,} x" for name, count in zip(names, most_common.values(), strict=True))
    factor = int(min(ratio, 10))
    way_out = f"; `harvest --mask-norm {factor}` leaves out tokens of more than {factor} times the median norm"
    words = (
        f"{100 * d[far].sum() / d.sum():.0f} % of the variance of layer {meta.layers[layers[worst]]} is in "
        f"{counted(len(far), 'token')} of {n:,} examined, probably attention sinks: {named}. FVU depends strongly on "
        f"them (norms of at least {ratio:.3g} times the median)" + way_out * (factor > 1)
    )
    return FewTokens(words, tuple(tokens.tolist()))


def _spread(found: np.ndarray, most: int) -> np.ndarray:
    """At most `most` elements of `found`, evenly spaced."""
    return found[np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)]
