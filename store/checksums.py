"""Checksums of a store's bytes: crc32c after each chunk, XXH3-128 of whole files, and the error when one differs.

crc32c comes from the fastest library that is installed: awscrt (the extra `fast`) is 8 times as fast as google-crc32c,
which is always installed. Both give the same number, copy nothing, and release the interpreter's lock. The library is
loaded at the first checksum, because loading takes a tenth of a second.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from residscope.errors import IncompatibleError
from residscope.reading import CONFIG_BYTES, read_whole

CRC_BYTES = 4


class DamagedError(IncompatibleError):
    """A file of a store is missing, or was changed after it was written."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}. `residscope verify` lists everything that is damaged in a store")
        self.path, self.what = path, what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.what)  # By default an exception is unpickled from its message alone.


def crc32c(data: bytes | np.ndarray) -> int:
    """The checksum of bytes or of a contiguous array (google-crc32c takes no memory view)."""
    return _fastest()(data)


@cache
def _fastest() -> Callable[[Any], int]:
    try:
        from awscrt.checksums import crc32c as fast
    except ImportError:
        from google_crc32c import value

        return value
    return fast


def checksum(data: bytes | np.ndarray) -> bytes:
    """crc32c as it is stored after the data that it protects."""
    return crc32c(data).to_bytes(CRC_BYTES, "little")


def file_hashes(folder: Path) -> dict[str, str]:
    """xxh3-128 of every file below a folder, by its relative path; names that begin with a dot are left out."""
    return {
        path.relative_to(folder).as_posix(): xxhash.xxh3_128_hexdigest(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def read_small(path: Path, most: int = CONFIG_BYTES) -> bytes:
    """The content of a store's file of at most `most` bytes; raises when it is missing, larger, or not a file."""
    try:
        return read_whole(path, most)
    except FileNotFoundError:
        raise DamagedError(path, "the file is missing") from None
    except ValueError as error:
        raise DamagedError(path, str(error)) from None


def read_checked(folder: Path, name: str, hashes: Mapping[str, str]) -> bytes:
    """The file `name` of `folder`; raises when it is missing or its xxh3-128 is not the one in `hashes`."""
    path = folder / name
    data = read_small(path)
    if xxhash.xxh3_128_hexdigest(data) != hashes.get(name):
        raise DamagedError(path, "the file was changed after it was written")
    return data
