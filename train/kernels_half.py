"""Matrix products in half precision on CPUs with AVX512-FP16: about 1.8 times as fast as float32 ones.

Such a processor multiplies twice as many float16 numbers as float32 ones in a cycle; BLAS libraries make no use of it
on a CPU, and its bfloat16 instructions (other than AMX's) are no faster than float32. So the product is compiled here:

- Both operands are scaled by rows, by powers of two that bring each row's norm below 128, and rounded to float16: no
  partial sum of a product can exceed 128 * 128 then (Cauchy-Schwarz), whatever the data's scale.
- The right operand is packed in panels of 32 rows, pairs of its numbers side by side. A block of 14 x 32 results stays
  in registers, even and odd depths in lanes of their own, over 144 depths at most; then it is added up in float32.
- Results are float32. Sums of float16 over 72 numbers at a time cost about as much precision as rounding the operands
  to ten bits would: for standardised rows the error's standard deviation is 0.4 times that of a bfloat16 product.

A result's bits depend on its two rows alone, not on the tile or the number of threads. Infinity and NaN come through.
Not here: when it pays (`train.hardware`).

Shapes: n rows of the left operand, m of the right, d depth, p = d / 2 pairs, rounded up.
"""

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from train.kernels_compile import compiled, even_chunks, run_chunks

_ROWS, _VECTORS, _LANES = 14, 2, 16
_PANEL = _VECTORS * _LANES
"""Results of a block: 14 x 32; 28 of the 32 vector registers."""

_PAIRS = 72
"""Pairs whose products are added in float16."""

_NORM_EXPONENT = 7  # rows are scaled to norms below 2^7


def half_products_run() -> bool:
    """Whether this processor has the instructions."""
    return _features().get("avx512fp16", False)


@functools.cache
def _features() -> dict[str, bool]:
    from llvmlite import binding

    return dict(binding.get_host_cpu_features())


