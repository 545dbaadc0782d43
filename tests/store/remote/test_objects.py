"""Stores at URLs, on a real S3 server: what is read is what is read from a disk, and who may write."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harvest.destination import remove_store
from residscope.errors import IncompatibleError, ResidscopeError
from residscope.urls import URL, as_path
from store.activations import ActivationStore
from store.care.verify import verify
from store.checksums import DamagedError
from store.folder import is_store
from store.manifest import FILE
from store.remote import objects
from store.remote.objects import ObjectLock, merged
from tests.support.stores import make_meta, make_store, random_activations, token_table

X = random_activations(200, 8, 16)
SIZES: dict[str, Any] = {"chunk_tokens": 16, "shard_tokens": 32}
META = make_meta(200, 8, 16, **SIZES)


def open_url(url: str) -> ActivationStore:
    return ActivationStore.open(url, partial=True)


def write(store: ActivationStore, shards: range) -> None:
    for shard in shards:
        store.write_shard(shard, X[slice(*META.shard_bounds(shard))])


def at(url: str, name: str) -> URL:
    path = as_path(url) / name
    assert isinstance(path, URL)
    return path


def test_shards_that_several_threads_put_at_once_are_all_there(s3: str, tmp_path: Path) -> None:
    disk = make_store(tmp_path / "a.zarr", X, **SIZES)
    with ActivationStore.create(as_path(s3), META, token_table(200)) as store, ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda shard: write(store, range(shard, shard + 1)), range(META.n_shards)):
            pass
        store.finalize()
    assert ActivationStore.open(s3).content_hash == disk.content_hash


def test_after_a_line_without_an_answer_all_writers_say_so(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has made the line: the manifest is not as this process knows it."""
    put = URL.put

    def unanswered(path: URL, *given: Any) -> Any:
        found = put(path, *given)
        if path.suffix == ".jsonl":
            raise ResidscopeError(f"{path}: no answer")
        return found

    with ActivationStore.create(as_path(s3), META, token_table(200)) as store:
        monkeypatch.setattr(URL, "put", unanswered)
        for shard in range(2):
            with pytest.raises(ResidscopeError, match=r"0\.jsonl: no answer"):
                write(store, range(shard, shard + 1))


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_store_is_the_same_as_on_a_disk(s3: str, tmp_path: Path, codec: str) -> None:
    disk = make_store(tmp_path / "a.zarr", X, codec=codec, **SIZES)
    store = make_store(s3, X, codec=codec, **SIZES)
    assert str(store.path) == s3
    assert store.content_hash == disk.content_hash
    assert np.array_equal(store.read(raw=True), disk.read(raw=True))
    assert np.array_equal(store.read(slice(5, 77), [1, 6]), disk.read(slice(5, 77), [1, 6]))
    rng = np.random.default_rng(0)
    chunk, layer = rng.integers(0, META.n_chunks, 60), rng.integers(0, 8, 60)
    found, expected = np.empty((2, 60, 16, 16), np.uint16)
    store.read_blocks(chunk, layer, found)
    disk.read_blocks(chunk, layer, expected)
    assert np.array_equal(found, expected)
    assert np.array_equal(store.statistics().var, disk.statistics().var)
    for column, other in zip(store.tokens, disk.tokens, strict=True):
        assert np.array_equal(column, other)
    assert verify(s3) == []
    names = {str(path.relative_to(store.path)) for path in store.path.glob("*")}
    assert names == {str(p.relative_to(disk.path)) for p in disk.path.rglob("*") if p.is_file()} - {"manifest/.lock"}
    assert all((store.path / name).read_bytes() == (disk.path / name).read_bytes() for name in names)


