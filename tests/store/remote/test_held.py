"""Shards that are kept in memory: fetched once and whole, and what is read is the same."""

from typing import Any

import numpy as np
import pytest

from residscope.urls import URL
from store.activations import ActivationStore
from store.remote import objects
from store.remote.held import held_bytes, hold
from tests.support.stores import make_meta, make_store, random_activations

X = random_activations(200, 8, 16)
SIZES: dict[str, Any] = {"chunk_tokens": 16, "shard_tokens": 32}
META = make_meta(200, 8, 16, **SIZES)


@pytest.mark.parametrize("n_held", [7, 2])
def test_held_shards_are_fetched_once_and_whole(s3: str, monkeypatch: pytest.MonkeyPatch, n_held: int) -> None:
    make_store(s3, X, **SIZES)
    store, asked, get = ActivationStore.open(s3), list[tuple[str, int]](), URL.get
    sizes = [store.record(shard).bytes for shard in range(META.n_shards)]
    hold(store, sum(sizes[:n_held]))
    assert held_bytes(store) == sum(sizes[:n_held])

    def counted(self: URL, start: int = 0, stop: int | None = None, *more: Any, **options: Any) -> Any:
        asked.append((self.name, (stop or 0) - start))
        return get(self, start, stop, *more, **options)

    monkeypatch.setattr(URL, "get", counted)
    monkeypatch.setattr(objects, "_TAIL_BYTES", 1200)  # The index and little more.
    chunk, layer = np.divmod(np.random.default_rng(0).permutation(META.n_chunks * 8), 8)
    found = np.empty((len(chunk), 16, 16), np.uint16)
    for _ in range(2):  # epochs
        for part in np.split(np.arange(len(chunk)), 4):  # windows
            out = np.empty((len(part), 16, 16), np.uint16)
            store.read_blocks(chunk[part], layer[part], out)
            found[part] = out
    whole = store.read(raw=True)
    for block, at, layer_ in zip(found, chunk * 16, layer, strict=True):
        expected = whole[at : at + 16, layer_]
        assert np.array_equal(block[: len(expected)], expected)
    for shard in range(META.n_shards):
        of_shard = [n for name, n in asked if name == f"c.{shard}.0.0"]
        assert (of_shard.count(sizes[shard]) == 1 and len(of_shard) == 2) == (shard < n_held)
