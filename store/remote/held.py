"""Keeps whole shards of a store at a URL in memory: each is fetched once, in large requests, when first read."""

import numpy as np

from residscope.urls import URL
from store.activations import ActivationStore
from store.remote.objects import HELD
from store.shards import shard_name


def hold(store: ActivationStore, n_bytes: int) -> None:
    """Keep as many shards as fit in n_bytes; the others are read chunk by chunk. Does nothing for a store on a disk,
    which the system caches."""
    there = sorted({*range(store.meta.n_shards)} - {*store.missing_shards()}) if isinstance(store.path, URL) else []
    sizes = {store.path / shard_name(shard): store.record(shard).bytes for shard in there}
    n_held = int(np.searchsorted(np.cumsum([*sizes.values()]), n_bytes, side="right"))
    store.objects[HELD] = dict([*sizes.items()][:n_held])


def held_bytes(store: ActivationStore) -> int:
    """Bytes of the shards that are kept once they have been read."""
    return sum(store.objects.get(HELD, {}).values())