class HalfProduct:
    """left @ right^T for one right operand [m, d], float32, and any number of left ones."""

    def __init__(self, right: Tensor) -> None:
        self.shape = tuple(right.shape)
        pairs, self._unscale = _scaled(right, _PANEL)  # [m padded, p], [m]
        self._packed = torch.empty(len(pairs) // _PANEL, pairs.shape[1], _PANEL, dtype=torch.int32)
        run_chunks(_pack_panels, even_chunks(len(self._packed), 4), pairs.numpy(), self._packed.numpy())

    def __call__(self, left: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, d] float32 -> [n, m] float32, into `out` if given (contiguous)."""
        n, (m, d) = len(left), self.shape
        if left.shape[1:] != (d,):
            raise ValueError(f"left: expected [n, {d}], found {list(left.shape)}")
        out = torch.empty(n, m) if out is None else out
        if out.shape != (n, m) or not out.is_contiguous() or out.dtype != torch.float32:
            raise ValueError(f"out: expected contiguous float32 [{n}, {m}], found {out.dtype} {list(out.shape)}")
        pairs, unscale = _scaled(left, _ROWS)
        blocks = len(pairs) // _ROWS
        run_chunks(
            _product_blocks,
            even_chunks(blocks, 1),
            pairs.numpy(),
            self._packed.numpy(),
            unscale.numpy(),
            self._unscale.numpy(),
            out.numpy(),
        )
        return out


def half_product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, d] @ right [m, d]^T, float32 -> [n, m]."""
    return HalfProduct(right)(left)


def _scaled(rows: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Rows as pairs of float16, int32 [rows padded to `multiple`, p], and what undoes each row's scale [rows]."""
    rows = rows.detach().contiguous()
    n, d = rows.shape
    exponent = torch.frexp(torch.linalg.vector_norm(rows, dim=1)).exponent.clamp_(-100, 100) - _NORM_EXPONENT
    one = torch.ones(n)
    half = torch.zeros(-(-n // multiple) * multiple, d + d % 2, dtype=torch.float16)
    torch.mul(rows, torch.ldexp(one, -exponent).unsqueeze(1), out=half[:n, :d])
    return half.view(torch.int32), torch.ldexp(one, exponent)


@intrinsic
def _multiply_block(typing_context: Any, left: Any, stride: Any, right: Any, sums: Any, pairs: Any) -> Any:
    """Add products of 14 rows and a panel over `pairs` pairs to float32 sums; all but `pairs` and `stride` addresses.

    left: int32 pairs of the first row, `stride` bytes from row to row; right: int32 [pairs, 32]; sums: [14, 32].
    """
    signature = types.void(types.int64, types.int64, types.int64, types.int64, types.int64)
    return signature, _emit_block


def _emit_block(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    left, stride, right, sums, pairs = arguments
    i32, i64 = ir.IntType(32), ir.IntType(64)
    halves = ir.VectorType(ir.HalfType(), 2 * _LANES)
    floats = ir.VectorType(ir.FloatType(), _LANES)
    lanes = ir.VectorType(i32, _LANES)
    fma_type = ir.FunctionType(halves, [halves, halves, halves])
    fma = cgutils.get_or_insert_function(builder.module, fma_type, "llvm.fma.v32f16")
    no_lanes, no_halves, zero = (
        ir.Constant(t, v) for t, v in ((lanes, ir.Undefined), (halves, ir.Undefined), (halves, None))
    )

    def at(address: Any, offset: int, kind: Any) -> Any:
        return builder.inttoptr(builder.add(address, i64(offset)), kind.as_pointer())

    rows = [builder.add(left, builder.mul(stride, i64(r))) for r in range(_ROWS)]
    entry = builder.block
    loop, done = (builder.function.append_basic_block(name) for name in ("pairs", "sums"))
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(i64)
    pair.add_incoming(i64(0), entry)
    before = [[builder.phi(halves) for _ in range(_VECTORS)] for _ in range(_ROWS)]
    panel = builder.add(right, builder.mul(pair, i64(4 * _PANEL)))
    columns = [builder.load(at(panel, 64 * j, halves), align=4) for j in range(_VECTORS)]
    after = []
    for row in rows:
        two = builder.load(at(builder.add(row, builder.mul(pair, i64(4))), 0, i32), align=4)
        everywhere = builder.shuffle_vector(
            builder.insert_element(no_lanes, two, i32(0)), no_lanes, ir.Constant(lanes, [0] * _LANES)
        )
        spread = builder.bitcast(everywhere, halves)
        after.append(
            [builder.call(fma, [spread, column, old]) for column, old in zip(columns, before[len(after)], strict=True)]
        )
    following = builder.add(pair, i64(1))
    pair.add_incoming(following, loop)
    for olds, news in zip(before, after, strict=True):
        for old, new in zip(olds, news, strict=True):
            old.add_incoming(zero, entry)
            old.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, pairs), loop, done)

    builder.position_at_end(done)
    evens, odds = (ir.Constant(lanes, list(range(first, 2 * _LANES, 2))) for first in (0, 1))
    for r, news in enumerate(after):
        for j, new in enumerate(news):
            even, odd = (builder.fpext(builder.shuffle_vector(new, no_halves, pick), floats) for pick in (evens, odds))
            place = at(sums, 4 * (r * _PANEL + j * _LANES), floats)
            builder.store(builder.fadd(builder.load(place, align=4), builder.fadd(even, odd)), place, align=4)
    return context.get_dummy_value()


@compiled
def _pack_panels(start, stop, pairs, packed):
    """packed [m / 32, p, 32] = the panels start..stop of pairs [m, p], transposed."""
    depth = pairs.shape[1]
    for q in range(start, stop):
        for first in range(0, depth, 16):
            for j in range(_PANEL):
                for p in range(first, min(first + 16, depth)):
                    packed[q, p, j] = pairs[q * _PANEL + j, p]


@compiled
def _product_blocks(start, stop, pairs, packed, unscale_left, unscale_right, out):
    """Rows 14 start..14 stop of out [n, m]: pairs [n padded, p] times packed [m / 32, p, 32], scales undone."""
    depth = pairs.shape[1]
    n, m = out.shape
    sums = np.empty((_ROWS, _PANEL), np.float32)
    left, right, block = pairs.ctypes.data, packed.ctypes.data, sums.ctypes.data
    for q in range(packed.shape[0]):
        for b in range(start, stop):
            sums[:] = 0
            for p in range(0, depth, _PAIRS):
                _multiply_block(  # pyright: ignore[reportCallIssue]  numba passes its typing context itself
                    left + 4 * (b * _ROWS * depth + p),
                    4 * depth,
                    right + 4 * _PANEL * (q * depth + p),
                    block,
                    min(_PAIRS, depth - p),
                )
            columns = min(_PANEL, m - q * _PANEL)
            for r in range(min(_ROWS, n - b * _ROWS)):
                row, scale = out[b * _ROWS + r], unscale_left[b * _ROWS + r]
                for j in range(columns):
                    row[q * _PANEL + j] = sums[r, j] * scale * unscale_right[q * _PANEL + j]
