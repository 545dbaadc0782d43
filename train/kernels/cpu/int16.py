"""Matrix products in 16-bit integers on CPUs with AVX512-VNNI: about 1.8 times as fast as float32 ones.

Such a processor multiplies pairs of 16-bit integers and adds them up in 32 bits, twice as many in a cycle as float32
numbers; BLAS libraries make no use of it, and bfloat16 instructions (other than AMX's) are no faster than float32. So
the product is compiled here:

- Both operands are scaled by rows, by powers of two that bring each row's norm to 2^14..2^15, and rounded to whole
  numbers: no sum of products can exceed 2^30 then (Cauchy-Schwarz), whatever the data's scale.
- The right operand is packed in panels of 32 rows, the left one in blocks of 14, pairs of numbers side by side. 14 x 32
  results stay in registers while the depth is gone through.
- Sums are exact; results are float32, their scales undone. So all error is that of rounding an operand once: for
  standardised rows of 576 its standard deviation is a sixth of a bfloat16 product's. A step is a row's norm divided by
  2^14..2^15, so it grows with the square root of the depth: at 16,384 it is as large as theirs.

A result's bits depend on its two rows alone, and on no order of summation. All results of a row that holds an infinity
or NaN are NaN; numbers below 2^-115 count as zero. Not here: when it pays (`train.hardware`).

Shapes: n rows of the left operand, m of the right, d depth, p = d / 2 pairs, rounded up.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from train.kernels.cpu.compiling import compiled, even_chunks, inlined, run_chunks

VECTORS, LANES = 2, 16
ROWS, PANEL = 14, VECTORS * LANES
"""Results of a block: 14 x 32; 28 of the 32 vector registers."""

UNIT_BLOCKS, UNIT_PANELS = 16, 8
"""What a thread takes at a time: 16 blocks find a panel in its cache, and 8 panels the blocks."""

AHEAD = 16
"""Bytes of what is needed next that are fetched with each pair: a line every fourth."""

_NORM_EXPONENT = 15
"""Rows are scaled to norms below 2^15."""

_ROUNDING = 1.5 * 2**23
"""A float32 number below 2^22 plus this is rounded to a whole one, whose two's complement is in the low bits."""


@functools.cache
def integer_products_run() -> bool:
    """Whether this processor has the instructions, of 16 bits and of 8 (`train.kernels.cpu.screen_loops`)."""
    from llvmlite import binding

    return binding.get_host_cpu_features().get("avx512vnni", False)


