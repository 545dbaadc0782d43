"""Tiles of float32 rows, packed for 16-bit products while they are in a core's cache: `train.kernels.cpu.auxk_loops`.

A tile is 140 rows: ten left blocks of `train.kernels.cpu.int16`, scaled as there by their norms; or, taken by columns,
70 pairs. A column is scaled by a power of two that brings its largest magnitude below a given one, which takes integer
operations alone: 140 products below 2^12 * 2^11 add up to less than 2^31. Not here: whole matrices
(`train.kernels.cpu.int16.Packed`).

Shapes: wide columns, a multiple of 32; width of a panel, 14 or 32.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from train.kernels.cpu.compiling import inlined
from train.kernels.cpu.int16 import LANES, PANEL, ROWS, everywhere, rounded_bits, scale_of, vector_at

BLOCKS = 10
TILE = BLOCKS * ROWS
"""Rows of a tile: for a thousand latents, its numbers and one packed operand fit a core's second cache, of 2 MB."""

PAIRS = TILE // 2

SLACK = 2 * PANEL
"""Numbers that there must be behind a tile's last: blocks of 14 columns are read 16 at a time."""

INFINITY = np.int32(0x7F800000)
MAGNITUDE = np.int32(0x7FFFFFFF)

FLOATS = ir.VectorType(ir.FloatType(), LANES)
INTS = ir.VectorType(ir.IntType(32), LANES)


@inlined
def _scale_bits(largest, below):
    """Bits of the power of two that brings numbers below 2^below of which the largest magnitude has these bits, to the
    upper half of that range; and of its inverse."""
    exponent = min(max(largest >> 23, np.int32(28)), np.int32(228))  # of a float32 number in its bits: 126 is 1/2..1
    back = np.int32(exponent + 1 - below) << 23 if largest < INFINITY else np.int32(0x7FC00000)
    return np.int32(253 - exponent + below) << 23, back


@inlined
def _square(row):
    """A row's squared norm, to six digits."""
    quick = np.float32(0)
    for j in range(row.size):
        quick += row[j] * row[j]
    square = np.float64(quick)
    if not 1e-30 < square < 1e30:  # numbers that cannot be squared in float32, or none
        square = np.float64(0)
        for j in range(row.size):
            square += np.float64(row[j]) * np.float64(row[j])
    return square


@inlined
def pack_columns(rows, memory, pairs, unscale, below):
    """pairs [blocks, 70, width], unscale [blocks * width]: the columns of rows [140, wide], pairs of rows together, in
    whole numbers below 2^below."""
    width, wide = pairs.shape[2], rows.shape[1]
    bits, unscale_bits = rows.view(np.int32), unscale.view(np.int32)
    largest, scale = memory[0], memory[1]
    largest[:] = 0
    for r in range(0, TILE, 4):
        a, b, c, d = bits[r], bits[r + 1], bits[r + 2], bits[r + 3]
        for j in range(wide):
            one, two = max(a[j] & MAGNITUDE, b[j] & MAGNITUDE), max(c[j] & MAGNITUDE, d[j] & MAGNITUDE)
            largest[j] = max(largest[j], max(one, two))
    for j in range(unscale.size):
        scale[j], unscale_bits[j] = _scale_bits(largest[j], below)
    source, by, out = rows.ctypes.data, scale.ctypes.data, pairs.ctypes.data
    group = 4  # blocks at a time: long enough runs of a row, and few enough to be written to
    for start in range(0, pairs.shape[0], group):
        for p in range(PAIRS):
            for b in range(start, min(start + group, pairs.shape[0])):
                for j in range(b * width, (b + 1) * width, LANES):
                    _pack_two_rows(  # pyright: ignore[reportCallIssue]
                        source + 4 * (2 * p * wide + j),
                        source + 4 * ((2 * p + 1) * wide + j),
                        by + 4 * j,
                        out + 4 * ((b * PAIRS + p) * width + j - b * width),
                        min(width, LANES),
                    )


