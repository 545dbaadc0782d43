"""Writing a store at a URL: who may, and the manifest's lines, by conditional requests instead of locks and appends.

How: the manifest is in objects of at most 256 lines (segments), of which the last is replaced on condition that it is
as this writer left it. Who opens a store for writing puts a blank line at the end of the last segment (or begins the
next), so that every earlier writer fails at its next line, and is told. A shard's object is put on condition that none
is there, so that the late upload of such a writer cannot exchange what counts by then. What a killed writer left
without a line is removed on opening. A server without conditions takes every writer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from residscope.errors import ResidscopeError
from residscope.urls import URL, ConflictError
from store.manifest import FOLDER, WriterLock, is_intact

_MOST_LINES = 256


class ObjectLock:
    """The right to write a store at a URL, and its manifest's writer: a `WriterLock` and a `ManifestWriter`."""

    def __init__(self, store: URL) -> None:
        """Take over from earlier writers, who cannot commit any more."""
        numbers = [int(path.stem) for path in (store / FOLDER).glob("*.jsonl") if path.stem.isdigit()]
        self._store, self._number, self._data = store, max(numbers, default=0), b""
        self._tag: Any = "create"
        if numbers:
            found = self._segment.get()
            self._data, self._tag = bytes(found.data), found.tag
        self._add(b"\n")

    @property
    def _segment(self) -> URL:
        return self._store / FOLDER / f"{self._number}.jsonl"

    def _add(self, line: bytes) -> None:
        if self._data.count(b"\n") >= _MOST_LINES:
            self._number, self._tag, self._data = self._number + 1, "create", b""
        try:
            self._tag = self._segment.put(self._data + line, self._tag)
        except ConflictError:
            raise self._lost() from None
        self._data += line

    def append(self, line: bytes) -> None:
        """Add a line to the manifest; `ResidscopeError` where another process has taken over."""
        self._data = b"".join(line for line in self._data.splitlines(keepends=True) if is_intact(line[:-1]))
        self._add(line)

    def write(self, path: Path, parts: Sequence[bytes | memoryview], xxh3: str) -> None:
        """Make an object of a shard, without a line yet, and note its hash beside it."""
        assert isinstance(path, URL)
        data = b"".join(parts)
        try:
            path.put(data, "create", xxh3)
        except ConflictError:  # put by who had the store before, after this one had looked for such
            self.require_here(self._store)
            path.put(data, path.head().tag, xxh3)

    def require_here(self, store: Path) -> None:
        """`ResidscopeError` where another process has taken over, or the store is gone."""
        try:
            if self._segment.head().tag["e_tag"] == self._tag["e_tag"]:
                return
        except FileNotFoundError:
            pass
        raise self._lost()

    def _lost(self) -> ResidscopeError:
        what = "another process has begun to write this store; wait until it ends, then run the same command again"
        return ResidscopeError(f"{self._store}: {what}")

    def release(self) -> None:
        """Nothing is held."""

    close = release

    def __enter__(self) -> "ObjectLock":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""


Lock = WriterLock | ObjectLock


def take_lock(folder: Path, name: Path) -> Lock:
    """The lock of a store in `folder`, which is called `name`, or at that URL; `ResidscopeError` where it is taken."""
    return ObjectLock(folder) if isinstance(folder, URL) else WriterLock(folder, name)
