"""The shards of `resid_post`: how a shard's file is laid out, read, written, and committed.

A shard's file is its inner chunks, each followed by its crc32c; then the index, which has the offset and length of each
inner chunk as uint64, in C order over (token chunk, layer), or 2^64 - 1 twice for an omitted chunk, which is all zeros;
then the index's crc32c. All numbers are little-endian. Our writer puts the chunks in the index's order and omits
those beyond the last token; the reader takes them from wherever the index says, so it also reads what zarr wrote.

The file of another shard or store passes its own checksums. So a file is first checked against its manifest line
(`require_own`): by its hash, or, with many layers, by the sums of the norms at the middle and the last layer. That
takes 1 s for a GB of these layers, the hash 0.25 s for a GB of the file. Neither layer alone would do: a lens leaves
the last one unchanged, training only later blocks the middle one. The checksums of all the file's chunks are
then kept in memory, and later reads are checked against them, whichever file has the name by then.

A shard is first put on the disk: its file and its moments, under temporary names, synced (`ShardFiles`). Then it is
committed, each step durable before the next begins: both files get their names; the manifest gets its line. Readers
see only shards with a line, so a crash loses at most the shards in flight. Any process may put a shard, but only the
one that holds the store's lock commits it (`ShardWriter`). pack.py makes the chunks.

Shapes: t valid tokens of a shard, L stored layers, D = d_model, C tokens in a chunk, P chunks that hold a token.
"""

import os
import threading
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numcodecs.zstd import Zstd

from residscope.errors import ResidscopeError, UsageError
from residscope.urls import URL
from store import arrays
from store.checksums import CRC_BYTES, DamagedError, checksum, crc32c
from store.dtypes import OVERFLOW_BITS, STORAGE_DTYPE, to_float32
from store.files import TEMPORARY, removed_on_error, sync, write_synced
from store.manifest import Manifest, ManifestWriter, ShardRecord
from store.meta import ABSENT, StoreMeta
from store.remote.objects import ObjectFile, ObjectLock, StoreLock

_INDEX_ENTRY_BYTES = 16
_HASHED_LAYERS = 6
"""With this many layers or fewer, a file is checked by its hash."""
_TOLERANCE = 1e-9
"""Relative tolerance of a sum of norms: the order of addition changes it by about 10^-15 for 30,000 vectors."""
_ANOTHER = "a valid file of another shard or store, or a rewritten one"
_READ_BYTES = 4 * 1024 * 1024
_AGAIN = "run the same command to write it again"


def shard_name(shard: int) -> str:
    """File of a shard, below the store."""
    return f"resid_post/c.{shard}.0.0"


