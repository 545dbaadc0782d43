"""Whether a command can run in the address space that it is given; and keeping freed memory in the process, rather
than returning it to the system and fetching it again a moment later.

Libraries abort in native code, or fail in ways of their own, where they are refused memory while they load. So a
command that starts under a limit (`ulimit -v`) is refused below what it takes on the smallest of models.

By default glibc's malloc returns freed memory of some megabytes at once, and each layer's or step's temporaries are
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
"""Names of malloc.h."""

_OLDEST_BYTES = 2**25
"""The largest block that is kept before glibc 2.35."""

_TRIM_BYTES = 2**31 - 1
"""The largest that an int holds: what is free beyond it is given back."""


NEEDED_GB = {"harvest": 2.0, "train": 1.7, "train compare": 2.5, "analyze": 3.6}
NEEDED_GB |= {"residscope fit-lens": 1.7, "residscope convert": 0.8, "residscope demo": 3.6}
"""The address space that each command took with 3 layers and d_model 32, on Linux with 2 cores. Most of it is never
touched: it is for libraries and the heaps of their threads."""


def require_address_space(command: str) -> None:
    """`ResidscopeError` where this process may not have the address space that `command` needs at least."""
    limit, needed = resource.getrlimit(resource.RLIMIT_AS)[0], NEEDED_GB.get(command, 0)
    if limit != resource.RLIM_INFINITY and limit < needed * 1e9:
        raise ResidscopeError(
            f"not enough memory: the limit of the address space (`ulimit -v`) is {limit / 1e9:.3g} GB, and {command} "
            f"needs at least {needed} GB on the smallest model: raise it (`ulimit -v unlimited`)"
        )


def free_memory() -> int | None:
    """Bytes of main memory that can be had now, or None where the system does not tell."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return None


@functools.cache
def keep_freed_memory(largest: int = 2**30) -> bool:
    """Set it for this process; gives whether the allocator took it. Blocks above `largest` come straight from the
    system and go straight back: those whose size changes from step to step would leave holes that none fits into."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have no such function, Windows no such handle.
        return False
    taken = any(mallopt(_M_MMAP_THRESHOLD, size) for size in (largest, _OLDEST_BYTES))
    return taken and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