@inlined
def pack_rows(rows, memory, depth, unscale):
    """A left operand [10, depth pairs, 14] in `memory`, and unscale [140], of rows [140, wide]."""
    wide = rows.shape[1]
    scale = np.empty(ROWS, np.float32)
    for b in range(BLOCKS):
        for r in range(ROWS):
            scale[r], unscale[b * ROWS + r] = scale_of(_square(rows[b * ROWS + r]))
        for j in range(0, wide, 2 * LANES):
            _pack_block(  # pyright: ignore[reportCallIssue]
                rows[b * ROWS].ctypes.data + 4 * j,
                4 * wide,
                scale.ctypes.data,
                memory.ctypes.data + 4 * ROWS * (b * depth + j // 2),
            )
    return memory[: BLOCKS * depth * ROWS].reshape(BLOCKS, depth, ROWS)


@intrinsic
def _pack_two_rows(typing_context: Any, even: Any, odd: Any, scale: Any, out: Any, count: Any) -> Any:
    """out int32 [count <= 16] = even * scale, rounded, with odd * scale above; addresses but for `count`.

    Of the others 16 numbers are read.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        even, odd, scale = (builder.inttoptr(a, FLOATS.as_pointer()) for a in arguments[:3])
        by = builder.load(scale, align=4)
        low, high = (rounded_bits(builder, builder.load(row, align=4), by) for row in (even, odd))
        low, shift = builder.and_(low, ir.Constant(INTS, [0xFFFF] * LANES)), ir.Constant(INTS, [16] * LANES)
        both = builder.or_(low, builder.shl(high, shift))
        _store(builder, both, *arguments[3:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit


@intrinsic
def _pack_block(typing_context: Any, source: Any, stride: Any, scale: Any, out: Any) -> Any:
    """out int32 [16 pairs, 14], of 32 float32 numbers of 14 rows that lie `stride` bytes apart, times scale [14]."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, stride, scale, out = arguments
        i32, i64 = ir.IntType(32), ir.IntType(64)
        shorts = ir.VectorType(ir.IntType(16), 2 * LANES)
        low_halves = ir.Constant(ir.VectorType(i32, 2 * LANES), list(range(0, 4 * LANES, 2)))
        vectors = []
        for r in range(ROWS):
            row = builder.add(source, builder.mul(stride, ir.Constant(i64, r)))
            by = everywhere(builder, builder.load(vector_at(builder, scale, 4 * r, ir.FloatType()), align=4))
            parts = [
                rounded_bits(builder, builder.load(vector_at(builder, row, offset, FLOATS), align=4), by)
                for offset in (0, 4 * LANES)
            ]
            joined = builder.shuffle_vector(*(builder.bitcast(part, shorts) for part in parts), low_halves)
            vectors.append(builder.bitcast(joined, INTS))
        vectors += [ir.Constant(INTS, None)] * (LANES - ROWS)
        for p, pair in enumerate(_transposed(builder, vectors)):
            _store(builder, pair, builder.add(out, ir.Constant(i64, 4 * ROWS * p)), ir.Constant(i64, ROWS))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


def _store(builder: Any, vector: Any, address: Any, count: Any) -> None:
    """Instructions: write the first `count` numbers of a vector of 16."""
    mask_type = ir.VectorType(ir.IntType(1), LANES)
    kinds = [INTS, INTS.as_pointer(), ir.IntType(32), mask_type]
    store = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.masked.store.v16i32.p0"
    )
    limit = everywhere(builder, builder.trunc(count, ir.IntType(32)))
    mask = builder.icmp_signed("<", ir.Constant(INTS, list(range(LANES))), limit)
    builder.call(store, [vector, builder.inttoptr(address, INTS.as_pointer()), ir.IntType(32)(4), mask])


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of 16 vectors of 16: four turns of exchanging halves, quarters, eighths and sixteenths."""
    width = LANES // 2
    while width:
        low = [i + (LANES - width if i & width else 0) for i in range(LANES)]
        high = [i + (LANES if i & width else width) for i in range(LANES)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), mask) for mask in (low, high)]
        after = list(rows)
        for i in range(LANES):
            if not i & width:
                after[i], after[i | width] = (builder.shuffle_vector(rows[i], rows[i | width], mask) for mask in masks)
        rows = after
        width //= 2
    return rows
