"""ActivationStore: make, open, read, write and summarise a store of residual stream vectors, on a disk or at a URL.

How: the arrays are Zarr v3 (see docs/store-format.md). Shards are read and written directly (shards.py), and exist for
readers once the manifest has their line (manifest.py). A reader checks all data that it returns against the manifest as
it was when the store was opened, so a store that has since been replaced by another is refused: shards are checked by
their lines and their chunks' crc32c, metadata and token arrays by the header, statistics by the shards' norms. Reading
a missing shard raises; it never gives zeros.

Shapes: T tokens, L stored layers, D = d_model, C tokens in a chunk; t tokens and l layers asked for.
"""

import itertools
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from residscope.errors import IncompatibleError, UsageError
from residscope.urls import URL, as_path
from store import arrays
from store.arrays import TokenTable
from store.care.ring import Moments, ring_of
from store.dtypes import STORAGE_DTYPE, to_float32
from store.files import TEMPORARY, atomic_write, remove_leftovers
from store.folder import make_folder, read_meta, require_store
from store.manifest import Manifest, ShardRecord, WriterLock, read_manifest, sort_lines
from store.meta import StoreMeta
from store.moments import LayerStatistics, statistics
from store.remote.objects import THREADS, ObjectLock, StoreLock
from store.shards import PutShard, ShardFiles, ShardReader, ShardWriter, shard_name

_FILL = "run the same `harvest` command again to fill"


