"""crc32c of some bytes, by the fastest library that is installed.

How: awscrt (the extra `fast`) multiplies without carries, 64 bytes at a time where the processor can, and so checks a
chunk at the speed at which the cache gives it: 8 times as fast as google-crc32c, which asks the processor's crc32
instruction for 8 bytes at a time and is what is always there. Both give the same number, copy nothing, and let other
threads run meanwhile. The library is loaded at the first checksum: it takes a tenth of a second. What it does not do:
any other checksum (the manifest's are xxh3).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np


def crc32c(data: bytes | np.ndarray) -> int:
    """The checksum of bytes or of a contiguous array. (Not of a memory view: google-crc32c takes none.)"""
    return _fastest()(data)


@cache
def _fastest() -> Callable[[Any], int]:
    try:
        from awscrt.checksums import crc32c as fast
    except ImportError:
        from google_crc32c import value

        return value
    return fast
