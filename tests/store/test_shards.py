"""Shards: the same bytes however they are given, no value that cannot be stored, and no byte that is not checked."""

import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from store.activations import ActivationStore
from store.checksums import DamagedError
from store.dtypes import STORAGE_DTYPE, from_float32, to_float32
from store.loader import WindowLoader
from store.manifest import FILE
from store.shards import ShardReader, shard_name
from tests.support.faults import files_of
from tests.support.stores import make_meta, make_store, random_activations, token_table
from tests.support.training import train_config
from train.compare.cli import main as compare
from train.run import train

WAYS = [
    *({"stored_dtype": dtype, "codec": "none"} for dtype in ("bfloat16", "float16", "float32")),
    {"stored_dtype": "bfloat16", "codec": "zstd"},
]


def test_layer_major_data_gives_the_same_bytes(tmp_path: Path) -> None:
    x = random_activations(100, 3, 9)
    forms = {
        "plain": x,
        "layer_major": np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2),
        "strided": np.repeat(x, 2, axis=2)[:, :, ::2],
        "rounded": from_float32(x, "bfloat16"),
    }
    meta, tokens = make_meta(100, 3, 9, chunk_tokens=16, shard_tokens=112), token_table(100)
    files = {}
    for name, data in forms.items():
        with ActivationStore.create(tmp_path / name, meta, tokens) as store:
            store.write_shard(0, data, tokens.keep)
        files[name] = [
            (tmp_path / name / file).read_bytes() for file in ("resid_post/c.0.0.0", "shard_moments/c.0.0.0.0", FILE)
        ]
    assert all(found == files["plain"] for found in files.values())


def test_shards_that_several_threads_write_at_once_are_those_of_one(tmp_path: Path) -> None:
    x, hashes = random_activations(900, 3, 9), []
    meta, tokens = make_meta(900, 3, 9, chunk_tokens=8, shard_tokens=16), token_table(900)
    for threads in (1, 8):
        with (
            ActivationStore.create(tmp_path / f"{threads}", meta, tokens) as store,
            ThreadPoolExecutor(threads) as pool,
        ):
            parts = ((shard, x[slice(*meta.shard_bounds(shard))]) for shard in range(meta.n_shards))
            for written in [pool.submit(store.write_shard, *part) for part in parts]:
                written.result()
            store.finalize()
        with ActivationStore.open(tmp_path / f"{threads}") as store:
            assert not store.missing_shards()
            hashes.append(store.content_hash)
            np.testing.assert_array_equal(
                store.read(slice(0, 900)), to_float32(from_float32(x, "bfloat16"), "bfloat16")
            )
    assert hashes[0] == hashes[1]


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
        raw = np.zeros(x.shape, STORAGE_DTYPE[stored_dtype])
        raw[9, 1, 2] = 0x7F80 if stored_dtype == "bfloat16" else np.inf
        for data in (x, raw):
            with pytest.raises(ResidscopeError, match=r"layer 5, token 41, dimension 2"):
                store.write_shard(1, data)
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
        with pytest.raises(UsageError, match="already been written"):
            store.write_shard(0, x[:32])
        with pytest.raises(IncompatibleError, match="1 of 2"):
            store.finalize()


