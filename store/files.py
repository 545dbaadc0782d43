"""Durable file writes: what is on the disk after a crash is the old file or the new one, whole.

How: temporary file, fsync, rename, fsync of the folder. Temporary names are fixed (`NAME.tmp`), so that leftovers are
recognised. Tested in tests/store/test_faults.py, which stops at every single step.
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
    """Write `parts`, one after another, as the file `path`: durable when this returns, and no file on an error."""
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
    """Whatever is raised within, none of the files stay."""
    try:
        yield
    except BaseException:
        # The error that stopped the write is the one to tell; a read-only disk would refuse the removal too.
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
    """Make every file and folder below `folder`, and itself, durable."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def remove_leftovers(folder: Path, shards: Collection[int] = ()) -> None:
    """Remove temporary folders that a crash left in `folder`, and temporary files in other folders there; at a URL, the
    objects of other shards than `shards`."""
    if isinstance(folder, URL):
        for path in folder.glob("c.*.0.0*"):
            if (number := path.name.split(".")[1]).isdigit() and int(number) not in shards:
                path.unlink(missing_ok=True)
        return
    for path in (found for found in folder.glob(f"incoming-*{TEMPORARY}") if found.is_dir()):
        # Renamed first, so that who still writes into it finds none.
        shutil.rmtree(path.replace(path.with_name(path.name + TEMPORARY)))
    for path in folder.glob(f"*/*{TEMPORARY}"):
        path.unlink(missing_ok=True)