class Int16Product:
    """left @ right^T for one right operand [m, d], float32, and any number of left ones.

    An operand may be the transpose of contiguous memory: it is packed from there.
    """

    def __init__(self, right: Tensor) -> None:
        self.shape = tuple(right.shape)
        self.right = Packed.of(right, PANEL)

    def __call__(self, left: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, d] float32 -> [n, m] float32, into `out` if given (contiguous)."""
        n, m = len(left), self.shape[0]
        out = torch.empty(n, m) if out is None else out
        if out.shape != (n, m) or not out.is_contiguous() or out.dtype != torch.float32:
            raise ValueError(f"out: expected contiguous float32 [{n}, {m}], found {out.dtype} {list(out.shape)}")
        if left.shape[1:] != self.shape[1:]:
            raise ValueError(f"left: expected [n, {self.shape[1]}], found {list(left.shape)}")
        packed = Packed.of(left, ROWS)
        units = -(-len(packed.pairs) // UNIT_BLOCKS) * -(-len(self.right.pairs) // UNIT_PANELS)
        run_chunks(product_blocks, even_chunks(units, 1), *packed, *self.right, out.numpy())
        return out


class Packed(NamedTuple):
    """An operand's rows, scaled and rounded, in panels of `width` rows."""

    pairs: NDArray[np.int32]
    """[rows / width, p, width] two 16-bit numbers of a row each; zero beyond the last row, and beyond an odd depth."""

    unscale: NDArray[np.float32]
    """[rows padded] what undoes each row's scale: a power of two; NaN where the row has a number that is not finite."""

    @classmethod
    def of(cls, rows: Tensor, width: int) -> "Packed":
        """The rows of a matrix [rows, d]."""
        n, d = rows.shape
        rows = rows.detach().float()
        panels = -(-n // width)
        # torch's memory starts on a cache line; numpy's need not, which made products a quarter slower.
        pairs = torch.empty(panels, (d + 1) // 2, width, dtype=torch.int32)
        packed = cls(pairs.numpy(), np.empty(panels * width, np.float32))
        smallest = 1 + 2**15 // (width * max(1, d))
        if not rows.is_contiguous() and rows.t().is_contiguous():
            run_chunks(_pack_columns, even_chunks(panels, smallest), rows.t().numpy(), *packed)
        else:
            run_chunks(_pack_rows, even_chunks(panels, smallest), rows.contiguous().numpy(), *packed)
        return packed


def int16_product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, d] @ right [m, d]^T, float32 -> [n, m]."""
    return Int16Product(right)(left)


@intrinsic
def _whole_bits(typing_context: Any, number: Any) -> Any:
    """The lowest 16 bits of a float32 number below 2^15, rounded to a whole one, as int32 from 0 to 65535."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rounded = builder.fadd(arguments[0], ir.Constant(ir.FloatType(), _ROUNDING))
        return builder.and_(builder.bitcast(rounded, ir.IntType(32)), ir.IntType(32)(0xFFFF))

    return types.int32(types.float32), emit


@inlined
def scale_of(square):
    """The power of two that brings a row of this squared norm to a norm in 2^14..2^15, and what undoes it."""
    if not square < np.inf:
        return np.float32(1), np.float32(np.nan)
    # A little more than the norm, so that no number is rounded to 2^15.
    exponent = math.frexp(math.sqrt(square) * (1 + 2.0**-14))[1] if square > 0 else 0
    exponent = _NORM_EXPONENT - min(max(exponent, -100), 140)
    return np.float32(math.ldexp(1.0, exponent)), np.float32(math.ldexp(1.0, -exponent))


@compiled
def _pack_rows(start, stop, rows, pairs, unscale):
    """Panels start..stop of `Packed`, from rows [n, d]."""
    n, d = rows.shape
    width, whole = pairs.shape[2], d // 2
    line = np.zeros(pairs.shape[1], np.int32)
    for q in range(start, stop):
        for j in range(width):
            r = q * width + j
            if r >= n:
                pairs[q, :, j] = 0
                unscale[r] = 0
                continue
            row = rows[r]
            square = np.float64(0)
            for i in range(d):
                square += np.float64(row[i]) * np.float64(row[i])
            scale, unscale[r] = scale_of(square)
            for p in range(whole):
                line[p] = _whole_bits(scale * row[2 * p]) | (_whole_bits(scale * row[2 * p + 1]) << 16)  # pyright: ignore[reportCallIssue]
            if d % 2:
                line[whole] = _whole_bits(scale * row[d - 1])  # pyright: ignore[reportCallIssue]
            for p in range(line.size):
                pairs[q, p, j] = line[p]


@compiled
def _pack_columns(start, stop, columns, pairs, unscale):
    """Panels start..stop of `Packed`, from the transpose [d, n] of the rows."""
    d, n = columns.shape
    width = pairs.shape[2]
    squares, scales = np.empty(width, np.float64), np.empty(width, np.float32)
    for q in range(start, stop):
        first = q * width
        count = min(width, n - first)
        squares[:] = 0
        for i in range(d):
            part = columns[i, first : first + count]
            for j in range(count):
                squares[j] += np.float64(part[j]) * np.float64(part[j])
        for j in range(count):
            scales[j], unscale[first + j] = scale_of(squares[j])
        for p in range(d // 2):
            even, odd = columns[2 * p, first : first + count], columns[2 * p + 1, first : first + count]
            out = pairs[q, p]
            for j in range(count):
                out[j] = _whole_bits(scales[j] * even[j]) | (_whole_bits(scales[j] * odd[j]) << 16)  # pyright: ignore[reportCallIssue]
        if d % 2:
            for j in range(count):
                pairs[q, d // 2, j] = _whole_bits(scales[j] * columns[d - 1, first + j])  # pyright: ignore[reportCallIssue]
        if count < width:
            pairs[q, :, count:] = 0
            unscale[first + count : first + width] = 0


@intrinsic
def _multiply_block(
    typing_context: Any,
    left: Any,
    right: Any,
    pairs: Any,
    ahead: Any,
    unscale_left: Any,
    unscale_right: Any,
    out: Any,
    stride: Any,
) -> Any:
    """out [14, 32] = left^T @ right * unscale_left [14] * unscale_right [32]; rows of `out` are `stride` bytes apart.

    left: int32 [pairs, 14]; right: int32 [pairs, 32]; ahead: of `emit_block`. All but `pairs` and `stride` are
    addresses.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, pairs, ahead, unscale_left, unscale_right, out, stride = arguments
        f32 = ir.FloatType()
        floats = ir.VectorType(f32, LANES)
        sums = emit_block(builder, left, right, pairs, ahead)
        columns = [builder.load(vector_at(builder, unscale_right, 64 * j, floats), align=4) for j in range(VECTORS)]
        for r, row in enumerate(sums):
            scale = everywhere(builder, builder.load(vector_at(builder, unscale_left, 4 * r, f32), align=4))
            for j, (whole, column) in enumerate(zip(row, columns, strict=True)):
                number = builder.fmul(builder.fmul(builder.sitofp(whole, floats), scale), column)
                builder.store(number, vector_at(builder, out, 64 * j, floats), align=4)
            out = builder.add(out, stride)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), emit


def emit_block(builder: Any, left: Any, right: Any, pairs: Any, ahead: Any) -> list[list[Any]]:
    """Instructions: left [pairs, 14]^T @ right [pairs, 32] of addresses, as 14 times 2 vectors of 16 int32 numbers.

    Meanwhile what is needed next is fetched into the second cache, from the address `ahead` on. All at once, it would
    have to be waited for.
    """
    i32, i64 = ir.IntType(32), ir.IntType(64)
    lanes = ir.VectorType(i32, LANES)
    add_products = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(lanes, [lanes, lanes, lanes]), "llvm.x86.avx512.vpdpwssd.512"
    )
    entry = builder.block
    loop, done = (builder.function.append_basic_block(name) for name in ("pairs", "sums"))
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(i64)
    pair.add_incoming(i64(0), entry)
    before = [[builder.phi(lanes) for _ in range(VECTORS)] for _ in range(ROWS)]
    panel = builder.add(right, builder.mul(pair, i64(4 * PANEL)))
    columns = [builder.load(vector_at(builder, panel, 64 * j, lanes), align=4) for j in range(VECTORS)]
    block = builder.add(left, builder.mul(pair, i64(4 * ROWS)))
    _fetch(builder, builder.add(ahead, builder.mul(pair, i64(AHEAD))), write=False, cache=2)
    after = []
    for r in range(ROWS):
        spread = everywhere(builder, builder.load(vector_at(builder, block, 4 * r, i32), align=4))
        after.append(
            [builder.call(add_products, [old, column, spread]) for column, old in zip(columns, before[r], strict=True)]
        )
    following = builder.add(pair, i64(1))
    pair.add_incoming(following, loop)
    for olds, news in zip(before, after, strict=True):
        for old, new in zip(olds, news, strict=True):
            old.add_incoming(ir.Constant(lanes, None), entry)
            old.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, pairs), loop, done)
    builder.position_at_end(done)
    return after


def vector_at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """Instructions: a pointer to what lies `offset` bytes behind an address."""
    return builder.inttoptr(builder.add(address, ir.Constant(ir.IntType(64), offset)), kind.as_pointer())


def everywhere(builder: Any, number: Any) -> Any:
    """Instructions: a number in all 16 places of a vector."""
    none = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    first = builder.insert_element(none, number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, none, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def rounded_bits(builder: Any, numbers: Any, scale: Any) -> Any:
    """Instructions: a vector of float32 numbers times a vector, rounded to whole numbers: the low 16 bits of each."""
    kind = numbers.type
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{kind.count}f32"
    )
    rounded = builder.call(fma, [numbers, scale, ir.Constant(kind, [_ROUNDING] * kind.count)])
    return builder.bitcast(rounded, ir.VectorType(ir.IntType(32), kind.count))


@intrinsic
def _will_write(typing_context: Any, address: Any) -> Any:
    """Fetch a panel's part of a row of results, 128 bytes, while there is other work: a write to memory that is far
    away stops the core for longer than a block's products take to be written."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for offset in range(0, 4 * PANEL, 64):
            _fetch(builder, builder.add(arguments[0], ir.Constant(ir.IntType(64), offset)), write=True, cache=1)
        return context.get_dummy_value()

    return types.void(types.int64), emit


def _fetch(builder: Any, address: Any, *, write: bool, cache: int) -> None:
    """Instructions: have a line come into the first or second cache, to be read or written."""
    i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [builder.inttoptr(address, byte), i32(int(write)), i32(4 - cache), i32(1)])


@compiled
def product_blocks(start, stop, left, unscale_left, right, unscale_right, out):
    """Units start..stop of out [n, m]; a unit is 16 blocks of rows by 8 panels, so that both stay in a core's cache."""
    n, m = out.shape
    across = -(-right.shape[0] // UNIT_PANELS)
    depth = left.shape[1]
    edge = np.empty((ROWS, PANEL), np.float32)  # a block that is not all within
    for unit in range(start, stop):
        first_block, first_panel = unit // across * UNIT_BLOCKS, unit % across * UNIT_PANELS
        blocks = min(UNIT_BLOCKS, left.shape[0] - first_block)
        for q in range(first_panel, min(first_panel + UNIT_PANELS, right.shape[0])):
            columns = min(PANEL, m - q * PANEL)
            panel, fetched = right[q].ctypes.data, AHEAD * depth
            for block in range(first_block, first_block + blocks):
                first = block * ROWS
                rows = min(ROWS, n - first)
                within = rows == ROWS and columns == PANEL
                for r in range(rows):
                    _will_write(out[first + r].ctypes.data + 4 * PANEL * q)  # pyright: ignore[reportCallIssue]
                _multiply_block(  # pyright: ignore[reportCallIssue]
                    left[block].ctypes.data,
                    panel,
                    depth,
                    panel + 4 * PANEL * depth + fetched * (block - first_block),  # of the next panel
                    unscale_left.ctypes.data + 4 * first,
                    unscale_right.ctypes.data + 4 * PANEL * q,
                    out[first].ctypes.data + 4 * PANEL * q if within else edge.ctypes.data,
                    out.strides[0] if within else 4 * PANEL,
                )
                if not within:
                    for r in range(rows):
                        for j in range(columns):
                            out[first + r, q * PANEL + j] = edge[r, j]
