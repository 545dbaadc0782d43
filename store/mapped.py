"""Copies parts of a file out of a memory map, where Linux can say beforehand whether the pages are to be had.

How: the kernel is asked to read the part (so that a cold disk gets one large request) and to map its pages
(`MADV_POPULATE_READ`, Linux 5.14), which fails where touching them would end the process: on a disk that fails, or past
the end. Only then are they copied. That is a tenth faster than `preadv` from the cache, whose copy inside the kernel is
slower than the processor's widest loads and stores, and 1.5 times as fast from a disk. `copy_checked` does the same to
many parts in compiled code, past the cache, for memory that is read later. What it does not do: check what `copy` read,
or help where it fails: the caller is told, and reads with `preadv`, which says why.

A file that is cut off, or whose pages are thrown out and cannot be read again, in the microseconds between the question
and the copy, ends the process with SIGBUS; nothing wrong is read.
"""

import ctypes
import mmap
import os
import sys
from functools import cache
from typing import Any

import numpy as np

_MADV_POPULATE_READ = 22
_PAGE = mmap.PAGESIZE


class MappedFile:
    """A file that is mapped; several threads may copy from it at once. It is unmapped when nothing refers to it."""

    def __init__(self, bytes_of_file: np.ndarray, descriptor: int, madvise: Any) -> None:
        """For `open`."""
        self._bytes = bytes_of_file
        self._view = bytes_of_file.data
        self._address = bytes_of_file.ctypes.data
        self._descriptor = descriptor
        self._madvise = madvise

    @classmethod
    def open(cls, descriptor: int, n_bytes: int) -> "MappedFile | None":
        """Map an open file's first `n_bytes`; None where that is of no use here."""
        madvise = _c_madvise()
        if madvise is None or n_bytes == 0:
            return None
        try:
            mapped = mmap.mmap(descriptor, n_bytes, prot=mmap.PROT_READ)
        except (OSError, ValueError):  # A file system that maps nothing.
            return None
        return cls(np.frombuffer(mapped, np.uint8), descriptor, madvise)

    def copy(self, offset: int, out: np.ndarray, more: int) -> memoryview | None:
        """Fill `out` (uint8, contiguous) from `offset` on; gives the `more` bytes after it, or None where the pages are
        not to be had."""
        middle = offset + out.nbytes
        end = middle + more
        if end > self._view.nbytes:
            return None
        os.posix_fadvise(self._descriptor, offset, end - offset, os.POSIX_FADV_WILLNEED)
        start = offset - offset % _PAGE
        if self._madvise(self._address + start, end - start, _MADV_POPULATE_READ):
            return None
        out[:] = self._bytes[offset:middle]
        return self._view[middle:end]

    def copy_checked(self, offsets: np.ndarray, out: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Fill out[rows[i]] from offsets[i] on, for memory that is read much later; gives which are there and fit the
        crc32c behind them, bool [n]. (store/kernels_copy.py has the shapes, and says where it runs.)"""
        from store.kernels_copy import copy_checked  # Brings numba, which readers of little do without.

        good = np.zeros(len(offsets), bool)
        copy_checked(self._bytes, self._descriptor, offsets, out, rows, good)
        return good


@cache
def _c_madvise() -> Any:
    """The C function, which lets other threads run (`mmap.madvise` of Python does not); None where it has no use."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
