"""Durable file writes: what is on the disk after a crash is the old file or the new one, whole.

How: temporary file, fsync, rename, fsync of the folder. Temporary names are fixed (`NAME.tmp`), so that leftovers are
known for what they are. What it does not do: know what is in the files.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from residscope.console import human_bytes
from residscope.errors import ResidscopeError

TEMPORARY = ".tmp"


def atomic_write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write `parts`, one after another, as the file `path`: durable when this returns, and no file on an error."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for part in parts:
                write_all(descriptor, memoryview(part).cast("B"), temporary)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        # The error that stopped the write is the one to tell; a read-only disk would refuse the removal too.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def held_alone(folder: Path, out: Path) -> Iterator[None]:
    """Hold `folder`, in which results for `out` are made; `ResidscopeError` where another process does. It ends with
    the process, whatever its end; a file system without locks keeps nobody out."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResidscopeError(
                f"--out {out}: another process is writing there; wait until it ends, or choose another"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
        yield
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview, path: Path) -> None:
    """Write every byte of `data` at the descriptor's position; an `OSError` names `path`."""
    done = 0
    while done < len(data):
        try:
            done += os.write(descriptor, data[done:])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder`, and itself, durable."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a crash left in the folders directly below `folder`."""
    for path in folder.glob(f"*/*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def require_space(path: str | os.PathLike[str], n_bytes: int) -> None:
    """Raise `ResidscopeError` when the disk that `path` is, or will be, on has less than `n_bytes` free."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ResidscopeError(
            f"{path}: needs {human_bytes(n_bytes)}, but its disk has {human_bytes(free)} free. Use fewer tokens "
            "(--max-tokens), fewer layers (--layers), --codec zstd, or another disk"
        )
