"""ShardWriter: puts shards into a store that is open for writing, each durably, and each counted only once it is whole.

How: a shard is packed (pack.py), its file is put in place, then its moments, then its manifest line, before which it
does not count. The writer holds the store's lock; what the manifest says in memory follows each line. What it does not
do: read, or decide which shards there should be (activations.py).

Shapes: t valid tokens of a shard, L stored layers, D = d_model.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from residscope.errors import ResidscopeError, UsageError
from store import arrays
from store.dtypes import STORAGE_DTYPE, first_unstorable, to_float32
from store.files import atomic_write, sync
from store.manifest import Manifest, ManifestWriter, ShardRecord, WriterLock
from store.meta import StoreMeta
from store.moments import ShardMoments
from store.shards import ShardReader, shard_name

if TYPE_CHECKING:
    from store.pack import ShardPacker


class ShardWriter:
    """Writes shards of one store until it is closed."""

    def __init__(self, path: Path, meta: StoreMeta, manifest: Manifest, lock: WriterLock) -> None:
        """Take over the `lock` of the store at `path`; `manifest` gets a line for each shard that is written."""
        self._path, self._meta, self._manifest, self._lock = path, meta, manifest, lock
        self._lines = ManifestWriter(path, manifest.sound_bytes)
        self._packer: ShardPacker | None = None

    def write(
        self, shard: int, data: np.ndarray, keep: np.ndarray, *, claimed: np.ndarray | None = None, threads: int = 1
    ) -> None:
        """Write one shard: data [t, L, D], float32 or the stored format; keep: bool [t], the store's own mask, and
        what the caller takes it for."""
        packer = self._packer_for(shard)
        meta = self._meta
        start, stop = meta.shard_bounds(shard)
        expected = (stop - start, meta.n_layers, meta.d_model)
        if data.shape != expected:
            raise UsageError(f"shard {shard} should have shape {expected} (token, layer, d_model), found {data.shape}")
        if data.dtype not in (np.float32, STORAGE_DTYPE[meta.stored_dtype]):
            raise UsageError(f"shard {shard} should be float32 or {meta.stored_dtype}, found {data.dtype}")
        if claimed is not None and not np.array_equal(claimed, keep):
            raise UsageError(f"shard {shard}: keep differs from the store's own mask")
        try:
            packed = packer.pack(data, keep, threads)
        except ValueError:
            raise self._unstorable(shard, data) from None
        atomic_write(self._path / shard_name(shard), packed.parts)
        self._commit(shard, packed.moments, packed.n_bytes, packed.xxh3_128)

    def adopt(self, shard: int, keep: np.ndarray) -> None:
        """Take in the file of a shard that is in its place already; keep: bool [t], the store's own mask."""
        packer = self._packer_for(shard)
        start, stop = self._meta.shard_bounds(shard)
        path = self._path / shard_name(shard)
        data = path.read_bytes()
        with ShardReader(path, self._meta, len(data)) as reader:
            raw = reader.read_shard(stop - start)
        if first_unstorable(raw, self._meta.stored_dtype) is not None:
            raise self._unstorable(shard, raw)
        sync(path)
        sync(path.parent)
        moments = packer.pack(raw, keep).moments
        self._commit(shard, moments, len(data), xxhash.xxh3_128_hexdigest(data))

    def close(self) -> None:
        """Give up the lock."""
        self._lines.close()
        self._lock.release()

    def _packer_for(self, shard: int) -> "ShardPacker":
        """The packer, for a shard that may be written."""
        if shard in self._manifest.lines:
            raise UsageError(f"{self._path}: shard {shard} is written already")
        if self._packer is None:
            from store.pack import ShardPacker  # Brings the compiler of the kernels, which readers do without.

            self._packer = ShardPacker(self._meta)
        return self._packer

    def _commit(self, shard: int, moments: ShardMoments, n_bytes: int, xxh3_128: str) -> None:
        """Make a shard whose file is in place count: its moments, then its line."""
        start, stop = self._meta.shard_bounds(shard)
        numbers = arrays.encode_numbers(np.stack([moments.mean, moments.m2]))
        atomic_write(self._path / arrays.moments_name(shard), [numbers])
        record = ShardRecord(
            shard=shard,
            tokens=stop - start,
            kept=moments.count,
            bytes=n_bytes,
            xxh3_128=xxh3_128,
            moments_xxh3_128=xxhash.xxh3_128_hexdigest(numbers),
            norm_sums=moments.norm_sums.tolist(),
            config_hash=self._meta.config_hash,
        )
        self._manifest.lines[shard] = self._lines.append(record)

    def _unstorable(self, shard: int, data: np.ndarray) -> ResidscopeError:
        """The error for a value that the stored format cannot hold."""
        meta = self._meta
        where = first_unstorable(data, meta.stored_dtype)
        assert where is not None
        token, layer, dimension = where
        value = data[where] if data.dtype == np.float32 else to_float32(data[where][None], meta.stored_dtype)[0]
        return ResidscopeError(
            f"layer {meta.layers[layer]}, token {meta.shard_bounds(shard)[0] + token}, dimension "
            f"{dimension}: the value {value} is no finite number of {meta.stored_dtype}. Nothing of shard {shard} "
            "was written. Try another --store-dtype (bfloat16 has the range of float32) or --dtype"
        )
