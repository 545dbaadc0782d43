"""Keep freed memory in the process, rather than return it to the system and fetch it again a moment later.

By default glibc's malloc returns freed memory of some megabytes at once, and each layer's or step's temporaries are
then faulted in page by page: on 2 cores that was 12 % of a float32 forward pass and 6 % of a training step. The peak
stays as it is. Other allocators and systems, and memory that CUDA manages, are left as they are.
"""

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of malloc.h."""

_MMAP_BYTES = (2**30, 2**25)
"""Larger blocks come straight from the system and go straight back; the second is the most before glibc 2.35."""

_TRIM_BYTES = 2**31 - 1
"""The largest that an int holds: what is free beyond it is given back."""


@functools.cache
def keep_freed_memory() -> bool:
    """Set it for this process, once; gives whether the allocator took it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have no such function, Windows no such handle.
        return False
    taken = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_BYTES)
    return taken and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