class ShardReader:
    """Reads inner chunks of one shard's file; several threads may use it at once, until it is closed."""

    def __init__(self, path: Path, meta: StoreMeta, n_bytes: int, index: Any = None, known: Any = None) -> None:
        """Open the file; check its size and read its index, unless the `index` of an earlier reader is given."""
        self._path, self._meta, self._n_bytes = path, meta, n_bytes
        self._or_replaced = "" if index is None else ": it is damaged, or was replaced while it was in use"
        try:
            self._object = ObjectFile(path, n_bytes, {} if known is None else known) if isinstance(path, URL) else None
            self._descriptor = -1 if self._object else os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would block
        except FileNotFoundError:
            raise DamagedError(path, "the shard is missing") from None
        try:
            found = self._object.size if self._object else os.fstat(self._descriptor).st_size
            if found != n_bytes:
                raise DamagedError(self._path, f"the shard should have {n_bytes} bytes, found {found}")
            self.index = self._read_index() if index is None else index
            """int64 [P * L, 3]: offset (-1: omitted), length and crc32c (-1: read it after the chunk) of each chunk."""
        except BaseException:
            self.close()
            raise

    def _read_index(self) -> np.ndarray:
        size = self._meta.chunks_per_shard * self._meta.n_layers * _INDEX_ENTRY_BYTES
        start = self._n_bytes - size - CRC_BYTES
        data = bytes(self._read(size + CRC_BYTES, start)) if start >= 0 else b""
        if len(data) != size + CRC_BYTES or checksum(data[:size]) != data[size:]:
            raise DamagedError(self._path, "the checksum of the shard's index does not match")
        index = np.zeros((size // _INDEX_ENTRY_BYTES, 3), np.int64)
        index[:, :2] = np.frombuffer(data, "<i8", size // 8).reshape(-1, 2)
        for entry in np.flatnonzero(index[:, 0] != ABSENT).tolist():
            offset, end = index[entry, 0], int(index[entry, 0]) + int(index[entry, 1])
            if not (0 <= offset <= end - CRC_BYTES and end <= start):
                raise DamagedError(self._path, "the shard's index does not fit its file")
            index[entry, 2] = -1 if self._object else self._crc_before(end)
        return index

    def _read(self, n_bytes: int, start: int) -> Any:
        return self._object.read(n_bytes, start) if self._object else os.pread(self._descriptor, n_bytes, start)

    def _crc_before(self, end: int) -> int:
        return int.from_bytes(bytes(self._read(CRC_BYTES, end - CRC_BYTES)), "little")

    def fetch(self, chunk: np.ndarray, layer: np.ndarray) -> None:
        """Prefetch inner chunks that will be read, with few requests; does nothing on a disk."""
        if self._object:
            ranges = self.index[(chunk * self._meta.n_layers + layer).reshape(-1)].tolist()
            self._object.fetch((start, start + size) for start, size, _ in ranges if start != ABSENT)

    def require_own(self, record: ShardRecord, keep: np.ndarray | None = None) -> None:
        """Raise `DamagedError` unless the file is the one of the manifest line `record`. keep: bool [t], the store's
        mask; without it the file is hashed, however many layers there are. With it, the hash that an object's writer
        stored in the object's attributes is enough."""
        n_layers = self._meta.n_layers
        if keep is not None and self._object and self._object.noted == record.xxh3_128:
            return
        if keep is None or n_layers <= _HASHED_LAYERS or self._object:
            if keep is None and self._object:
                self._object.fetch([(0, self._n_bytes)])
            digest = xxhash.xxh3_128()
            for start in range(0, self._n_bytes, _READ_BYTES):
                digest.update(self._read(_READ_BYTES, start))
            if digest.hexdigest() != record.xxh3_128:
                chunk = np.empty(self._meta.chunk_tokens * self._meta.d_model * self._meta.itemsize, np.uint8)
                for entry in range(len(self.index)):  # Raises where a chunk is damaged.
                    self.read_chunk(*divmod(entry, n_layers), chunk)
                raise DamagedError(self._path, f"wrong hash: {_ANOTHER}")
            return
        for layer in (n_layers // 2, n_layers - 1):
            expected = record.norm_sums[layer]
            if not abs(self._norm_sum(layer, keep) - expected) <= _TOLERANCE * expected:
                which = f"vector norms at layer {self._meta.layers[layer]} do not match the manifest"
                raise DamagedError(self._path, f"{which}: {_ANOTHER}")

    def _norm_sum(self, layer: int, keep: np.ndarray) -> float:
        """Sum of the norms of a layer's kept vectors; computed a chunk at a time to save memory."""
        meta, total = self._meta, 0.0
        block = np.empty((meta.chunk_tokens, meta.d_model), STORAGE_DTYPE[meta.stored_dtype])
        for chunk, start in enumerate(range(0, len(keep), meta.chunk_tokens)):
            self.read_chunk(chunk, layer, block.reshape(-1).view(np.uint8))
            kept = keep[start : start + meta.chunk_tokens]
            rows = to_float32(block[: len(kept)][kept], meta.stored_dtype).astype(np.float64)
            total += float(np.sqrt(np.einsum("td,td->t", rows, rows)).sum())
        return total

    def read_chunk(self, chunk: int, layer: int, out: np.ndarray) -> None:
        """Fill `out`, uint8 [C * D * itemsize], with an inner chunk; `chunk` is its number within the shard.

        Raises `DamagedError` when the checksum does not match.
        """
        offset, length, check = self.index[chunk * self._meta.n_layers + layer].tolist()
        if offset == ABSENT:
            out[:] = 0
            return
        packed = self._meta.codec == "zstd"
        data = np.empty(length - CRC_BYTES, np.uint8) if packed else out
        fits = data.nbytes + CRC_BYTES == length and self._fill(data, offset)
        if not fits or crc32c(data) != (self._crc_before(offset + length) if check < 0 else check):
            which = f"token chunk {chunk} at stored layer {layer}"
            raise DamagedError(self._path, f"the checksum of {which} does not match{self._or_replaced}")
        if packed:
            Zstd().decode(data, out)

    def _fill(self, out: np.ndarray, offset: int) -> bool:
        """Fill `out`; returns whether there were enough bytes."""
        if not self._object:
            return os.preadv(self._descriptor, [out.data], offset) == out.nbytes
        data = self._object.read(out.nbytes, offset)
        if len(data) == out.nbytes:
            out[:] = data
        return len(data) == out.nbytes

    def close(self) -> None:
        if not self._object:
            os.close(self._descriptor)

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PutShard(NamedTuple):
    """A shard that is on the disk but not committed yet."""

    record: ShardRecord
    files: dict[str, str]
    """Its temporary files and their final names, all relative to the store. Empty at a URL, where nothing is renamed:
    a shard without a manifest line is not visible."""


class ShardFiles:
    """Puts shards of one store on the disk, under temporary names; each thread uses its own memory."""

    def __init__(self, path: Path, meta: StoreMeta, lock: StoreLock | None = None) -> None:
        """lock: the store's, if it is at a URL; needed to put anything there."""
        self._path, self._meta, self._lock = path, meta, lock
        self._own = threading.local()

    def put(self, shard: int, data: np.ndarray, keep: np.ndarray, folder: str = "") -> PutShard:
        """Put a shard, data [t, L, D], float32 or the stored format; keep: bool [t], the store's own mask.

        folder: a folder in the store, in which each file gets a unique name. Without it, files are called `NAME.tmp`,
        which only the process that holds the lock may use.
        """
        meta = self._meta
        start, stop = meta.shard_bounds(shard)
        expected = (stop - start, meta.n_layers, meta.d_model)
        if data.shape != expected:
            raise UsageError(f"shard {shard} should have shape {expected} (token, layer, d_model), found {data.shape}")
        if data.dtype not in (np.float32, STORAGE_DTYPE[meta.stored_dtype]):
            raise UsageError(f"shard {shard} should be float32 or {meta.stored_dtype}, found {data.dtype}")
        from store.pack import ShardPacker, seal_slots  # Imports numba, which reading does not need.

        if not hasattr(self._own, "packer"):
            self._own.packer = ShardPacker(meta)
        try:
            slots, moments = self._own.packer.pack(data, keep)
        except ValueError:
            raise self._unstorable(shard, data) from None
        parts = seal_slots(slots, meta)
        numbers = arrays.encode_numbers(np.stack([moments.mean, moments.m2]))
        digest = xxhash.xxh3_128()
        for part in parts:
            digest.update(part)
        record = ShardRecord(
            shard=shard,
            tokens=stop - start,
            kept=moments.count,
            bytes=sum(part.nbytes for part in parts),
            xxh3_128=digest.hexdigest(),
            moments_xxh3_128=xxhash.xxh3_128_hexdigest(numbers),
            norm_sums=moments.norm_sums.tolist(),
            config_hash=meta.config_hash,
        )
        names, unique = (shard_name(shard), arrays.moments_name(shard)), uuid.uuid4().hex
        if isinstance(self._lock, ObjectLock):
            for name, content in zip(names, (parts, [numbers]), strict=True):
                self._lock.write(self._path / name, content)
            return PutShard(record, {})
        files = {(f"{folder}/{unique}-{i}" if folder else name) + TEMPORARY: name for i, name in enumerate(names)}
        with removed_on_error(*(self._path / temporary for temporary in files)):
            for temporary, content in zip(files, (parts, [numbers]), strict=True):
                write_synced(self._path / temporary, content)
        return PutShard(record, files)

    def _unstorable(self, shard: int, data: np.ndarray) -> ResidscopeError:
        """The error for a value that the stored format cannot hold."""
        meta = self._meta
        values = data if data.dtype == np.float32 else to_float32(data, meta.stored_dtype)
        bits = np.ascontiguousarray(values).view(np.uint32) & 0x7FFFFFFF
        token, layer, dimension = np.argwhere(bits >= OVERFLOW_BITS[meta.stored_dtype])[0].tolist()
        return ResidscopeError(
            f"layer {meta.layers[layer]}, token {meta.shard_bounds(shard)[0] + token}, dimension {dimension}: the "
            f"value {values[token, layer, dimension]} is not finite in {meta.stored_dtype}. Shard {shard} was not "
            "written. Try another --store-dtype (bfloat16 has the range of float32) or --dtype"
        )


class ShardWriter:
    """Commits shards of one store, whose lock it holds until it is closed."""

    def __init__(self, path: Path, manifest: Manifest, lock: StoreLock) -> None:
        """Take over the `lock` of the store at `path`; `manifest` gets a line for each committed shard."""
        self._path, self._manifest, self._lock, self._appending = path, manifest, lock, threading.Lock()
        self._lines = lock if isinstance(lock, ObjectLock) else ManifestWriter(path, manifest.intact_bytes)

    def require_missing(self, shard: int) -> None:
        """Raise `UsageError` if the shard exists, `IncompatibleError` if another folder is at the store's path."""
        if shard in self._manifest.lines:
            raise UsageError(f"{self._path}: shard {shard} has already been written")
        self._lock.require_here(self._path)

    def commit(self, put: PutShard) -> None:
        """Give a shard's files their final names and add its manifest line. Raises like `require_missing`, and
        `ResidscopeError` when one of its files is missing or cut short."""
        record = put.record
        self.require_missing(record.shard)
        path = self._path / shard_name(record.shard)
        try:
            with removed_on_error(*(self._path / temporary for temporary in put.files)):
                for temporary, name in put.files.items():
                    (self._path / temporary).replace(self._path / name)
            found = path.stat().st_size
        except FileNotFoundError as error:
            self._lock.require_here(self._path)
            raise ResidscopeError(f"shard {record.shard}: {error.filename} is gone; {_AGAIN}") from None
        if found != record.bytes:
            raise ResidscopeError(f"{path} should have {record.bytes} bytes, found {found}; {_AGAIN}")
        for folder in {(self._path / name).parent for name in put.files.values()}:
            sync(folder)
        with self._appending:
            self._lock.require_here(self._path)
            self._manifest.lines[record.shard] = self._lines.append(record)

    def close(self) -> None:
        self._lines.close()
        self._lock.close()
