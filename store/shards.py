"""Direct reading and writing of the shards of `resid_post`: what zarr's sharding codec does, at the disk's speed.

How: a shard's file is its inner chunks, each followed by its crc32c; then the index, which has the offset and length
of each inner chunk as uint64, in C order over (token chunk, layer), or 2^64 - 1 twice for one that is all zeros and
left out; then the index's crc32c. All numbers are little-endian. The writer lays the chunks out in index order and
leaves out those wholly beyond the last token; the reader takes them from wherever the index says, so that it reads what
zarr or tensorstore wrote. What it does not do: decide which shards count (manifest.py), or reach a remote store.

Shapes: L stored layers, D = d_model, C tokens in a chunk, P token chunks of the shard that hold a token.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd

from residscope.errors import IncompatibleError
from store.checksums import crc32c
from store.dtypes import STORAGE_DTYPE
from store.meta import StoreMeta

CRC_BYTES = 4
ZSTD_LEVEL = 1

_ABSENT = 0xFFFFFFFFFFFFFFFF
_INDEX_ENTRY_BYTES = 16


class DamagedError(IncompatibleError):
    """A file of a store is missing, or is not what was written."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}. `residscope verify` lists everything that is damaged in a store")
        self.path, self.what = path, what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.what)  # From another process it comes back as it is.


def shard_name(shard: int) -> str:
    """File of a shard, below the store."""
    return f"resid_post/c.{shard}.0.0"


def checksum(data: bytes | np.ndarray) -> bytes:
    """crc32c as it is stored after what it protects."""
    return crc32c(data).to_bytes(CRC_BYTES, "little")


def seal_slots(slots: np.ndarray, meta: StoreMeta) -> list[memoryview]:
    """The bytes of a shard's file, in parts to be written one after another.

    slots: uint8 [P * L, C * D * itemsize + 4], inner chunks in index order; the last 4 bytes of each are written here.
    """
    index = np.full((meta.chunks_per_shard * meta.n_layers, 2), _ABSENT, "<u8")
    parts: list[memoryview] = []
    if meta.codec == "zstd":
        codec = Zstd(level=ZSTD_LEVEL)
        offset = 0
        for position, slot in enumerate(slots):
            packed = bytes(codec.encode(slot[:-CRC_BYTES]))
            parts.append(memoryview(packed + checksum(packed)))
            index[position] = offset, parts[-1].nbytes
            offset += parts[-1].nbytes
    else:
        for slot in slots:
            slot[-CRC_BYTES:] = np.frombuffer(checksum(slot[:-CRC_BYTES]), np.uint8)
        index[: len(slots), 0] = np.arange(len(slots)) * slots.shape[1]
        index[: len(slots), 1] = slots.shape[1]
        parts.append(slots.data.cast("B"))
    index_bytes = index.tobytes()
    return [*parts, memoryview(index_bytes + checksum(index_bytes))]


class ShardReader:
    """Reads inner chunks of one shard's file; several threads may use it at once, until it is closed."""

    def __init__(self, path: Path, meta: StoreMeta, n_bytes: int, index: list[int] | None = None) -> None:
        """Open the file; check its size and read its index, unless the `index` of an earlier reader is given."""
        self._path = path
        self._meta = meta
        self._chunk_bytes = meta.chunk_tokens * meta.d_model * meta.itemsize
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise DamagedError(path, "the shard is missing") from None
        try:
            found = os.fstat(self._descriptor).st_size
            if found != n_bytes:
                raise DamagedError(self._path, f"the shard should have {n_bytes} bytes and has {found}")
            self.index = self._read_index(n_bytes) if index is None else index
        except BaseException:
            self.close()
            raise

    def _read_index(self, n_bytes: int) -> list[int]:
        """Offset and length of each inner chunk, in turn, from the end of the file."""
        size = self._meta.chunks_per_shard * self._meta.n_layers * _INDEX_ENTRY_BYTES
        start = n_bytes - size - CRC_BYTES
        data = os.pread(self._descriptor, size + CRC_BYTES, start) if start >= 0 else b""
        if len(data) != size + CRC_BYTES or checksum(data[:size]) != data[size:]:
            raise DamagedError(self._path, "the checksum of the shard's index does not match")
        return np.frombuffer(data, "<u8", size // 8).tolist()

    def read_chunk(self, chunk: int, layer: int, out: np.ndarray) -> None:
        """Fill `out`, uint8 [C * D * itemsize], with an inner chunk; `chunk` counts within the shard.

        Raises `DamagedError` when its bytes are not those that were written.
        """
        entry = 2 * (chunk * self._meta.n_layers + layer)
        offset, length = self.index[entry], self.index[entry + 1]
        if offset == _ABSENT:
            out[:] = 0
            return
        if self._meta.codec == "zstd":
            packed = os.pread(self._descriptor, length, offset)
            whole = len(packed) == length and checksum(packed[:-CRC_BYTES]) == packed[-CRC_BYTES:]
            if whole:
                Zstd().decode(packed[:-CRC_BYTES], out)
        else:
            check = bytearray(CRC_BYTES)
            whole = length == self._chunk_bytes + CRC_BYTES and _read_into(self._descriptor, out, check, offset)
            whole = whole and checksum(out) == check
        if not whole:
            raise DamagedError(
                self._path, f"the checksum of token chunk {chunk} at stored layer {layer} does not match"
            )

    def read_shard(self, n_tokens: int) -> np.ndarray:
        """The shard's first `n_tokens` tokens: [n_tokens, L, D] in the stored format."""
        meta = self._meta
        out = np.empty((n_tokens, meta.n_layers, meta.d_model), STORAGE_DTYPE[meta.stored_dtype])
        block = np.empty((meta.chunk_tokens, meta.d_model), out.dtype)
        for start in range(0, n_tokens, meta.chunk_tokens):
            rows = out[start : start + meta.chunk_tokens]
            for layer in range(meta.n_layers):
                self.read_chunk(start // meta.chunk_tokens, layer, block.reshape(-1).view(np.uint8))
                rows[:, layer] = block[: len(rows)]
        return out

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_into(descriptor: int, out: np.ndarray, check: bytearray, offset: int) -> bool:
    """Fill `out`, then `check`, from `offset`; False when the file ends too early. macOS before 11 has no preadv."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out.data, check], offset) == out.nbytes + len(check)
    data = os.pread(descriptor, out.nbytes + len(check), offset)
    if len(data) != out.nbytes + len(check):
        return False
    out[:] = np.frombuffer(data, np.uint8, out.nbytes)
    check[:] = data[out.nbytes :]
    return True
