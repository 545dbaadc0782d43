"""How loops are compiled and run: numba's options, the cache of machine code, and the threads.

Loops are plain functions `loop(start, stop, *arrays)` over rows that do not depend on one another, compiled to release
the GIL, and run on chunks of rows by ordinary threads: the caller and a pool of `torch.get_num_threads() - 1`. A row is
computed by one thread in one order, so the bits depend neither on the number of threads nor on who takes which chunk.

Ordinary threads rather than numba's `prange`, because they can be used from several threads at once, survive a fork,
sleep between calls, and keep the loops quick to compile; numba's OpenMP and workqueue layers measured no faster. What
does matter is torch's own pool: it spins for some milliseconds after each product, on the cores that the loops need,
unless OMP_WAIT_POLICY=passive was in the environment before torch was loaded. Chunks are handed out one by one, so that
a thread whose core is busy simply takes fewer.

Machine code is cached beside the source or in the user's cache folder (`NUMBA_CACHE_DIR` overrides both), and compiled
again when any file of loops has changed. If no folder can be written, each process compiles, and the log says so.
"""

import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import torch

LOG = logging.getLogger(__name__)

_OPTIONS = {"nogil": True, "error_model": "numpy"}
_SUMS = {"reassoc", "contract", "nsz"}
"""The fast-maths flags that vectorised sums need; NaN and infinity keep their meaning."""

_CHUNKS_PER_THREAD = 4
"""Enough to balance threads of unequal speed; each chunk costs a few microseconds and a turn at the GIL."""


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a helper that is called only by compiled loops; its code is cached with theirs."""
    return numba.njit(fastmath=_SUMS, **_OPTIONS)(function)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` at its first call with each combination of array types, and cache the machine code."""
    try:
        dispatcher: Any = numba.njit(cache=True, fastmath=_SUMS, **_OPTIONS)(function)
    except RuntimeError:  # numba found no folder that it may write to
        LOG.warning("compiled code cannot be cached: no folder can be written; set NUMBA_CACHE_DIR to one that can")
        return numba.njit(fastmath=_SUMS, **_OPTIONS)(function)
    # By itself numba compiles again only if the function's own file has changed; its helpers may be in another.
    if hasattr(dispatcher, "_cache"):  # not with NUMBA_DISABLE_JIT
        file = dispatcher._cache._cache_file
        file._source_stamp = (file._source_stamp, _loops_hash())
    return dispatcher


@functools.cache
def _loops_hash() -> str:
    """A hash of the source of this file and every file beside it."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()


def even_chunks(n_rows: int, smallest: int) -> list[int]:
    """Borders of about equal chunks, of `smallest` rows or more unless there are fewer: [0, ..., n_rows]."""
    chunks = max(1, min(torch.get_num_threads() * _CHUNKS_PER_THREAD, n_rows // smallest))
    return [n_rows * i // chunks for i in range(chunks + 1)]


def run_chunks(loop: Callable[..., Any], borders: Sequence[int], *arrays: object) -> None:
    """Call `loop(start, stop, *arrays)` for each chunk between two borders, on as many threads as torch uses."""
    n_chunks = len(borders) - 1
    helpers = min(torch.get_num_threads(), n_chunks) - 1
    next_chunk = itertools.count()

    def work() -> None:
        while (chunk := next(next_chunk)) < n_chunks:
            loop(borders[chunk], borders[chunk + 1], *arrays)

    futures = [_helpers(torch.get_num_threads()).submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        for future in futures:
            if not future.cancel():  # a helper that has not begun by now has nothing left to do
                future.result()


@functools.cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    """Threads that wait for chunks; they are started when needed, and anew in a forked process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


os.register_at_fork(after_in_child=_helpers.cache_clear)