def test_a_flipped_byte_and_a_lost_object_are_found(s3: str) -> None:
    reader = make_store(s3, X, **SIZES)
    reader.read(slice(64, 96))
    shard = at(s3, "resid_post/c.2.0.0")
    data, noted = bytearray(shard.read_bytes()), shard.get(head=True).xxh3
    data[77] ^= 4
    shard.put(bytes(data), xxh3=noted)
    with pytest.raises(DamagedError, match="replaced"):
        reader.read(slice(64, 96))  # which has seen another
    with pytest.raises(DamagedError, match="checksum of token chunk 0"):
        open_url(s3).read(slice(64, 96))
    assert [bad.index for bad in verify(s3)] == [2]
    shard.unlink()
    with pytest.raises(DamagedError, match="missing"):
        open_url(s3).read(slice(64, 96))
    at(s3, "resid_post/c.3.0.0").put(bytes(data)[: len(data) // 8])
    assert [bad.index for bad in verify(s3)] == [2, 3]


@pytest.mark.parametrize("noted", [True, False])
def test_swapped_shards_are_found(s3: str, noted: bool) -> None:
    """With what their writer noted, and as a tool copies that leaves it out."""
    make_store(s3, X, **SIZES)
    found = [at(s3, f"resid_post/c.{shard}.0.0") for shard in (1, 2)]
    objects_ = [(path.read_bytes(), path.get(head=True).xxh3 if noted else None) for path in found]
    for path, (data, xxh3) in zip(found, reversed(objects_), strict=True):
        path.put(data, xxh3=xxh3)
    with pytest.raises(DamagedError, match="another shard"):
        open_url(s3).read(slice(32, 64))
    for path, (data, _) in zip(found, objects_, strict=True):
        path.put(data)
    assert open_url(s3).read().shape == X.shape  # of which no hash is noted


def test_who_opens_a_store_for_writing_takes_it_over(s3: str, tmp_path: Path) -> None:
    first = ActivationStore.create(s3, META, token_table(200))
    write(first, range(2))
    second = ActivationStore.open(s3, writable=True)
    assert second.missing_shards() == [2, 3, 4, 5, 6]
    for attempt in range(2):
        with pytest.raises(ResidscopeError, match="another process is writing this store now"):
            write(first, range(2, 3))
        assert open_url(s3).missing_shards() == [2, 3, 4, 5, 6][attempt:]
        write(second, range(2 + attempt, 3 + attempt))
    write(second, range(4, META.n_shards))
    second.finalize()
    assert second.content_hash == make_store(tmp_path / "a.zarr", X, **SIZES).content_hash
    assert verify(s3) == []


def test_many_takeovers_begin_no_new_object(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only lines count: else the first writer's object would stay as it was, and take its lines."""
    monkeypatch.setattr(objects, "_MOST_LINES", 4)
    first = ActivationStore.create(s3, META, token_table(200))
    write(first, range(2))  # three lines, with the header
    *_, last = (ActivationStore.open(s3, writable=True) for _ in range(5))
    with pytest.raises(ResidscopeError, match="another process is writing this store now"):
        write(first, range(2, 3))
    write(last, range(2, META.n_shards))
    assert open_url(s3).missing_shards() == []


def test_a_removal_that_was_killed_is_gone_on_with(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(s3, X, **SIZES)
    left, unlink = iter(range(3)), URL.unlink

    def killed(path: URL, missing_ok: bool = False) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(URL, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_store(as_path(s3))
    assert not is_store(as_path(s3))
    assert make_store(s3, X, **SIZES).read().shape == X.shape


def test_a_late_upload_exchanges_nothing_that_counts(s3: str) -> None:
    first = ActivationStore.create(s3, META, token_table(200))
    second = ActivationStore.open(s3, writable=True)
    write(second, range(1))
    lock = first._writer and first._writer._lock
    assert isinstance(lock, ObjectLock)
    with pytest.raises(ResidscopeError, match="another process"):
        lock.write(at(s3, "resid_post/c.0.0.0"), [b"of a writer that hung"])
    assert open_url(s3).read(slice(0, 32)).shape == (32, 8, 16)


def test_what_a_killed_writer_left_is_removed(s3: str) -> None:
    with ActivationStore.create(s3, META, token_table(200)) as store:
        write(store, range(2))
    for name in ("resid_post/c.2.0.0", "shard_moments/c.2.0.0.0"):
        at(s3, name).put(b"an upload without a line")
    before = open_url(s3).content_hash
    with ActivationStore.open(s3, writable=True) as store:
        assert not at(s3, "resid_post/c.2.0.0").is_file()
        assert at(s3, "resid_post/c.1.0.0").is_file()
        assert store.content_hash == before
        write(store, range(2, META.n_shards))
    assert verify(s3) == []


def test_there_is_no_store_before_its_header(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects.ObjectLock, "append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ActivationStore.create(s3, META, token_table(200))
    monkeypatch.undo()
    assert at(s3, "token_id/c.0").is_file()
    assert not is_store(as_path(s3))
    at(s3, "token_id/c.9").put(b"of other options")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "unused: the connection is there already")
    ActivationStore.create(s3, META, token_table(200)).close()
    assert is_store(as_path(s3))
    assert not at(s3, "token_id/c.9").is_file()
    with pytest.raises(IncompatibleError, match="exists already"):
        ActivationStore.create(s3, META, token_table(200))
    at(f"{s3}-text", "notes.txt").put(b"somebody's")
    with pytest.raises(IncompatibleError, match="exists already"):
        ActivationStore.create(f"{s3}-text", META, token_table(200))


def test_the_manifest_goes_on_in_another_object(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(objects, "_MOST_LINES", 3)
    with ActivationStore.create(s3, META, token_table(200)) as store:
        write(store, range(2))
    with ActivationStore.open(s3, writable=True) as first, ActivationStore.open(s3, writable=True) as second:
        with pytest.raises(ResidscopeError, match="another process"):
            write(first, range(2, 3))
        write(second, range(2, META.n_shards))
    assert sorted(path.name for path in as_path(f"{s3}/manifest").glob("*.jsonl")) == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert all(len(path.read_bytes().splitlines()) <= 3 for path in as_path(f"{s3}/manifest").glob("*.jsonl"))
    assert open_url(s3).content_hash == make_store(tmp_path / "a.zarr", X, **SIZES).content_hash
    assert at(s3, FILE).is_file()


def test_merged() -> None:
    assert merged([(5, 7), (0, 2), (2, 4), (6, 9)]) == [(0, 4), (5, 9)]
    assert merged([]) == []
