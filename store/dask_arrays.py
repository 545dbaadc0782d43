"""A store's vectors as a dask array, chunked by shard, for your own analyses.

How: one dask chunk is the kept tokens of a whole shard as float32, read and checked by `ActivationStore.read`. A task
carries the store, which pickles as its path and content hash, so that it runs on any machine that sees the folder, and
on this store only; no cache confuses it with a task of another store.

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
    """The kept tokens' vectors of the store at `path`: float32 [K, l, D], one chunk for each shard with kept tokens.

    layers: stored layers, 0..L-1; default all. `ActivationStore.open(path).tokens` describes each token; its `keep`
    says which are included. `IncompatibleError` at once when a shard is missing, and on computing one that is damaged.
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
    """The kept vectors of a shard."""
    return store.read(slice(*store.meta.shard_bounds(shard)), layers)[kept]
