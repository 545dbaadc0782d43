"""Shards: the same bytes however they are given, no value that cannot be stored, and no byte that is not checked."""

import os
from pathlib import Path

import numpy as np
import pytest

from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from store.activations import ActivationStore
from store.checksums import DamagedError
from store.dtypes import from_float32, to_float32
from store.manifest import FILE
from store.shards import ShardReader
from tests.support.stores import make_meta, make_store, random_activations, token_table


def test_layer_major_data_and_threads_give_the_same_bytes(tmp_path: Path) -> None:
    x = random_activations(100, 3, 9)
    forms = {
        "plain": (x, 1),
        "threads": (x, 2),
        "layer_major": (np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2), 1),
        "strided": (np.repeat(x, 2, axis=2)[:, :, ::2], 5),
        "rounded": (from_float32(x, "bfloat16"), 2),
    }
    meta, tokens = make_meta(100, 3, 9, chunk_tokens=16, shard_tokens=112), token_table(100)
    files = {}
    for name, (data, threads) in forms.items():
        with ActivationStore.create(tmp_path / name, meta, tokens) as store:
            store.write_shard(0, data, tokens.keep, threads=threads)
        files[name] = [
            (tmp_path / name / file).read_bytes() for file in ("resid_post/c.0.0.0", "shard_moments/c.0.0.0.0", FILE)
        ]
    assert all(found == files["plain"] for found in files.values())


@pytest.mark.parametrize(
    ("stored_dtype", "value"), [("bfloat16", np.nan), ("bfloat16", 3.4e38), ("float16", 70000), ("float32", -np.inf)]
)
def test_a_value_that_cannot_be_stored_is_named_and_nothing_is_written(
    tmp_path: Path, stored_dtype: str, value: float
) -> None:
    meta = make_meta(60, 2, 4, layers=(3, 5), chunk_tokens=16, shard_tokens=32, stored_dtype=stored_dtype)
    with ActivationStore.create(tmp_path / "a.zarr", meta, token_table(60)) as store:
        x = random_activations(28, 2, 4)
        x[9, 1, 2] = value
        with pytest.raises(ResidscopeError, match=r"layer 5, token 41, dimension 2"):
            store.write_shard(1, x)
        assert [p.name for p in (tmp_path / "a.zarr/resid_post").iterdir()] == ["zarr.json"]
        assert store.missing_shards() == [0, 1]
        x[9, 1, 2] = 0
        store.write_shard(1, x)
        assert store.missing_shards() == [0]


def test_wrong_shards_are_refused(tmp_path: Path) -> None:
    meta, tokens = make_meta(60, 2, 4, chunk_tokens=16, shard_tokens=32), token_table(60)
    x = random_activations(60, 2, 4)
    with ActivationStore.create(tmp_path / "a.zarr", meta, tokens) as store:
        with pytest.raises(UsageError, match="shape"):
            store.write_shard(0, x[:31])
        with pytest.raises(UsageError, match="float64"):
            store.write_shard(0, x[:32].astype(np.float64))
        with pytest.raises(UsageError, match="keep"):
            store.write_shard(0, x[:32], ~tokens.keep[:32])
        with pytest.raises(IndexError):
            store.write_shard(2, x[:32])
        store.write_shard(0, x[:32])
        with pytest.raises(UsageError, match="written already"):
            store.write_shard(0, x[:32])
        with pytest.raises(IncompatibleError, match="1 of 2"):
            store.finalize()


def test_systems_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_activations(60, 2, 4)
    store = make_store(tmp_path / "a.zarr", x, chunk_tokens=16, shard_tokens=32)
    monkeypatch.delattr("os.preadv")
    assert np.array_equal(
        ActivationStore.open(tmp_path / "a.zarr").read(), to_float32(from_float32(x, "bfloat16"), "bfloat16")
    )
    file = tmp_path / "a.zarr/resid_post/c.1.0.0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ResidscopeError, match="should have"):
        store.read()


def test_a_file_that_is_cut_off_while_it_is_read_raises(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.zarr", random_activations(60, 2, 4), chunk_tokens=16, shard_tokens=32)
    file = tmp_path / "a.zarr/resid_post/c.0.0.0"
    with ShardReader(file, store.meta, store.record(0).bytes) as reader:
        out = np.zeros(16 * 4 * 2, np.uint8)
        reader.read_chunk(0, 0, out)
        os.truncate(file, 0)
        with pytest.raises(DamagedError, match="checksum of token chunk 0 at stored layer 0 does not match"):
            reader.read_chunk(0, 0, out)
    with pytest.raises(DamagedError, match=r"should have .* bytes and has 0"):
        store.read()


def test_every_byte_of_a_chunk_and_of_its_checksum_counts(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.zarr", random_activations(150, 3, 13), chunk_tokens=8, shard_tokens=24)
    chunk, layer = (part.reshape(-1) for part in np.indices((store.meta.n_chunks, 3)))
    out = np.empty((len(chunk), 8, 13), np.uint16)
    file = tmp_path / "a.zarr/resid_post/c.2.0.0"
    data = file.read_bytes()
    slot_bytes = 8 * 13 * 2 + 4
    for at in range(4 * slot_bytes, 5 * slot_bytes):  # token chunk 1 of the shard, layer 1
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        file.write_bytes(broken)
        with pytest.raises(DamagedError, match="checksum of token chunk 1 at stored layer 1 does not"):
            store.read_blocks(chunk, layer, out, threads=2)
    file.write_bytes(data)
    store.read_blocks(chunk, layer, out, threads=2)
    assert np.array_equal(out[-1][: 150 % 8], store.read(slice(144, 150), [2], raw=True)[:, 0])
