"""Compiled loops over the vectors of a layer: rounding to bfloat16, and the sums behind mean, variance and norm.

How: one pass over a layer, whose sums stay in the nearest cache; sums are float64. The order of every addition is fixed
(no fast-math), so that the same values give the same bytes whatever the width of the machine's vectors. numba compiles
a function at its first call and caches it; the interpreter's lock is released, so that threads can share out the
layers. What it does not do: decide anything (pack.py does).

Shapes: t tokens, L stored layers, D = d_model, C tokens in a chunk, P token chunks in the shard. Arrays are contiguous.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_FINITE = np.uint32(0x7FFFFFFF)
_HALF = np.uint32(0x7FFF)
_ONE = np.uint32(1)
_SIXTEEN = np.uint32(16)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` at its first call, and cache the machine code."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # No folder for the cache can be written to: compile again in each process.
        return numba.njit(nogil=True)(function)


@numba.njit(inline="always")
def _add_row(row, pivot, sums, squares, work):  # type: ignore[no-untyped-def]
    """Add a vector's deviation from `pivot` to `sums` and its square to `squares`; gives its L2 norm. All [D]."""
    n = row.size
    for i in range(n):
        value = np.float64(row[i])
        deviation = value - pivot[i]
        sums[i] += deviation
        squares[i] += deviation * deviation
        work[i] = value * value
    # Summed by halves: elementwise additions, which vectorise without changing their order.
    while n > 1:
        half = n // 2
        low, high = work[:half], work[n - half : n]
        for i in range(half):
            low[i] += high[i]
        n -= half
    return np.sqrt(work[0])


@compiled
def measure(values, keep, pivot, sums, squares):  # type: ignore[no-untyped-def]
    """Add up a layer's kept vectors; gives the sum of their L2 norms.

    values: float32 [t, D]; keep: bool [t]; pivot, sums, squares: float64 [D].
    """
    work = np.empty(values.shape[1])
    norms = 0.0
    for token in range(keep.size):
        if keep[token]:
            norms += _add_row(values[token], pivot, sums, squares, work)
    return norms


@compiled
def pack_bfloat16(bits, shift, slots, layer, chunk_tokens, keep, pivot, sums, squares):  # type: ignore[no-untyped-def]
    """Round a layer to bfloat16 into its slots, and add the rounded vectors up as `measure` does.

    bits: [t, D], uint32 bits of float32 (shift 0) or uint16 bits of bfloat16 (shift 16); slots: uint16 [P, L, C * D]
    or longer rows.
    Gives the sum of the kept vectors' L2 norms, and the largest magnitude that was met, as float32 bits.
    """
    d_model = bits.shape[1]
    work = np.empty(d_model)
    rounded = np.empty(d_model, np.uint32)
    row = rounded.view(np.float32)
    left = np.uint32(shift)
    largest = np.uint32(0)
    norms = 0.0
    for token in range(keep.size):
        source = bits[token]
        chunk, place = divmod(token, chunk_tokens)
        target = slots[chunk, layer, place * d_model : (place + 1) * d_model]
        for i in range(d_model):
            value = np.uint32(source[i]) << left
            largest = max(largest, value & _FINITE)
            high = (value + _HALF + ((value >> _SIXTEEN) & _ONE)) >> _SIXTEEN
            target[i] = np.uint16(high)
            rounded[i] = high << _SIXTEEN
        if keep[token]:
            norms += _add_row(row, pivot, sums, squares, work)
    return norms, largest
