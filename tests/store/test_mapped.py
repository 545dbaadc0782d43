"""Copies out of a memory map: the file's bytes, or None where preadv has to say why not."""

import os
from pathlib import Path

import numpy as np
import pytest

from store import mapped
from store.activations import ActivationStore
from store.mapped import MappedFile
from store.shards import DamagedError
from tests.support.faults import X, fill

pytestmark = pytest.mark.skipif(mapped._c_madvise() is None, reason="only Linux maps files here")


def test_parts_anywhere_in_a_file(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    with (tmp_path / "file").open("rb") as file:
        opened = MappedFile.open(file.fileno(), len(data))
        assert opened is not None
        for offset, size in ((0, 10), (1, 9000), (4095, 2), (4096, 4096), (12_345, 30_000), (49_000, 996)):
            out = np.zeros(size, np.uint8)
            assert opened.copy(offset, out, 4) == data[offset + size : offset + size + 4].tobytes()
            assert np.array_equal(out, data[offset : offset + size])
        assert opened.copy(49_000, np.zeros(997, np.uint8), 4) is None
        assert MappedFile.open(file.fileno(), 0) is None


def test_a_file_that_is_cut_off_while_it_is_read_raises(tmp_path: Path) -> None:
    """Touching the pages would end the process; the kernel is asked first."""
    fill(tmp_path / "a.zarr")
    store = ActivationStore.open(tmp_path / "a.zarr")
    with store._reader(0) as reader:
        out = np.zeros(8 * 5 * 2, np.uint8)
        reader.read_chunk(0, 0, out)
        os.truncate(tmp_path / "a.zarr/resid_post/c.0.0.0", 0)
        with pytest.raises(DamagedError):
            reader.read_chunk(0, 0, out)
    with pytest.raises(DamagedError, match=r"should have .* bytes and has 0"):
        store.read()


def test_without_a_map_the_numbers_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "a.zarr")
    store = ActivationStore.open(tmp_path / "a.zarr")
    before = store.read()
    monkeypatch.setattr(MappedFile, "open", classmethod(lambda cls, *given: None))
    assert np.array_equal(store.read(), before)
    monkeypatch.undo()
    monkeypatch.setattr(mapped, "_c_madvise", lambda: lambda *given: -1)  # as before Linux 5.14
    assert np.array_equal(store.read(), before)
    assert before.shape == X.shape
