"""Turns whatever a library raises on a bad input file into a one-line error that names the file.

Each library has its own ways to refuse bad input, which change between versions: ValueErrors, RecursionErrors for
endless brackets, classes of its own. So they are not listed: everything raised within `reading` is blamed on the file,
except our own errors, refused memory, and errors of the disk.
"""

import errno
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from residscope.console import human_bytes
from residscope.errors import IncompatibleError, ResidscopeError, is_out_of_memory, said

_DAMAGE = (None, errno.EINVAL)
"""Codes of an OSError that is about a file's content: none, or a position outside the file."""

CONFIG_BYTES = 64 << 20
"""The largest JSON file of settings or results that is read."""


@contextmanager
def reading(what: object, way_out: str = "", kind: type[ResidscopeError] = IncompatibleError) -> Iterator[None]:
    """Wrap a block that reads `what` (named for the user): a library's error becomes one of `kind`, with `way_out`."""
    try:
        yield
    except ResidscopeError:
        raise
    except BaseException as error:
        # A library in Rust raises PanicException when it crashes, which is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno not in _DAMAGE):
            raise
        raise kind(f"{what} ({said(error)}){way_out and f': {way_out}'}") from None


def read_whole(path: Path, most: int) -> bytes:
    """A file's bytes; `ValueError` for more than `most` bytes, or if it is not a file (a device has no end)."""
    found = path.stat()
    if found.st_size > most or not stat.S_ISREG(found.st_mode):
        size = human_bytes(found.st_size) if stat.S_ISREG(found.st_mode) else "a folder, pipe or device"
        raise ValueError(f"should be a file of at most {human_bytes(most)}, found {size}")
    return path.read_bytes()


def read_json(path: Path, way_out: str = "") -> Any:
    """The content of a JSON file; `IncompatibleError`, with `way_out`, if it is not valid."""
    with reading(f"{path}: not valid JSON", way_out):
        return json.loads(read_whole(path, CONFIG_BYTES))
