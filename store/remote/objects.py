"""A store's objects at a URL: reading parts of a shard's object, and writing with conditional requests.

Reading: touching ranges are merged, long ones split, and the parts requested in parallel. The first request for an
object notes its tag; later requests demand the same tag, so that no bytes of a replacement are used. Writing: the
manifest is split into objects of at most 256 lines; a writer replaces the last one only if it is as it left it. Opening
a store for writing adds blank lines to it (or begins the next), so that an earlier writer fails at its next line. A
shard is put only where none exists, so that a late upload by such a writer replaces no committed shard.
"""

import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock, get_ident
from typing import Any

import numpy as np
import xxhash

from residscope.errors import ResidscopeError
from residscope.urls import URL
from store.checksums import DamagedError
from store.manifest import FOLDER, ShardRecord, WriterLock, is_intact, sealed

THREADS = 32  # concurrent requests
HELD = "held"  # Key in `known` of the objects that are fetched whole and stay in memory.
_REQUESTS = ThreadPoolExecutor(THREADS, "request")
_LONGEST, _TAIL_BYTES, _MOST_LINES = 8 << 20, 1 << 16, 256


class ObjectFile:
    """Reads an object, and keeps what it has fetched as long as it lives."""

    def __init__(self, url: URL, n_bytes: int, known: dict[Any, Any]) -> None:
        """Request the tag, unless `known` has it. n_bytes: the size in the manifest. known: a cache that the readers of
        a store share: each object's tag by its URL, the last whole object of each thread, and the objects `HELD`."""
        self._url, self._known, self.size = url, known, n_bytes
        self.noted: str | None = None  # The XXH3-128 that its writer stored with it.
        whole, data = known.get(get_ident(), (None, b""))
        self._held = [(0, data)] if whole == url else []
        if url not in known:  # The index is at its end.
            start = max(n_bytes - _TAIL_BYTES, 0)
            data, self.size, known[url], self.noted = url.get(start, n_bytes)
            self._held = [(start, np.frombuffer(data, np.uint8))]
        if url in known.get(HELD, ()):  # The caller opens an object in one thread at a time.
            if (url, HELD) not in known:
                self.fetch([(0, self.size)])
                known[url, HELD] = self._held[-1][1]
            self._held = [(0, known[url, HELD])]

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Read these ranges (start, stop)."""
        for start, stop in merged(range_ for range_ in ranges if self._at(*range_) is None):
            parts = [(i, min(i + _LONGEST, stop)) for i in range(start, stop, _LONGEST)]
            found = self._get(parts[0]) if len(parts) == 1 else np.empty(stop - start, np.uint8)
            if len(parts) > 1:  # Each part is copied as it arrives, so that memory does not hold the object twice.
                targets = [found[a - start : b - start] for a, b in parts]
                list(_REQUESTS.map(lambda part, target: np.copyto(target, self._get(part)), parts, targets))
            self._held.append((start, found))
            if stop - start == self.size:  # After a shard is hashed, the same thread reads it.
                self._known[get_ident()] = self._url, self._held[-1][1]

    def read(self, n_bytes: int, start: int) -> np.ndarray:
        """`n_bytes` bytes from `start` as uint8, fewer at the end of the object."""
        range_ = start, min(start + n_bytes, self.size)
        found = self._at(*range_)
        return self._get(range_) if found is None else found

    def _at(self, start: int, stop: int) -> np.ndarray | None:
        found = (data[start - at : stop - at] for at, data in self._held if at <= start and stop <= at + len(data))
        return next(found, None)

    def _get(self, range_: tuple[int, int]) -> np.ndarray:
        try:
            return np.frombuffer(self._url.get(*range_, self._known[self._url]).data, np.uint8)
        except (FileNotFoundError, FileExistsError):
            raise DamagedError(self._url, "it was removed or replaced while it was in use") from None


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (start, stop) in order, with those that touch merged."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            start, stop = found[-1][0], max(stop, found.pop()[1])
        found.append((start, stop))
    return found


class ObjectLock:
    """The right to write a store at a URL, and its manifest's writer: a `WriterLock` and a `ManifestWriter` in one."""

    def __init__(self, store: URL) -> None:
        """Take over from earlier writers, which can then no longer commit."""
        numbers = [int(path.stem) for path in (store / FOLDER).glob("*.jsonl") if path.stem.isdigit()]
        self._store, self._number, self._data = store, max(numbers, default=0), b""
        self._tag: Any = "create"
        self._busy = Lock()  # Several threads may put shards.
        self._fault: ResidscopeError | None = None
        if numbers:
            data, _, self._tag, _ = self._segment.get()
            self._data = bytes(data)
        # A random number of them, so that two writers that open it at the same moment do not write the same bytes.
        self._add(b"\n" * (1 + secrets.randbelow(4096)))

    @property
    def _segment(self) -> URL:
        return self._store / FOLDER / f"{self._number}.jsonl"

    def _add(self, line: bytes) -> None:
        if sum(map(is_intact, self._data.splitlines())) >= _MOST_LINES:
            self._number, self._tag, self._data = self._number + 1, "create", b""
        try:
            self._tag = self._segment.put(self._data + line, self._tag)
        except FileExistsError:
            raise self._lost() from None
        except ResidscopeError as error:  # Other threads will report this error, too.
            self._fault = error
            raise
        self._data += line

    def append(self, record: ShardRecord | bytes) -> bytes:
        """Like `ManifestWriter.append`, but takes a line, too; `ResidscopeError` if another process has taken over."""
        with self._busy:
            self._data = b"".join(line for line in self._data.splitlines(keepends=True) if is_intact(line[:-1]))
            self._add(line := record if isinstance(record, bytes) else sealed(record._asdict()))
        return line[:-1]

    def write(self, path: Any, parts: Sequence[bytes | memoryview]) -> None:
        """Write an object that is not committed yet, with its hash as an attribute."""
        data = b"".join(parts)
        xxh3 = xxhash.xxh3_128_hexdigest(data)
        try:
            path.put(data, "create", xxh3)
        except FileExistsError:  # Put by an earlier writer after this one had removed such leftovers.
            self.require_here(self._store)
            path.put(data, path.get(head=True).tag, xxh3)

    def require_here(self, store: Path) -> None:
        """`ResidscopeError` if another process has taken over or the store is gone."""
        with self._busy:
            if self._fault:
                raise self._fault
            if not self._segment.is_file() or self._segment.get(head=True).tag["e_tag"] != self._tag["e_tag"]:
                raise self._lost()

    def _lost(self) -> ResidscopeError:
        return ResidscopeError(f"{self._store}: another process is writing this store now; wait until it ends")

    def close(self) -> None:
        """Does nothing: the next writer simply takes over."""


StoreLock = WriterLock | ObjectLock
