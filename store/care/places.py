"""Check that shards' files lie where they belong: a file of another shard or store is intact by its own checksums.

How: the manifest has the hash of each shard's whole file, and for each layer the sum of its kept vectors' norms. The
norms of one layer tell a shard from any other, and reading them takes 1 / L of its bytes: 0.03 s a GB from the cache
with 30 layers, where the hash takes 0.25 s. With few layers the hash is faster, and is taken. A change that leaves a
chunk's crc32c and a layer's norms as they were is found by `residscope verify` alone, which compares all hashes.

Shapes: n chunks, L stored layers, D = d_model, C tokens in a chunk.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from store.activations import ActivationStore
from store.care.verify import require_intact
from store.checksums import DamagedError
from store.shards import shard_name

_HASHED_LAYERS = 4
"""With this many layers or fewer a shard's file is hashed: a layer's norms take 1 s a GB, the hash 0.25 s."""

_TOLERANCE = 1e-9
"""Relative, of a sum of norms: another writer may have added in another order, which changes 10^-15 of it for 30,000
vectors."""


def require_in_place(store: ActivationStore, chunk: np.ndarray, layer: np.ndarray, threads: int = 4) -> None:
    """Raise `DamagedError` unless the files of the shards of some inner chunks are those of their manifest lines.

    chunk: int64 [n], token chunks of the store; layer: int64 [n], stored layers, of which each shard's first is looked
    at. Shards that were found in place before are not looked at again.
    """
    shards, first = np.unique(chunk // store.meta.chunks_per_shard, return_index=True)
    todo = [(s, i) for s, i in zip(shards.tolist(), layer[first].tolist(), strict=True) if s not in store.in_place]
    if not todo:
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda one: _require(store, *one), todo))
    store.in_place.update(shard for shard, _ in todo)


def _require(store: ActivationStore, shard: int, layer: int) -> None:
    if store.meta.n_layers <= _HASHED_LAYERS:
        require_intact(store, shard)
        return
    expected = store.record(shard).norm_sums[layer]
    if not abs(_norm_sum(store, shard, layer) - expected) <= _TOLERANCE * expected:
        raise DamagedError(
            store.path / shard_name(shard),
            f"vector norms at layer {store.meta.layers[layer]} do not match the manifest: "
            "a valid file of another shard or store, or a rewritten one",
        )


def _norm_sum(store: ActivationStore, shard: int, layer: int) -> float:
    """Sum of the norms of a layer's kept vectors in a shard; a chunk at a time, so that memory stays small."""
    from store.pack import measure  # Imports numba, which other readers do without.

    size, (first, last) = store.meta.chunk_tokens, store.meta.shard_bounds(shard)
    unused = np.zeros((3, store.meta.d_model))
    total = 0.0
    for start in range(first, last, size):
        part = slice(start, min(start + size, last))
        rows = store.read(part, [layer])[:, 0]  # [C, D]
        total += measure(rows, store.tokens.keep[part], *unused)
    return total
