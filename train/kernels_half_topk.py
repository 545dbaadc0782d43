"""Product in half precision and top-k in one: pre-activations are looked at in registers and never stored.

The codes are those of `train.kernels_topk` on the product of `train.kernels_half`, to the bit. As a block of results
comes out of the product, each row's are compared with the row's bound, which at least k earlier ones exceed or equal;
the few above it join the row's candidates. When those fill their room, the k largest stay and the smallest of them
becomes the bound. So a row's candidates are some hundreds in all, where its pre-activations are M.

Not here: rows with fewer than k positive pre-activations, and operands that are not finite. `fused_topk_relu` says
which rows it left, and `train.encode` takes those the long way.

Shapes: N rows, D d_model, M n_latents, k; b blocks of 14 rows, q panels of 32 latents.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.cpython.unsafe.numbers import trailing_zeros
from numba.extending import intrinsic
from torch import Tensor

from train.kernels import SparseCodes
from train.kernels_compile import compiled, even_chunks, inlined, run_chunks
from train.kernels_half import PANEL, ROWS, HalfProduct, block_sums
from train.kernels_topk import cut_to_largest, kth_largest, sort_candidates

_GROUP = 24
"""Blocks that a thread takes through all panels: so many that reading a panel is a small part of using it."""

_ROOM = 64
"""Candidates beyond k before a row is cut."""


def fused_topk_relu(left: Tensor, right: Tensor, k: int, bias: Tensor | None = None) -> tuple[SparseCodes, Tensor]:
    """ReLU(TopK_k(left @ right^T + bias)) [N, k], and the rows that it leaves: int64 [R], ascending.

    left [N, D], right [M, D], bias [M] or None; float32. Values and indices of the rows left mean nothing.
    """
    n, m = len(left), len(right)
    values, indices = torch.empty(n, k), torch.empty(n, k, dtype=torch.int64)
    product = HalfProduct(right)
    padded_bias = np.zeros(len(product.right.unscale), np.float32)
    if bias is not None:
        padded_bias[:m] = bias.detach().numpy()
    if k > m or not np.isfinite(product.right.unscale + padded_bias).all():
        return SparseCodes(values, indices), torch.arange(n)
    packed = product.pack_left(left)
    left_out = np.zeros(n, np.bool_)
    run_chunks(
        _topk_blocks,
        even_chunks(len(packed.pairs), _GROUP),
        *packed,
        *product.right,
        padded_bias,
        _ranks(m, k),
        k,
        values.view(torch.int32).numpy(),
        indices.numpy(),
        left_out,
    )
    return SparseCodes(values, indices), torch.from_numpy(left_out).nonzero().squeeze(1)


def _ranks(m: int, k: int) -> np.ndarray[Any, Any]:
    """How many candidates a cut leaves after each panel, int64 [q]: as many of a row's k largest as may be so far.

    k shared evenly, five standard deviations and six more: for latents in any order but a contrived one, one row in
    millions has more, and so too few in the end.
    """
    share = k * np.minimum(1, PANEL * np.arange(1, -(-m // PANEL) + 1) / m)
    return np.minimum(k, np.ceil(share + 5 * np.sqrt(share) + 6)).astype(np.int64)


@intrinsic
def _reached(typing_context: Any, sums: Any, unscale: Any, bias: Any, scale: Any, bound: Any) -> Any:
    """Scale a row of 32 sums in place, add the bias, and return which exceed the bound, as the bits of a uint32.

    sums, unscale, bias: addresses of 32 float32 numbers.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, unscale, bias, scale, bound = arguments
        i32, lanes = ir.IntType(32), PANEL // 2
        floats = ir.VectorType(ir.FloatType(), lanes)

        def at(address: Any, half: int) -> Any:
            offset = ir.Constant(ir.IntType(64), 4 * lanes * half)
            return builder.inttoptr(builder.add(address, offset), floats.as_pointer())

        def everywhere(number: Any) -> Any:
            none = ir.Constant(floats, ir.Undefined)
            zeros = ir.Constant(ir.VectorType(i32, lanes), [0] * lanes)
            return builder.shuffle_vector(builder.insert_element(none, number, i32(0)), none, zeros)

        scales, bounds = everywhere(scale), everywhere(bound)
        bits = []
        for half in range(2):
            number = builder.load(at(sums, half), align=4)
            number = builder.fmul(builder.fmul(number, scales), builder.load(at(unscale, half), align=4))
            number = builder.fadd(number, builder.load(at(bias, half), align=4))
            builder.store(number, at(sums, half), align=4)
            mask = builder.bitcast(builder.fcmp_ordered(">", number, bounds), ir.IntType(lanes))
            bits.append(builder.zext(mask, i32))
        return builder.or_(bits[0], builder.shl(bits[1], i32(lanes)))

    signature = types.uint32(types.int64, types.int64, types.int64, types.float32, types.float32)
    return signature, emit


