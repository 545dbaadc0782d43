"""The copy past the cache: the file's bytes, nothing beside them, and no chunk whose checksum does not match."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.activations import ActivationStore
from store.checksums import crc32c
from store.kernels_copy import copy_checked, fold_constant, runs_here
from store.shards import DamagedError
from tests.support.stores import make_store, random_activations

needs_instructions = pytest.mark.skipif(not runs_here(), reason="the processor has no 64-byte carry-less products")


def mapped_file(path: Path, data: bytes) -> tuple[np.ndarray, int]:
    """A file's bytes as a map, and a descriptor to be closed."""
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    return np.frombuffer(mmap.mmap(descriptor, len(data), prot=mmap.PROT_READ), np.uint8), descriptor


def sealed(chunk: bytes) -> bytes:
    return chunk + crc32c(chunk).to_bytes(4, "little")


@pytest.mark.parametrize("power", [0, 1, 31, 32, 33, 479, 543])
def test_constants_are_remainders(power: int) -> None:
    """Against long division of numbers with the highest power first."""
    remainder = 1 << power
    while remainder.bit_length() > 32:
        remainder ^= 0x11EDC6F41 << (remainder.bit_length() - 33)
    assert fold_constant(power) == int(f"{remainder:032b}"[::-1], 2)


@needs_instructions
@given(
    size=st.one_of(st.integers(0, 200), st.integers(0, 20_000)),
    gaps=st.lists(st.integers(0, 100), min_size=1, max_size=4),
    shift=st.integers(0, 64),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_chunks_of_any_size_anywhere(
    tmp_path_factory: pytest.TempPathFactory, size: int, gaps: list[int], shift: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    chunks = [rng.bytes(size) for _ in gaps]
    data, offsets = b"", []
    for gap, chunk in zip(gaps, chunks, strict=True):
        data += rng.bytes(gap)
        offsets.append(len(data))
        data += sealed(chunk)
    mapped, descriptor = mapped_file(tmp_path_factory.mktemp("copy") / "file", data)
    around = np.full(shift + len(gaps) * size + 70, 7, np.uint8)
    out = around[shift : shift + len(gaps) * size].reshape(len(gaps), size)
    rows, good = rng.permutation(len(gaps)), np.zeros(len(gaps), bool)
    copy_checked(mapped, descriptor, np.array(offsets), out, rows, good)
    os.close(descriptor)
    assert good.all()
    assert [out[row].tobytes() for row in rows] == chunks
    assert (around[:shift] == 7).all()
    assert (around[shift + out.size :] == 7).all()


@needs_instructions
@pytest.mark.parametrize("size", [1, 63, 300])
@pytest.mark.parametrize("shift", [0, 16, 61])
def test_every_byte_counts(tmp_path: Path, size: int, shift: int) -> None:
    """One chunk for each of its bytes and its checksum's, which is another there; and one that is whole."""
    whole = sealed(np.random.default_rng(0).bytes(size))
    copies = np.tile(np.frombuffer(whole, np.uint8), (len(whole) + 1, 1))
    copies[np.arange(len(whole)), np.arange(len(whole))] ^= np.uint8(1 << shift % 8)
    mapped, descriptor = mapped_file(tmp_path / "file", copies.tobytes())
    out = np.zeros(shift + len(copies) * size, np.uint8)[shift:].reshape(-1, size)
    rows, good = np.arange(len(copies)), np.ones(len(copies), bool)
    copy_checked(mapped, descriptor, rows * len(whole), out, rows, good)
    os.close(descriptor)
    assert good.tolist() == [False] * len(whole) + [True]


@needs_instructions
def test_beyond_the_file_nothing_is_touched(tmp_path: Path) -> None:
    data = sealed(bytes(100))
    mapped, descriptor = mapped_file(tmp_path / "file", data)
    out, good = np.full((4, 100), 7, np.uint8), np.ones(4, bool)
    copy_checked(mapped, descriptor, np.array([1, -1, 10**6, 0]), out, np.arange(4), good)
    assert good.tolist() == [False, False, False, True]
    assert (out[:3] == 7).all()
    os.truncate(tmp_path / "file", 0)  # The kernel is asked before the page is touched.
    copy_checked(mapped, descriptor, np.array([0]), out, np.arange(1), good)
    os.close(descriptor)
    assert not good[0]


def test_damage_is_told_as_by_any_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.activations._STREAMED_BYTES", 0)
    make_store(tmp_path / "a.zarr", random_activations(150, 3, 13), chunk_tokens=8, shard_tokens=24)
    store = ActivationStore.open(tmp_path / "a.zarr")
    chunk, layer = (part.reshape(-1) for part in np.indices((store.meta.n_chunks, 3)))
    out = np.empty((len(chunk), 8, 13), np.uint16)
    file = tmp_path / "a.zarr/resid_post/c.2.0.0"
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, 9 * (8 * 13 * 2 + 4), 50).tolist():
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        place, found = divmod(at // (8 * 13 * 2 + 4), 3)
        with pytest.raises(DamagedError, match=f"checksum of token chunk {place} at stored layer {found} does not"):
            store.read_blocks(chunk, layer, out, threads=2)
    file.write_bytes(data)
    store.read_blocks(chunk, layer, out, threads=2)
    assert np.array_equal(out[-1][: 150 % 8], store.read(slice(144, 150), [2], raw=True)[:, 0])
