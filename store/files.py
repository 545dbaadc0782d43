"""Durable, atomic file writes: after a crash the disk has either the whole old file or the whole new one.

How: temporary file, fsync, rename, fsync of the folder. Temporary names are fixed (`NAME.tmp`), so that leftovers are
recognised. Tested in tests/store/test_faults.py, which simulates a crash at every step.
"""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from residscope.destinations import sync
from residscope.urls import URL

TEMPORARY = ".tmp"


def atomic_write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write `parts`, one after another, as the file `path`: durable when this returns, no leftovers on an error."""
    if isinstance(path, URL):
        path.put(b"".join(parts))
        return
    temporary = path.with_name(path.name + TEMPORARY)
    with removed_on_error(temporary):
        write_synced(temporary, parts)
        temporary.replace(path)
    sync(path.parent)


def write_synced(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write `parts`, one after another, into the file `path`, and sync its content."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for part in parts:
            write_all(descriptor, memoryview(part).cast("B"), path)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def removed_on_error(*paths: Path) -> Iterator[None]:
    """Remove the files if anything is raised within the block."""
    try:
        yield
    except BaseException:
        # Report the error that stopped the write; a read-only disk would refuse the removal too.
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def write_all(descriptor: int, data: memoryview, path: Path) -> None:
    """Write every byte of `data` at the descriptor's position; an `OSError` names `path`."""
    done = 0
    while done < len(data):
        try:
            done += os.write(descriptor, data[done:])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


def sync_tree(folder: Path) -> None:
    """Make `folder` and every file and folder below it durable."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def remove_leftovers(folder: Path, shards: Collection[int] = ()) -> None:
    """Remove temporary folders and files that a crash left in the store `folder`; at a URL, remove the objects of
    shards that are not in `shards`."""
    if isinstance(folder, URL):
        for path in folder.glob("c.*.0.0*"):
            if (number := path.name.split(".")[1]).isdigit() and int(number) not in shards:
                path.unlink(missing_ok=True)
        return
    for path in filter(Path.is_dir, folder.glob(f"incoming-*{TEMPORARY}")):
        # Renamed first, so that a process that still writes into it fails.
        shutil.rmtree(path.replace(path.with_name(path.name + TEMPORARY)))
    for path in folder.glob(f"*/*{TEMPORARY}"):
        path.unlink(missing_ok=True)