@inlined
def _cut(keys, latents, n, k):
    """Leave about the k largest of keys[:n] in place: how many, and a key that at least k of them reach."""
    slack = k >> 2
    bound = kth_largest(keys, n, k, 31, slack)
    kept = 0
    for i in range(n):
        key = keys[i]
        keys[kept], latents[kept] = key, latents[i]
        kept += key >= bound
    if kept > k + slack:  # many equal the k-th
        kept = cut_to_largest(keys, latents, kept, k, bound)
    return kept, bound


@compiled
def _topk_blocks(start, stop, left, unscale_left, right, unscale_right, bias, ranks, k, value_bits, indices, left_out):
    """Rows of the blocks start..stop: the bits of values [N, k], indices [N, k], and whether a row was left out [N]."""
    n = indices.shape[0]
    room = k + _ROOM + PANEL
    groups = -(-(stop - start) // _GROUP)
    most = -(-(stop - start) // groups) * ROWS
    keys, latents = np.empty((most, room), np.int32), np.empty((most, room), np.int32)
    found, bounds = np.empty(most, np.int64), np.empty(most, np.float32)
    bound_bits = bounds.view(np.int32)
    spare_keys, spare_latents = np.empty(room + 64, np.int32), np.empty(room, np.int32)
    sorted_keys, sorted_latents = np.empty(room, np.int32), np.empty(room, np.int32)
    sums = np.empty((ROWS, PANEL), np.float32)
    sum_bits = sums.view(np.int32)
    address, unscale, biases = sums.ctypes.data, unscale_right.ctypes.data, bias.ctypes.data

    for group in range(groups):
        first = start + (stop - start) * group // groups
        last = start + (stop - start) * (group + 1) // groups
        found[:] = 0
        bounds[:] = 0
        for q in range(right.shape[0]):
            columns, rank = 4 * PANEL * q, ranks[q]
            for b in range(first, last):
                block_sums(left[b], right[q], sums)
                for r in range(min(ROWS, n - b * ROWS)):
                    place = (b - first) * ROWS + r
                    hits = _reached(  # pyright: ignore[reportCallIssue]  numba passes its typing context itself
                        address + 4 * PANEL * r,
                        unscale + columns,
                        biases + columns,
                        unscale_left[b * ROWS + r],
                        bounds[place],
                    )
                    if hits == 0:
                        continue
                    count = found[place]
                    while hits != 0:
                        j = trailing_zeros(hits)  # pyright: ignore[reportCallIssue]
                        keys[place, count] = sum_bits[r, j]
                        latents[place, count] = q * PANEL + j
                        count += 1
                        hits &= hits - np.uint32(1)
                    if count > rank + _ROOM:
                        count, bound_bits[place] = _cut(keys[place], latents[place], count, rank)
                    found[place] = count
        for place in range(min((last - first) * ROWS, n - first * ROWS)):
            row, count = first * ROWS + place, found[place]
            if count < k:
                left_out[row] = True
                continue
            spare_keys[:count], spare_latents[:count] = keys[place, :count], latents[place, :count]
            if count > k:
                bound = kth_largest(spare_keys, count, k, 31, 0)
                count = cut_to_largest(spare_keys, spare_latents, count, k, bound)
            sort_candidates(spare_keys, spare_latents, count, sorted_keys, sorted_latents)
            for i in range(k):
                value_bits[row, i] = sorted_keys[i]
                indices[row, i] = sorted_latents[i]
