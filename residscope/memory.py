"""Checks whether a command can run under its address space limit, and keeps freed memory in the process rather than
returning it to the system and requesting it again a moment later.

Libraries that are refused memory while they load abort in native code, or fail in their own ways. So under a limit
(`ulimit -v`) a command refuses to start with less than it needs on the smallest model.

By default glibc's malloc returns freed blocks of some megabytes at once, and the next layer's or step's temporaries are
then faulted in page by page: on 2 cores that was 12 % of a float32 forward pass and 6 % of a training step. Other
allocators and systems, and memory that CUDA manages, are left as they are.
"""

import contextlib
import ctypes
import functools
import resource
from pathlib import Path

from residscope.errors import ResidscopeError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Constants of malloc.h."""

_OLDEST_BYTES = 2**25
"""The largest block that glibc before 2.35 can keep."""

_TRIM_BYTES = 2**31 - 1
"""The largest int: free memory beyond it is returned to the system."""


NEEDED_GB = {"harvest": 2.0, "train": 1.7, "train compare": 2.5, "analyze": 3.6}
NEEDED_GB |= {"residscope fit-lens": 1.7, "residscope convert": 0.8, "residscope demo": 3.6}
"""The address space that each command took with 3 layers and d_model 32, on Linux with 2 cores. Most of it is never
used: it is reserved by libraries and for the heaps of their threads."""


def require_address_space(command: str) -> None:
    """`ResidscopeError` if this process's limit on address space is below the minimum for `command`."""
    limit, needed = resource.getrlimit(resource.RLIMIT_AS)[0], NEEDED_GB.get(command, 0)
    if limit != resource.RLIM_INFINITY and limit < needed * 1e9:
        raise ResidscopeError(
            f"not enough memory: the address space limit (`ulimit -v`) is {limit / 1e9:.3g} GB, and {command} needs "
            f"at least {needed} GB even for the smallest model: raise it (`ulimit -v unlimited`)"
        )


def free_memory() -> int | None:
    """Bytes of main memory that are available now, or None if the system does not tell."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return None


@functools.cache
def keep_freed_memory(largest: int = 2**30) -> bool:
    """Set this for the process; returns whether the allocator accepted it. Blocks above `largest` still come straight
    from the system and go straight back: kept blocks of changing size would leave holes that no other block fits."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have no such function, Windows no such handle.
        return False
    taken = any(mallopt(_M_MMAP_THRESHOLD, size) for size in (largest, _OLDEST_BYTES))
    return taken and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
