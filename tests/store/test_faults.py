"""Crashes, a full disk, a second writer, flipped and lost bytes: nothing is lost, and nothing wrong is read."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from residscope.errors import IncompatibleError, ResidscopeError
from store import arrays
from store.activations import ActivationStore
from store.care.verify import verify
from store.manifest import FILE, LOCK
from tests.support.faults import X, count_down, everything, files_of, fill, harmless, random_fault, run_and_die, small


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "a.zarr"
    fill(path)
    return path


def test_death_while_creating(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta, tokens = small()
    path = tmp_path / "a.zarr"
    with monkeypatch.context() as patch:
        left = count_down(10**6, print, lambda name, call: patch.setattr(os, name, call))
        ActivationStore.create(path, meta, tokens).close()
    total = 10**6 - left[0]
    for calls in (1, 5, 20, 40, 60, total - 2, total - 1, total):
        shutil.rmtree(path, ignore_errors=True)
        assert run_and_die(lambda: ActivationStore.create(path, meta, tokens).close(), calls)
        if path.exists():
            assert ActivationStore.open(path, partial=True).missing_shards() == [0, 1, 2]
        fill(path)
        assert files_of(path) == files_of(whole)
        assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_death_at_any_step_of_filling(tmp_path: Path, whole: Path) -> None:
    meta, tokens = small()
    ActivationStore.create(tmp_path / "empty.zarr", meta, tokens).close()
    path = tmp_path / "a.zarr"
    calls, died = 0, True
    while died:
        calls += 1
        shutil.copytree(tmp_path / "empty.zarr", path)
        died = run_and_die(lambda: fill(path), calls)
        ActivationStore.open(path, partial=True)  # A reader takes nothing half-written for whole,
        assert all(bad.reason.startswith("missing") for bad in verify(path))
        fill(path)  # and the next run makes the same bytes.
        assert files_of(path) == files_of(whole)
        shutil.rmtree(path)
    assert calls > 40


def test_death_while_resuming(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "a.zarr"
    for calls in range(1, 6):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        data = (path / FILE).read_bytes()
        (path / FILE).write_bytes(data[:-30])  # The last line is torn,
        (path / "resid_post/c.2.0.0.tmp").write_bytes(b"x")  # and there are leftovers.
        assert run_and_die(lambda: fill(path), calls)
        fill(path)
        assert files_of(path) == files_of(whole)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    reference = tmp_path / "reference.zarr"
    fill(reference, codec)
    path = tmp_path / "a.zarr"
    meta, tokens = small(codec)
    store = ActivationStore.create(path, meta, tokens)
    write = os.write
    room = [0]

    def limited(descriptor: int, data: memoryview) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return write(descriptor, data[: len(data) + min(room[0], 0)])

    for shard in range(meta.n_shards):
        start, stop = meta.shard_bounds(shard)
        for free in (0, 100, 700, 900, 1100):
            room[0] = free
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", limited)
                try:
                    store.write_shard(shard, X[start:stop])
                    break
                except OSError as error:
                    failure = error
            assert failure.errno == errno.ENOSPC
            assert str(path) in str(failure.filename)
            assert not list(path.rglob("*.tmp"))
            assert shard in ActivationStore.open(path, partial=True).missing_shards()
        else:
            store.write_shard(shard, X[start:stop])
    store.finalize()
    store.close()
    assert files_of(path) == files_of(reference)


def test_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    meta, tokens = small()
    with ActivationStore.create(path, meta, tokens):
        with pytest.raises(ResidscopeError, match="another process is writing"):
            ActivationStore.open(path, writable=True)
        ActivationStore.open(path, partial=True)
    ActivationStore.open(path, writable=True).close()


def test_second_creation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zarr"
    meta, tokens = small()
    make_arrays = arrays.make_arrays

    def create_within(*arguments):  # type: ignore[no-untyped-def]
        monkeypatch.undo()
        with pytest.raises(ResidscopeError, match="another process is writing"):
            ActivationStore.create(path, meta, tokens)
        make_arrays(*arguments)

    monkeypatch.setattr("store.arrays.make_arrays", create_within)
    ActivationStore.create(path, meta, tokens).close()
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]
    with pytest.raises(IncompatibleError, match="exists already"):
        ActivationStore.create(path, meta, tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_flipped_and_lost_bytes_are_detected(tmp_path: Path, codec: str) -> None:
    """Of 400 random faults, each raises or changes nothing that is read; verify finds what a reader refuses."""
    path = tmp_path / "a.zarr"
    fill(path, codec)
    expected = everything(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
    rng = np.random.default_rng(0)
    detected = 0
    for i in range(400):
        file = files[i % len(files)]
        data = file.read_bytes()
        broken, what = random_fault(data, rng)
        file.write_bytes(broken)
        try:
            assert harmless(path, expected), f"{file.name}, {what}: read as if nothing were wrong"
        except (ResidscopeError, OSError):
            detected += 1
            assert verify(path), f"{file.name}, {what}: verify finds nothing"
        file.write_bytes(data)
    assert detected > 390
    assert not verify(path)


def test_every_file_that_is_lost_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    fill(path)
    expected = everything(path)
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        data = file.read_bytes()
        file.unlink()
        derived = file.parent.name.startswith("layer_") and file.name != "zarr.json"
        if derived or file == path / LOCK:
            assert harmless(path, expected)  # The statistics are merged again from the moments.
        else:
            with pytest.raises(ResidscopeError):
                everything(path)
        file.write_bytes(data)


def test_swapped_shards_are_detected(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    fill(path)
    for name in ("resid_post/c.{}.0.0", "shard_moments/c.{}.0.0.0"):
        first, second = (path / name.format(i) for i in (0, 1))
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)
        assert {bad.index for bad in verify(path)} == {0, 1}
        first.write_bytes(a)
        second.write_bytes(b)


def test_a_store_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.meta.FORMAT_VERSION", 2)
    path = tmp_path / "a.zarr"
    fill(path)
    monkeypatch.undo()
    with pytest.raises(IncompatibleError, match="version 2, this program reads version 1"):
        ActivationStore.open(path)


def test_reading_does_not_need_the_compiler_or_zarr(whole: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from store import ActivationStore; s = ActivationStore.open(sys.argv[1]); s.read(); s.tokens; "
        "s.statistics(); print(sorted({'numba', 'zarr', 'torch', 'dask'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(whole)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
