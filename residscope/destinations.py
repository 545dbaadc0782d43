"""Where results may go: not where another process writes, not over another command's, and not on a full disk."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from residscope.console import human_bytes
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from residscope.reading import read_json


@contextlib.contextmanager
def held_alone(folder: Path, out: Path) -> Iterator[None]:
    """Hold `folder`, in which results for `out` are made; `ResidscopeError` where another process does.

    The lock ends with the process, however it ends. A file system without locks keeps nobody out.
    """
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


def require_folder(out: Path) -> None:
    """`UsageError` where something that is no folder stands at `out`."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} should be a folder, found a file: choose another name")


def refuse_comparison_of(command: str, out: Path, member: str) -> None:
    """`UsageError` where the folder `out` holds the compare.json of `command`, which has `member`: two commands
    compare, and give their files the same names."""
    try:
        found = read_json(out / "compare.json")
    except (OSError, IncompatibleError):
        return
    if isinstance(found, dict) and member in found:
        raise UsageError(f"--out {out} already contains a comparison by `{command}`: choose another folder")


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