def test_a_file_that_is_cut_off_while_it_is_read_raises(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.zarr", random_activations(60, 2, 4), chunk_tokens=16, shard_tokens=32)
    file = tmp_path / "a.zarr/resid_post/c.0.0.0"
    with ShardReader(file, store.meta, store.record(0).bytes) as reader:
        out = np.zeros(16 * 4 * 2, np.uint8)
        reader.read_chunk(0, 0, out)
        os.truncate(file, 0)
        with pytest.raises(DamagedError, match="checksum of token chunk 0 at stored layer 0 does not match"):
            reader.read_chunk(0, 0, out)
    with pytest.raises(DamagedError, match=r"should have .* bytes, found 0"):
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


def make(path: Path, n_layers: int, seed: int = 0, **changes: Any) -> ActivationStore:
    """5 shards of 64 tokens, the last of them short; of the second none is kept."""
    keep = np.arange(300) % 16 != 0
    keep[64:128] = False
    values = random_activations(300, n_layers, 12, seed=seed)
    return make_store(path, values, keep=keep, chunk_tokens=32, shard_tokens=64, **changes)


def swap(store: ActivationStore, one: int, other: int) -> None:
    first, second = (store.path / shard_name(shard) for shard in (one, other))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def check(path: Path, layer: int = 0) -> None:
    """Read something of each shard."""
    store = ActivationStore.open(path)
    store.read(layers=[layer])


@pytest.mark.parametrize("changes", WAYS)
@pytest.mark.parametrize("n_layers", [1, 4, 5, 7])
def test_what_is_in_its_place_is_never_refused(tmp_path: Path, n_layers: int, changes: dict[str, Any]) -> None:
    store = make(tmp_path / "a.zarr", n_layers, **changes)
    for layer in range(n_layers):
        check(store.path, layer)


@pytest.mark.parametrize("n_layers", [1, 4, 5, 7])
def test_swapped_shards_are_found_at_every_layer(tmp_path: Path, n_layers: int) -> None:
    store = make(tmp_path / "a.zarr", n_layers)
    swap(store, 2, 3)
    for layer in range(n_layers):
        with pytest.raises(DamagedError, match=r"c\.[23]\.0\.0: .* a valid file of another shard or store"):
            check(store.path, layer)
    swap(store, 2, 3)
    check(store.path)


@pytest.mark.parametrize("n_layers", [3, 6])
def test_a_shard_of_another_store_is_found(tmp_path: Path, n_layers: int) -> None:
    store, other = make(tmp_path / "a.zarr", n_layers), make(tmp_path / "b.zarr", n_layers, seed=1)
    (store.path / shard_name(3)).write_bytes((other.path / shard_name(3)).read_bytes())
    with pytest.raises(DamagedError, match=r"c\.3\.0\.0: .*a valid file of another"):
        check(store.path)


def test_a_shard_is_held_against_its_line_once_and_by_two_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(tmp_path / "a.zarr", 8)
    require_own, norm_sum = ShardReader.require_own, ShardReader._norm_sum
    seen: list[tuple[str, int]] = []
    looking: list[str] = []

    def requiring(self: ShardReader, *arguments: Any) -> None:
        looking[:] = [self._path.name]
        require_own(self, *arguments)

    def adding(self: ShardReader, layer: int, keep: np.ndarray) -> float:
        seen.append((looking[0], layer))
        return norm_sum(self, layer, keep)

    monkeypatch.setattr(ShardReader, "require_own", requiring)
    monkeypatch.setattr(ShardReader, "_norm_sum", adding)
    loader = WindowLoader(store, store.tokens.keep, 50, 0, 4096, epochs=2, threads=1)
    assert sum(len(batch.rows) for batch in loader) == 2 * 8 * int(store.tokens.keep.sum())
    # Of shard 1 nothing is kept, and nothing is read.
    assert sorted(seen) == [(f"c.{shard}.0.0", layer) for shard in (0, 2, 3, 4) for layer in (4, 7)]


@pytest.mark.parametrize("n_layers", [3, 7])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_exchanged_after_the_first_look_is_found(tmp_path: Path, n_layers: int, in_place: bool) -> None:
    """The whole store by its name, or the bytes of its files, which are intact and of the same size."""
    store, other = make(tmp_path / "a.zarr", n_layers), make(tmp_path / "b.zarr", n_layers, seed=1)
    held = ActivationStore.open(store.path)
    before = held.read()
    if in_place:
        for shard in range(5):
            (store.path / shard_name(shard)).write_bytes((other.path / shard_name(shard)).read_bytes())
    else:
        store.path.rename(tmp_path / "away.zarr")
        other.path.rename(store.path)
    blocks = np.empty((1, 32, 12), np.uint16)
    for token in (0, 130, 299):
        with pytest.raises(DamagedError, match="replaced while it was in use"):
            held.read(slice(token, token + 1), [1])
        with pytest.raises(DamagedError, match="replaced while it was in use"):
            held.read_blocks(np.array([token // 32]), np.array([0]), blocks)
    with pytest.raises(DamagedError, match="wrong hash: a valid file of another shard or store"):
        held.require_intact(0)
    with pytest.raises(IncompatibleError, match="a valid file of another" if in_place else "content hash should be"):
        ActivationStore.open(store.path, content_hash=held.content_hash).read()
    if not in_place:
        with pytest.raises(DamagedError, match="its numbers do not match the shards, or are another store's"):
            held.statistics()
        with pytest.raises(DamagedError, match="it belongs to another shard or store"):
            held.merged_statistics()
        store.path.rename(other.path)
        (tmp_path / "away.zarr").rename(store.path)
        assert np.array_equal(held.read(), before)


def test_a_store_that_is_unpickled_is_the_same_one(tmp_path: Path) -> None:
    store, other = make(tmp_path / "a.zarr", 3), make(tmp_path / "b.zarr", 3, seed=1)
    packed = pickle.dumps(store)
    assert np.array_equal(pickle.loads(packed).read(), store.read())
    shutil.rmtree(store.path)
    other.path.rename(store.path)
    with pytest.raises(IncompatibleError, match=f"content hash should be {store.content_hash}, found"):
        pickle.loads(packed)


def test_another_folder_in_the_place_of_a_store_that_is_written(tmp_path: Path) -> None:
    meta, tokens = make_meta(60, 2, 4, chunk_tokens=16, shard_tokens=32), token_table(60)
    x = random_activations(60, 2, 4)
    other = make_store(tmp_path / "b.zarr", x + 1, chunk_tokens=16, shard_tokens=32)
    before = other.read()
    with ActivationStore.create(tmp_path / "a.zarr", meta, tokens) as store:
        store.write_shard(0, x[:32])
        (tmp_path / "a.zarr").rename(tmp_path / "away.zarr")
        other.path.rename(tmp_path / "a.zarr")
        with pytest.raises(IncompatibleError, match="another folder was put in this store's place"):
            store.write_shard(1, x[32:])
    assert ActivationStore.open(tmp_path / "away.zarr", partial=True).missing_shards() == [1]
    assert np.array_equal(ActivationStore.open(tmp_path / "a.zarr").read(), before)


@pytest.mark.parametrize("n_layers", [3, 6])
def test_train_and_compare_find_swapped_shards(
    tmp_path: Path, n_layers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make(tmp_path / "a.zarr", n_layers)
    config = train_config(store=store.path, out=tmp_path / "ckpt.pt", n_latents=40, k=4, batch_size=64, kernels="torch")
    train(config)
    swap(store, 2, 3)
    with pytest.raises(DamagedError, match="a valid file of another shard or store"):
        train(train_config(store=store.path, out=tmp_path / "b.pt", n_latents=40, k=4, batch_size=64, kernels="torch"))
    assert not (tmp_path / "b.pt").exists()
    words = ["--store", str(store.path), "--sae", str(config.out), "--out", str(tmp_path / "compared")]
    assert compare(words) == 3
    assert "a valid file of another shard or store" in capsys.readouterr().err


def begun(path: Path) -> tuple[ActivationStore, np.ndarray]:
    """A store of 3 shards, open for writing, none there; and its vectors."""
    values = random_activations(40, 2, 5)
    return ActivationStore.create(path, make_meta(40, 2, 5, chunk_tokens=8, shard_tokens=16), token_table(40)), values


def test_shards_that_others_put_count_once_they_are_committed(tmp_path: Path) -> None:
    """By a process that has the store open for reading, in any order: the files are those of a writer alone."""
    whole, values = begun(tmp_path / "whole.zarr")
    store, _ = begun(tmp_path / "a.zarr")
    with whole, store, store.incoming() as folder:
        for shard in range(3):
            whole.write_shard(shard, values[16 * shard : 16 * shard + 16])
        whole.finalize()
        reader = ActivationStore.open(tmp_path / "a.zarr", partial=True)
        puts = {shard: reader.put_shard(shard, values[16 * shard : 16 * shard + 16], folder) for shard in (2, 0, 1)}
        assert store.missing_shards() == [0, 1, 2]
        for shard in (1, 2, 0):
            store.commit_shard(puts[shard])
        with pytest.raises(UsageError, match="shard 1 has already been written"):
            store.commit_shard(puts[1])
        assert (tmp_path / "a.zarr" / folder).exists()
        store.finalize()
    assert files_of(tmp_path / "a.zarr") == files_of(tmp_path / "whole.zarr")
    assert sorted(p.name for p in (tmp_path / "a.zarr").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole.zarr").iterdir()
    )


def test_a_shard_whose_file_is_not_there_is_not_committed(tmp_path: Path) -> None:
    store, values = begun(tmp_path / "a.zarr")
    with store, store.incoming() as folder:
        gone, cut, sound = (store.put_shard(0, values[:16], folder) for _ in range(3))
        (tmp_path / "a.zarr" / next(iter(gone.files))).unlink()
        os.truncate(tmp_path / "a.zarr" / next(iter(cut.files)), 100)
        with pytest.raises(ResidscopeError, match=r"shard 0: .*incoming-.* is gone; run the same command"):
            store.commit_shard(gone)
        with pytest.raises(ResidscopeError, match=r"c\.0\.0\.0 should have \d+ bytes, found 100; run the same command"):
            store.commit_shard(cut)
        assert store.missing_shards() == [0, 1, 2]
        store.commit_shard(sound)
        assert store.missing_shards() == [1, 2]
    assert np.array_equal(
        ActivationStore.open(tmp_path / "a.zarr", partial=True).read(slice(16)),
        to_float32(from_float32(values[:16], "bfloat16"), "bfloat16"),
    )


def test_who_was_left_over_can_put_nothing_once_another_writes(tmp_path: Path) -> None:
    store, values = begun(tmp_path / "a.zarr")
    with store.incoming() as folder:
        stale = ActivationStore.open(tmp_path / "a.zarr", partial=True)
        stale.put_shard(0, values[:16], folder)
        store.close()  # As a process that is killed gives up its lock.
        with ActivationStore.open(tmp_path / "a.zarr", writable=True) as second:
            before = files_of(tmp_path / "a.zarr")
            with pytest.raises(FileNotFoundError):
                stale.put_shard(0, values[:16], folder)
            assert files_of(tmp_path / "a.zarr") == before
            assert not (tmp_path / "a.zarr" / folder).exists()
            assert second.missing_shards() == [0, 1, 2]
