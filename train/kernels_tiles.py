"""Tiles of float32 rows, packed for half-precision products while they are in a core's cache: `train.kernels_auxk`.

A tile is 140 rows: ten left blocks of `train.kernels_half`, and, taken by columns, the 70 pairs that it adds up in
float16. Numbers are scaled by powers of two that bring the largest magnitude to 4..8. That bounds sums as norms below
128 do, and takes integer operations alone. Not here: whole matrices (`train.kernels_half.Packed`).

Shapes: wide columns, a multiple of 32; width of a panel, 14 or 32.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from train.kernels_compile import inlined
from train.kernels_half import LANES, PANEL, ROWS, everywhere, round_to_half

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
def _scale_bits(largest):
    """Bits of the power of two that brings numbers to 4..8 of which the largest magnitude has these bits; of its
    inverse."""
    exponent = min(max(largest >> 23, np.int32(28)), np.int32(228))
    back = np.int32(exponent - 2) << 23 if largest < INFINITY else np.int32(0x7FC00000)
    return np.int32(256 - exponent) << 23, back


@inlined
def pack_columns(rows, memory, pairs, unscale):
    """pairs [blocks, 70, width], unscale [blocks * width]: the columns of rows [140, wide], pairs of rows together."""
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
        scale[j], unscale_bits[j] = _scale_bits(largest[j])
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
    bits, unscale_bits = rows.view(np.int32), unscale.view(np.int32)
    scale = np.empty(ROWS, np.float32)
    scale_bits = scale.view(np.int32)
    for b in range(BLOCKS):
        for r in range(ROWS):
            row = bits[b * ROWS + r]
            largest = np.int32(0)
            for j in range(wide):
                largest = np.int32(max(largest, np.int32(row[j] & MAGNITUDE)))  # int32: more in a vector than int64
            scale_bits[r], unscale_bits[b * ROWS + r] = _scale_bits(largest)
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
    """out int32 [count <= 16] = even * scale as float16, with odd * scale above; addresses but for `count`.

    Of the others 16 numbers are read.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        even, odd, scale = (builder.inttoptr(a, FLOATS.as_pointer()) for a in arguments[:3])
        by = builder.load(scale, align=4)
        shorts = ir.VectorType(ir.IntType(16), LANES)
        low, high = (
            builder.zext(builder.bitcast(round_to_half(builder, builder.load(row, align=4), by), shorts), INTS)
            for row in (even, odd)
        )
        both = builder.or_(low, builder.shl(high, ir.Constant(INTS, [16] * LANES)))
        _store(builder, both, *arguments[3:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit


@intrinsic
def _pack_block(typing_context: Any, source: Any, stride: Any, scale: Any, out: Any) -> Any:
    """out int32 [16 pairs, 14], of 32 float32 numbers of 14 rows that lie `stride` bytes apart, times scale [14]."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, stride, scale, out = arguments
        i32, i64 = ir.IntType(32), ir.IntType(64)
        vectors = []
        for r in range(ROWS):
            row = builder.add(source, builder.mul(stride, ir.Constant(i64, r)))
            number = builder.load(
                builder.inttoptr(builder.add(scale, ir.Constant(i64, 4 * r)), ir.FloatType().as_pointer()), align=4
            )
            by = everywhere(builder, number)
            parts = []
            for offset in (0, 4 * LANES):
                place = builder.inttoptr(builder.add(row, ir.Constant(i64, offset)), FLOATS.as_pointer())
                parts.append(round_to_half(builder, builder.load(place, align=4), by))
            joined = builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(i32, 2 * LANES), list(range(2 * LANES))))
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