class ActivationStore:
    """An open store, made by `create` or `open`. Pickles as its path and content hash; unpickled open for reading."""

    def __init__(
        self, path: Path, meta: StoreMeta, manifest: Manifest, lock: StoreLock | None, *, follow: bool = False
    ) -> None:
        """For `create` and `open`; with `lock` the store is open for writing."""
        self.ring = ring_of(meta)
        """How a rolling store is divided into parts; None for any other store."""
        self._only_kept_shards = self.ring is not None and not (lock or follow)
        self.path = path
        self.meta = meta
        self._manifest = manifest
        self._records: dict[int, ShardRecord] = {}
        self._indexes: dict[int, np.ndarray] = {}  # By shard, once its file was found to match its manifest line.
        self._intact: set[int] = set()  # Shards whose whole files were hashed and match.
        self._locks: dict[int, threading.Lock] = {}
        self.objects: dict[Any, Any] = {}  # At a URL: a cache that the shards' readers share.
        self._files = ShardFiles(path, meta, lock)
        self._writer = ShardWriter(path, manifest, lock) if lock else None

    @classmethod
    def create(cls, path: str | os.PathLike[str], meta: StoreMeta, tokens: TokenTable) -> "ActivationStore":
        """Make a store without shards, and open it for writing.

        A crash leaves no store at `path`, and the next `create` clears the leftovers. Raises `UsageError` when
        `tokens` do not fit `meta`, `IncompatibleError` when something already exists at `path`, `ResidscopeError` when
        another process is making the store.
        """
        path, lock = make_folder(as_path(path), meta, arrays.checked_tokens(tokens, meta.n_tokens))
        try:
            return cls(path, meta, read_manifest(path), lock)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        partial: bool = False,
        writable: bool = False,
        follow: bool = False,
        content_hash: str | None = None,
    ) -> "ActivationStore":
        """Open a store for reading, or with `writable` for filling missing shards.

        partial: also open a store that lacks shards (reading one of those raises). writable: take the writer's lock,
        cut off a torn manifest line, and remove temporary files that a crash left; implies `partial`. follow: in a
        rolling store (`store.care.ring`), include the tokens of all shards, whether or not they are on the disk.
        content_hash: the hash that the store must have. Raises `UsageError` when nothing is at `path`;
        `IncompatibleError` when it is not a store, has another version or content, lacks shards, or has damaged
        metadata or a damaged manifest; `ResidscopeError` when another process is writing it.
        """
        path = as_path(path)
        require_store(path)
        lock = (ObjectLock(path) if isinstance(path, URL) else WriterLock(path, path)) if writable else None
        try:
            manifest = read_manifest(path)
            store = cls(path, read_meta(path, manifest), manifest, lock, follow=follow)
            if content_hash not in (None, store.content_hash):
                raise IncompatibleError(
                    f"{path} is not the store that was opened first: its content hash should be {content_hash}, found "
                    f"{store.content_hash}; put the first store back, or run the command again"
                )
            if not (partial or writable or (follow and store.ring)):
                store._require_all_shards(store.ring and store.ring.kept_shards)
            if writable:
                remove_leftovers(path, manifest.lines)
            return store
        except BaseException:
            if lock:
                lock.close()
            raise

    def close(self) -> None:
        """Release the writer's lock; a store that is open for reading has nothing to close."""
        if self._writer:
            self._writer.close()
        self._writer = None

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        shape = f"{self.meta.n_tokens:,} tokens x {self.meta.n_layers} layers x {self.meta.d_model}"
        return f"ActivationStore({str(self.path)!r}: {shape}, {self.meta.stored_dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(ActivationStore.open, partial=True, content_hash=self.content_hash), (str(self.path),)

    # Contents

    @cached_property
    def tokens(self) -> TokenTable:
        """Token ids, documents, positions and the keep mask, each [T]; read once, read-only."""
        tokens = arrays.read_tokens(self.path, self.meta, self._manifest.checksums)
        if self.ring and self._only_kept_shards:
            stay = np.arange(len(tokens.keep)) < self.ring.kept_shards * self.meta.shard_tokens
            tokens = tokens._replace(keep=tokens.keep & stay)
        return tokens

    def missing_shards(self) -> list[int]:
        """Shards that are not in the manifest, ascending."""
        return [shard for shard in range(self.meta.n_shards) if shard not in self._manifest.lines]

    def refresh(self) -> None:
        """Look for shards that were added since the store was opened for reading."""
        manifest = read_manifest(self.path)
        if manifest.checksums != self._manifest.checksums:
            raise IncompatibleError(f"{self.path} was replaced by another store while it was in use; put it back")
        self._manifest = manifest

    def _require_all_shards(self, first: int | None = None) -> None:
        if missing := [shard for shard in self.missing_shards() if first is None or shard < first]:
            found = f"{len(missing)} of {self.meta.n_shards} shards are missing"
            raise IncompatibleError(f"{self.path}: {found}; {_FILL} them")

    def record(self, shard: int) -> ShardRecord:
        """The manifest's record of a shard; `IncompatibleError` when the shard is missing."""
        if shard not in self._records:
            start, stop = self.meta.shard_bounds(shard)
            if shard not in self._manifest.lines:
                which = f"shard {shard} (tokens {start} to {stop - 1})"
                raise IncompatibleError(f"{self.path}: {which} is missing; {_FILL} it")
            self._records[shard] = self._manifest.record(shard)
        return self._records[shard]

    @property
    def content_hash(self) -> str:
        """Identifies the data: a hash over the config hash and the hashes of the shards that are present; in a rolling
        store, over the config hash alone."""
        digest = xxhash.xxh3_128(self.meta.config_hash.encode())
        for shard in [] if self.ring else sorted(self._manifest.lines):
            digest.update(f"{shard}:{self.record(shard).xxh3_128};".encode())
        return digest.hexdigest()

    # Reading

    def read(
        self, tokens: slice | None = None, layers: slice | Sequence[int] | None = None, *, raw: bool = False
    ) -> np.ndarray:
        """Vectors [t, l, D] of a range of tokens at some stored layers, as float32 or, with `raw`, as they are stored.

        tokens: a slice of step 1. layers: stored layers, 0..L-1. Raises when a shard is missing or damaged, and
        `IndexError` for a layer that does not exist.
        """
        meta, size = self.meta, self.meta.chunk_tokens
        tokens = slice(None) if tokens is None else tokens
        if not isinstance(tokens, slice) or tokens.step not in (None, 1):
            raise UsageError(f"read: tokens should be a slice of step 1, found {tokens!r:.60}")
        start, stop, _ = tokens.indices(meta.n_tokens)
        chosen = meta.layer_indices(layers)
        block = np.empty((size, meta.d_model), STORAGE_DTYPE[meta.stored_dtype])
        block_bytes = block.reshape(-1).view(np.uint8)
        out = np.empty((max(stop - start, 0), len(chosen), meta.d_model), block.dtype if raw else np.float32)
        chunks = np.arange(start // size, -(-stop // size)) if start < stop else np.arange(0)
        for shard, group in self._by_shard(chunks):
            with self._reader(shard) as reader:
                reader.fetch((chunks[group] % meta.chunks_per_shard)[:, None], np.array(chosen, np.int64))
                for chunk in chunks[group].tolist():
                    first, end = max(chunk * size, start), min((chunk + 1) * size, stop)
                    rows = block[first - chunk * size : end - chunk * size]
                    for i, layer in enumerate(chosen):
                        reader.read_chunk(chunk % meta.chunks_per_shard, layer, block_bytes)
                        target = out[first - start : end - start, i]
                        if raw:
                            target[...] = rows
                        else:
                            to_float32(rows, meta.stored_dtype, target)
        return out

    def read_blocks(self, chunk: np.ndarray, layer: np.ndarray, out: np.ndarray, threads: int = 4) -> None:
        """Fill out [n, C, D] (stored format, contiguous) with inner chunks, given in any order, with several threads.

        chunk: int64 [n], token chunks of the store; layer: int64 [n], stored layers. Rows beyond the store's last token
        are zero. Raises when a shard is missing or damaged.
        """
        order = np.lexsort((layer, chunk))
        target = out.reshape(len(out), out.shape[1] * out.shape[2]).view(np.uint8)  # -1 would fail for n = 0
        sorted_chunk, sorted_layer = chunk[order], layer[order]
        within = sorted_chunk % self.meta.chunks_per_shard
        blocks = np.stack([within, sorted_layer, order], axis=1)  # [n, 3]

        def fill(shard: int, group: slice) -> None:
            with self._reader(shard) as reader:
                reader.fetch(within[group], sorted_layer[group])
                for chunk_in_shard, layer_index, row in blocks[group].tolist():
                    reader.read_chunk(chunk_in_shard, layer_index, target[row])

        threads = THREADS if isinstance(self.path, URL) else threads  # requests mostly wait for the network
        # A part is at most one thread's share, so that all threads work even if all chunks are in one shard.
        share, groups = max(-(-len(order) // threads), 1), self._by_shard(sorted_chunk)
        parts = [(s, slice(i, min(i + share, g.stop))) for s, g in groups for i in range(g.start, g.stop, share)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: fill(*part), parts))

    def _by_shard(self, chunks: np.ndarray) -> list[tuple[int, slice]]:
        """Group ascending token chunks by shard: each shard, and the slice of `chunks` that is in it."""
        shards = chunks // self.meta.chunks_per_shard
        bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]
        return [(int(shards[a]), slice(a, b)) for a, b in itertools.pairwise(bounds) if a < b]

    def require_intact(self, shard: int) -> None:
        """Raise `DamagedError` unless a shard's whole file has the hash of its manifest line; checks it only once."""
        if shard not in self._intact:
            self._reader(shard, whole=True).close()
            self._intact.add(shard)

    def _reader(self, shard: int, *, whole: bool = False) -> ShardReader:
        """A reader of a shard's file, which is checked against its manifest line at first, and with `whole` always."""
        record, path = self.record(shard), self.path / shard_name(shard)
        with self._locks.setdefault(shard, threading.Lock()):
            index = None if whole else self._indexes.get(shard)
            reader = ShardReader(path, self.meta, record.bytes, index, self.objects)
            if index is None:
                try:
                    reader.require_own(record, None if whole else self._keep_of(shard))
                except BaseException:
                    reader.close()
                    raise
                self._indexes[shard] = reader.index
            return reader

    # Writing

    def write_shard(self, shard: int, data: np.ndarray, keep: np.ndarray | None = None) -> None:
        """Write one shard durably and add it to the manifest. Threads may write different shards at once.

        data: [t, L, D], t the shard's valid tokens, float32 or the stored format; fastest when each layer's [t, D] is
        contiguous, as in a transposed [L, t, D] array. keep: bool [t], the store's own mask, checked when given. For a
        value that is not finite or too large for the stored format, `ResidscopeError` names its layer and token, and
        nothing is written.
        """
        writer = self._open_writer()
        writer.require_missing(shard)
        if keep is not None and not np.array_equal(keep, self._keep_of(shard)):
            raise UsageError(f"shard {shard}: keep differs from the store's own mask")
        try:
            put = self._files.put(shard, data, self._keep_of(shard))
        except FileNotFoundError:
            writer.require_missing(shard)
            raise
        writer.commit(put)

    @contextmanager
    def incoming(self) -> Iterator[str]:
        """A folder below the store, open for writing, for what other processes put into it; removed at the end, or by
        whoever opens the store for writing next. From then on a process that was left over cannot write."""
        folder = self.path / f"incoming-{uuid.uuid4().hex}{TEMPORARY}"
        folder.mkdir()
        try:
            yield folder.name
        finally:
            if folder.exists():  # Else another store may be at the path.
                remove_leftovers(self.path)

    def put_shard(self, shard: int, data: np.ndarray, folder: str) -> PutShard:
        """Like `write_shard`, but into the folder `incoming` of the process that holds the lock, which commits it."""
        return self._files.put(shard, data, self._keep_of(shard), folder)

    def commit_shard(self, put: PutShard) -> None:
        """Add a shard that another process has put to the manifest; `ResidscopeError` when its files are missing."""
        self._open_writer().commit(put)

    def _open_writer(self) -> ShardWriter:
        if self._writer is None:
            raise UsageError(f"{self.path}: the store is open for reading only; open it with writable=True")
        return self._writer

    def _keep_of(self, shard: int) -> np.ndarray:
        """The store's own mask of a shard, bool [t]."""
        return self.tokens.keep[slice(*self.meta.shard_bounds(shard))]

    # Statistics

    def statistics(self) -> LayerStatistics:
        """Mean, variance and norm by stored layer, over the kept tokens of the shards that are present."""
        if self.missing_shards():
            return self.merged_statistics()
        records = [self.record(shard) for shard in sorted(self._manifest.lines)]
        norm_sums = np.sum([record.norm_sums for record in records], axis=0)
        count = sum(record.kept for record in records)
        return arrays.read_statistics(self.path, self.meta, count, norm_sums) or self.merged_statistics()

    def finalize(self) -> None:
        """Write `layer_mean`, `layer_var` and `layer_norm` (the same bytes each time), and sort the manifest.
        No shard may be missing."""
        self._open_writer()
        self._require_all_shards()
        for name, data in arrays.statistics_chunks(self.merged_statistics()).items():
            atomic_write(self.path / name, [data])
        if list(self._manifest.lines) != sorted(self._manifest.lines) and not isinstance(self.path, URL):
            sort_lines(self.path)

    def merged_statistics(self) -> LayerStatistics:
        """Like `statistics`, but always merged from the shards' moments (`store.care.ring.Moments`)."""
        return statistics(self.moments.all())

    @property
    def moments(self) -> Moments:
        """The moments of all shards in the manifest, including those whose files a rolling store has removed."""
        return Moments(self.path, self.meta, {shard: self.record(shard) for shard in self._manifest.lines})
