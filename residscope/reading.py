"""What is read from a file and is not what it should be: one line that names it, whatever a library raises.

Each library has its own ways to refuse bad input, and its next version has others: ValueErrors, RecursionErrors for
endless brackets, classes of its own. So none are listed: all that is raised within `reading` is the file's fault, but
for our own errors, memory that is refused, and what the disk says.
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
"""Codes of an OSError that is about what a file holds: none, or of a place beyond its ends."""

CONFIG_BYTES = 64 << 20
"""The largest JSON file of settings or results that is read."""


@contextmanager
def reading(what: object, way_out: str = "", kind: type[ResidscopeError] = IncompatibleError) -> Iterator[None]:
    """Within, `what` (the user's word) is read: an error of a library becomes one of `kind`, which adds `way_out`."""
    try:
        yield
    except ResidscopeError:
        raise
    except BaseException as error:
        # What a library in Rust raises where it fails itself is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno not in _DAMAGE):
            raise
        raise kind(f"{what} ({said(error)}){way_out and f': {way_out}'}") from None


def read_whole(path: Path, most: int) -> bytes:
    """A file's bytes; `ValueError` for one above `most` bytes and for what is no file (a device has no end)."""
    found = path.stat()
    if found.st_size > most or not stat.S_ISREG(found.st_mode):
        size = human_bytes(found.st_size) if stat.S_ISREG(found.st_mode) else "a folder, pipe or device"
        raise ValueError(f"should be a file of at most {human_bytes(most)}, found {size}")
    return path.read_bytes()


def read_json(path: Path, way_out: str = "") -> Any:
    """What a JSON file holds; `IncompatibleError` where it is none, which adds `way_out`."""
    with reading(f"{path}: not valid JSON", way_out):
        return json.loads(read_whole(path, CONFIG_BYTES))
