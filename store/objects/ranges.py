"""Reading parts of a shard's file, on a disk or of an object.

How: a local file is read as it is asked for. Of an object it is told first what will be needed (`fetch`): ranges that
touch are one, long ones are cut, and parts are asked for in parallel. The first look at an object takes its tag, and
later requests hold for an object with this tag alone, so that nothing of an exchanged one is used.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from residscope.urls import URL, ConflictError
from store.checksums import DamagedError

THREADS = 32
"""Requests under way at once."""
_LONGEST = 8 << 20
_TAIL_BYTES = 1 << 16


class LocalFile:
    """A file on a disk."""

    noted: str | None = None
    """XXH3-128 that its writer noted beside the bytes."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait
        self.size = os.fstat(self._descriptor).st_size

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Does nothing: a disk is asked for each range as it is read."""

    def read(self, n_bytes: int, start: int) -> Any:
        """A buffer of the bytes from `start` on, fewer at the end."""
        return os.pread(self._descriptor, n_bytes, start)

    def fill(self, out: np.ndarray, start: int) -> bool:
        """Fill uint8 `out`; gives whether there were bytes enough. macOS before 11 has no preadv."""
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [out.data], start) == out.nbytes
        return _filled(out, self.read(out.nbytes, start))

    def close(self) -> None:
        os.close(self._descriptor)


class ObjectFile:
    """An object, read as a `LocalFile` is; `known` keeps what the files of one store know, by their URLs."""

    def __init__(self, url: URL, n_bytes: int, known: dict[URL, Any]) -> None:
        """n_bytes: its size by the manifest, for the first look, which takes its end, where the index is."""
        self._url, self.noted, self.size = url, None, n_bytes
        self._held: list[tuple[int, np.ndarray]] = []
        if url not in known:
            start = max(n_bytes - _TAIL_BYTES, 0)
            data, self.size, known[url], self.noted = url.get(start, n_bytes)
            self._held.append((start, np.frombuffer(data, np.uint8)))
        self._tag = known[url]

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Read these ranges (start, stop), to be held until the file is closed."""
        runs = merged(range_ for range_ in ranges if self._at(*range_) is None)
        parts = [[(i, min(i + _LONGEST, stop)) for i in range(start, stop, _LONGEST)] for start, stop in runs]
        for run in parts:
            found = [*(_requests().map(self._get, run) if len(run) > 1 else map(self._get, run))]
            self._held.append((run[0][0], found[0] if len(found) == 1 else np.concatenate(found)))

    def read(self, n_bytes: int, start: int) -> Any:
        """As that of `LocalFile`."""
        range_ = start, min(start + n_bytes, self.size)
        found = self._at(*range_)
        return self._get(range_) if found is None else found

    def fill(self, out: np.ndarray, start: int) -> bool:
        """As that of `LocalFile`."""
        return _filled(out, self.read(out.nbytes, start))

    def close(self) -> None:
        """Nothing is open."""

    def _at(self, start: int, stop: int) -> np.ndarray | None:
        """Bytes that are held."""
        found = (data[start - at : stop - at] for at, data in self._held if at <= start and stop <= at + len(data))
        return next(found, None)

    def _get(self, range_: tuple[int, int]) -> np.ndarray:
        try:
            return np.frombuffer(self._url.get(*range_, self._tag).data, np.uint8)
        except (FileNotFoundError, ConflictError):
            raise DamagedError(self._url, "it was removed or exchanged while it was in use") from None


def open_file(path: Path, n_bytes: int, known: dict[URL, Any] | None) -> LocalFile | ObjectFile:
    """The file at `path`, which should have `n_bytes`; `FileNotFoundError` where there is none."""
    return ObjectFile(path, n_bytes, {} if known is None else known) if isinstance(path, URL) else LocalFile(path)


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (start, stop) in order, as one where they touch."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            start, stop = found[-1][0], max(stop, found.pop()[1])
        found.append((start, stop))
    return found


def _filled(out: np.ndarray, data: Any) -> bool:
    if len(data) == out.nbytes:
        out[:] = np.frombuffer(data, np.uint8)
    return len(data) == out.nbytes


@cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "request")
