"""A store's vectors as a dask array, chunked as the store is, for analyses of one's own.

How: one dask chunk is a whole shard, read and checked as `ActivationStore.read` does, as float32, tokens that are not
kept left out. A task carries the store, which pickles as its path and content hash, so that it runs anywhere that sees
the folder, and on this store only; no cache takes another store's tasks for these.

Shapes: K kept tokens, l layers asked for, D = d_model.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from store.activations import ActivationStore

if TYPE_CHECKING:
    import dask.array


def dask_array(path: str | os.PathLike[str], layers: slice | Sequence[int] | None = None) -> "dask.array.Array":
    """The kept tokens' vectors of the store at `path`: float32 [K, l, D], a chunk for each shard with such tokens.

    layers: stored layers, 0..L-1; default all. `ActivationStore.open(path).tokens` has what is known of each token; its
    `keep` says which are here. `IncompatibleError` at once when a shard is missing; on computing where one is damaged.
    """
    import dask.array as da
    from dask.delayed import delayed

    store = ActivationStore.open(path)
    meta, keep = store.meta, store.tokens.keep
    n_layers = len(meta.layer_indices(layers))
    read = delayed(_read_kept, pure=True)
    chunks = []
    for shard in range(meta.n_shards):
        kept = keep[slice(*meta.shard_bounds(shard))]
        if kept.any():
            values = read(store, shard, layers, kept)
            chunks.append(da.from_delayed(values, (int(kept.sum()), n_layers, meta.d_model), np.float32))
    if not chunks:
        return da.zeros((0, n_layers, meta.d_model), dtype=np.float32)
    return da.concatenate(chunks, axis=0)


def _read_kept(store: ActivationStore, shard: int, layers: slice | Sequence[int] | None, kept: np.ndarray) -> Any:
    """Kept vectors of a shard, an array."""
    return store.read(slice(*store.meta.shard_bounds(shard)), layers)[kept]
