"""The loops of AuxK in 16-bit integers (`train.kernels.cpu.tiled_auxk`): all of a tile of rows while it is in a core's
cache.

A tile is 140 rows. One thread takes it through the products of `train.objective.losses.auxk`: the first three, of all
latents for these rows, one after the other, with what lies between them (the k largest, the error that is left, its
gradient) done to numbers that have not left the cache. The last two, of all rows for these latents, need every tile; so
a tile leaves behind what they multiply: its inputs, activations and both gradients, rounded to 16 bits and packed. The
scale of a latent's or a coordinate's numbers is chosen for each tile, while they are at hand; sums over tiles are
float32.

Shapes: A dead latents, D d_model, T tiles; wide: rounded up to whole panels of 32, with zeros.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from train.kernels.cpu.compiling import compiled, inlined
from train.kernels.cpu.int16 import (
    AHEAD,
    LANES,
    PANEL,
    ROWS,
    VECTORS,
    emit_block,
    everywhere,
    product_blocks,
    vector_at,
)
from train.kernels.cpu.int16 import UNIT_PANELS as PRODUCT_PANELS
from train.kernels.cpu.tile_loops import FLOATS, INTS, MAGNITUDE, PAIRS, SLACK, TILE, pack_columns, pack_rows
from train.kernels.cpu.topk_loops import count_reaching, kth_largest

UNIT_BLOCKS, UNIT_PANELS = 22, 9
"""Results of the last products that a thread takes at a time: so many fit its cache, a tile's operands with them."""

_LEFT_BITS, _RIGHT_BITS = 12, 11
"""Size of the whole numbers of the last products, without their signs: see `train.kernels.cpu.tile_loops`."""

_NEAR = np.int32(1 << 19)
"""A sixteenth of a number or less, as a difference of the bits of floats."""

_TURNS = 4
"""So often the bounds are moved where the k-th largest is not between them."""

_WINDOW = 64
"""Latents between two bounds that are ranked by comparing all with all."""


@compiled
def tiles_of_rows(
    start,
    stop,
    inputs,
    error,
    weight,
    scale,
    bias,
    k,
    encoder,
    encoder_unscale,
    decoder,
    decoder_unscale,
    back,
    back_unscale,
    squared,
    latent_sums,
    moments,
    means,
    packed_inputs,
    inputs_unscale,
    packed_grads,
    grads_unscale,
    packed_active,
    active_unscale,
    packed_grad_z,
    grad_z_unscale,
):
    """Tiles start..stop of a batch.

    inputs, error: [rows, D]. weight, scale: [rows] the row's share of the loss w_n, and what its error is multiplied by
    first. bias: [wide A]. encoder, decoder, back: W_enc, W_dec^T and W_dec as right operands, `Packed`, with `unscale`.

    Filled: squared [rows] |missed|^2. latent_sums [T, wide A] sum over rows of the gradient of z. moments [T, 2] sum of
    w_n, and of w_n |s_n - mean|^2 for the scaled errors s. means [T, wide D] of s, weighted by w. The rest: packed
    operands of the last two products, [T, blocks, 70, width], and `unscale` [T, blocks * width]. Gradients lack the
    factor 1 / variance.
    """
    n_rows = len(inputs)
    wide_d, wide_a = means.shape[1], bias.size
    x, z = _tile(wide_d), _tile(wide_a)  # x: inputs, then the gradient of the output; z: of the latents
    x[:, inputs.shape[1] :] = 0
    alive = np.empty((TILE, wide_a // LANES), np.uint16)
    left = np.empty(TILE * max(wide_d, wide_a) // 2 + SLACK, np.int32)
    unscale = np.empty(TILE, np.float32)
    columns = np.empty((2, max(wide_d, wide_a) + SLACK), np.int32)
    keys, near = np.empty(wide_a, np.int32), np.empty(_WINDOW, np.int32)
    bound = np.int32(0)
    d_units, a_units = -(-decoder.shape[0] // PRODUCT_PANELS), -(-encoder.shape[0] // PRODUCT_PANELS)
    for t in range(start, stop):
        first = t * TILE
        n = min(TILE, n_rows - first)
        blocks = -(-n // ROWS)
        rows = inputs[first : first + n]
        if n < TILE or inputs.shape[1] < wide_d:
            x[n:] = 0
            for r in range(n):
                _copy(rows[r], x[r])
            rows = x
        pack_columns(rows, columns, packed_inputs[t], inputs_unscale[t], _RIGHT_BITS)
        packed = pack_rows(rows, left, encoder.shape[1], unscale)[:blocks]
        product_blocks(0, a_units, packed, unscale, encoder, encoder_unscale, z)
        z[n:] = 0

        for r in range(n):
            bound = _keep_largest(z[r], bias, k, bound, keys, near, alive[r])
        pack_columns(z, columns, packed_active[t], active_unscale[t], _LEFT_BITS)
        packed = pack_rows(z, left, decoder.shape[1], unscale)[:blocks]
        product_blocks(0, d_units, packed, unscale, decoder, decoder_unscale, x)
        x[n:] = 0

        part = slice(first, first + n)
        moments[t, 0] = _mean_error(error[part], weight[part], scale[part], means[t])
        moments[t, 1] = _output_gradients(error[part], weight[part], scale[part], means[t], squared[part], x)
        pack_columns(x, columns, packed_grads[t], grads_unscale[t], _RIGHT_BITS)
        packed = pack_rows(x, left, back.shape[1], unscale)[:blocks]
        product_blocks(0, a_units, packed, unscale, back, back_unscale, z)
        z[n:] = 0

        latent_sums[t] = 0
        for r in range(n):
            _mask(z[r], alive[r], latent_sums[t])
        pack_columns(z, columns, packed_grad_z[t], grad_z_unscale[t], _LEFT_BITS)


@compiled
def add_gradients(start, stop, left, left_unscale, right, right_unscale, out, anew):
    """Units start..stop of out [A, D] += sum over tiles of left [A, 140] @ right [140, D] of `tiles_of_rows`.

    anew: `out` is taken for zeros, whatever it holds.
    """
    n, m = out.shape
    n_tiles, n_blocks, n_panels = left.shape[0], left.shape[1], right.shape[1]
    down, across = -(-n_blocks // UNIT_BLOCKS), -(-n_panels // UNIT_PANELS)
    sums = np.empty((UNIT_PANELS, UNIT_BLOCKS, ROWS, PANEL), np.float32)
    for unit in range(start, stop):
        i, j = unit // across, unit % across
        first_block, first_panel = n_blocks * i // down, n_panels * j // across
        blocks, panels = n_blocks * (i + 1) // down - first_block, n_panels * (j + 1) // across - first_panel
        sums[:] = 0
        for t in range(n_tiles):
            following = min(t + 1, n_tiles - 1)
            next_left, next_right = left[following, first_block].ctypes.data, right[following, first_panel].ctypes.data
            left_bytes = 4 * PAIRS * ROWS * blocks
            for q in range(panels):
                for b in range(blocks):
                    fetched = AHEAD * PAIRS * (q * blocks + b)
                    _add_tile(  # pyright: ignore[reportCallIssue]  numba passes its typing context itself
                        left[t, first_block + b].ctypes.data,
                        right[t, first_panel + q].ctypes.data,
                        left_unscale[t].ctypes.data + 4 * ROWS * (first_block + b),
                        right_unscale[t].ctypes.data + 4 * PANEL * (first_panel + q),
                        sums[q, b].ctypes.data,
                        next_left + fetched if fetched < left_bytes else next_right + fetched - left_bytes,
                    )
        for q in range(panels):
            column = (first_panel + q) * PANEL
            for b in range(blocks):
                row = (first_block + b) * ROWS
                for r in range(min(ROWS, n - row)):
                    for j in range(min(PANEL, m - column)):
                        before = np.float32(0) if anew else out[row + r, column + j]
                        out[row + r, column + j] = before + sums[q, b, r, j]


@inlined
def _tile(wide):
    return np.empty(TILE * wide + SLACK, np.float32)[: TILE * wide].reshape(TILE, wide)


@inlined
def _copy(source, target):
    for i in range(source.size):
        target[i] = source[i]


@inlined
def _keep_largest(row, bias, k, guess, keys, near, alive):
    """ReLU of row + bias in place, all but the k largest set to zero, ties to the lowest; `alive`: its bits say where
    it is not zero.

    As `train.kernels.cpu.topk_loops.keep_rows`, but begins near `guess`, the bound of another row: rows of one scale
    differ by less than `_NEAR`, mostly, and only the few latents between are ranked. Returns a bound that k latents
    reach.
    """
    n = row.size
    numbers, ranks = row.ctypes.data, keys.ctypes.data
    low, high = np.int32(guess - _NEAR), np.int32(guess + _NEAR)
    reach_low, reach_high = 0, 0
    for j in range(0, n, LANES):
        counts = _rank(numbers + 4 * j, bias.ctypes.data + 4 * j, low, high, ranks + 4 * j)  # pyright: ignore[reportCallIssue]
        reach_low += counts & 0xFF
        reach_high += counts >> 8
    bound = np.int32(0)
    if k < n:
        for _ in range(_TURNS):
            if reach_high >= k:
                low, high, reach_low = high, np.int32(high + 2 * _NEAR), reach_high
                reach_high = count_reaching(keys, n, high)
            elif reach_low < k:
                low, high, reach_high = np.int32(low - 2 * _NEAR), low, reach_low
                reach_low = count_reaching(keys, n, low)
        if reach_high < k <= reach_low and reach_low - reach_high <= _WINDOW:
            found = 0
            for j in range(0, n, LANES):
                found += _copy_between(ranks + 4 * j, low, high, near.ctypes.data + 4 * found)  # pyright: ignore[reportCallIssue]
            within, reached = _kth_of_few(near, found, k - reach_high)
            bound = np.int32(low + within)
            reached += reach_high
        else:
            bound = np.int32(kth_largest(keys, n, k, 31, 0))
            reached = count_reaching(keys, n, bound)
        if reached > k:  # ties at the bound
            spare = k
            for j in range(n):
                spare -= keys[j] > bound
            for j in range(n):
                if keys[j] == bound:
                    keys[j] -= spare <= 0
                    spare -= 1
    for part in range(alive.size):
        alive[part] = _cut(ranks + 4 * LANES * part, bound, numbers + 4 * LANES * part)  # pyright: ignore[reportCallIssue]
    return bound


@inlined
def _kth_of_few(keys, n, k):
    """The k-th largest of keys[:n], at most 64 of them and none negative, and how many reach it."""
    above = np.zeros(_WINDOW, np.int32)  # for each, how many are larger
    for i in range(n, _WINDOW):
        keys[i] = -1
    for j in range(n):
        key = keys[j]
        for i in range(_WINDOW):  # a fixed length, which compilers vectorise whole
            above[i] = np.int32(above[i] + np.int32(keys[i] < key))
    smallest = MAGNITUDE
    for i in range(_WINDOW):
        smallest = min(smallest, keys[i] if above[i] < k else MAGNITUDE)
    return smallest, count_reaching(keys, _WINDOW, smallest)


@inlined
def _mean_error(error, weight, scale, mean):
    """mean [wide D] of the scaled errors of a tile, weighted by w; returns the sum of w."""
    d = error.shape[1]
    total = np.float32(0)
    mean[:] = 0
    for r in range(len(error)):
        row, by = error[r], weight[r] * scale[r]
        total += weight[r]
        for i in range(d):
            mean[i] += by * row[i]
    for i in range(d):
        mean[i] /= total
    return total


@inlined
def _output_gradients(error, weight, scale, mean, squared, decoded):
    """decoded [140, wide D] becomes -2 w scale^2 (error - decoded), squared |error - decoded|^2, of rows there are.

    Returns the sum of w |s - mean|^2 over the scaled errors s.
    """
    deviation = np.float64(0)
    for r in range(len(error)):
        row, missed = error[r], decoded[r]
        by = -2 * weight[r] * scale[r] * scale[r]
        total, off = np.float32(0), np.float32(0)
        for i in range(row.size):
            miss = row[i] - missed[i]
            total += miss * miss
            missed[i] = by * miss
            apart = scale[r] * row[i] - mean[i]
            off += apart * apart
        squared[r] = total
        deviation += np.float64(weight[r]) * np.float64(off)
    return deviation


@inlined
def _mask(row, alive, sums):
    """Zero where a latent is not alive, and add the rest to sums."""
    numbers, totals = row.ctypes.data, sums.ctypes.data
    for part in range(alive.size):
        _add_alive(numbers + 4 * LANES * part, alive[part], totals + 4 * LANES * part)  # pyright: ignore[reportCallIssue]


@intrinsic
def _rank(typing_context: Any, row: Any, bias: Any, low: Any, high: Any, keys: Any) -> Any:
    """Add bias [16] to row [16], and write keys, int32 [16]: its bits, 0 where negative, the largest for a NaN.

    Returns how many reach `low`, and 256 times how many reach `high`; the others are addresses.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, bias, low, high, keys = arguments
        i64 = ir.IntType(64)
        row, bias = (builder.inttoptr(a, FLOATS.as_pointer()) for a in (row, bias))
        number = builder.fadd(builder.load(row, align=4), builder.load(bias, align=4))
        builder.store(number, row, align=4)
        bits, zeros = builder.bitcast(number, INTS), ir.Constant(INTS, None)
        key = builder.select(builder.icmp_signed(">", bits, zeros), bits, zeros)
        key = builder.select(
            builder.fcmp_unordered("uno", number, number), ir.Constant(INTS, [int(MAGNITUDE)] * LANES), key
        )
        builder.store(key, builder.inttoptr(keys, INTS.as_pointer()), align=4)
        reach_low, reach_high = (
            builder.zext(
                builder.ctpop(
                    builder.bitcast(builder.icmp_signed(">=", key, everywhere(builder, bound)), ir.IntType(LANES))
                ),
                i64,
            )
            for bound in (low, high)
        )
        return builder.or_(reach_low, builder.shl(reach_high, i64(8)))

    return types.int64(types.int64, types.int64, types.int32, types.int32, types.int64), emit


@intrinsic
def _copy_between(typing_context: Any, keys: Any, low: Any, high: Any, out: Any) -> Any:
    """Write what those of int32 [16] keys exceed `low` by that are below `high`; returns their number."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        keys, low, high, out = arguments
        low, high = (everywhere(builder, bound) for bound in (low, high))
        vector = builder.load(builder.inttoptr(keys, INTS.as_pointer()), align=4)
        near = builder.and_(builder.icmp_signed(">=", vector, low), builder.icmp_signed("<", vector, high))
        kinds = [INTS, ir.IntType(32).as_pointer(), near.type]
        store = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.masked.compressstore.v16i32"
        )
        builder.call(store, [builder.sub(vector, low), builder.inttoptr(out, ir.IntType(32).as_pointer()), near])
        return builder.zext(builder.ctpop(builder.bitcast(near, ir.IntType(LANES))), ir.IntType(64))

    return types.int64(types.int64, types.int32, types.int32, types.int64), emit


@intrinsic
def _cut(typing_context: Any, keys: Any, bound: Any, out: Any) -> Any:
    """Write keys, int32 [16], with zero for those below `bound`; returns the bits of those that are above zero."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        keys, bound, out = arguments
        zeros = ir.Constant(INTS, None)
        vector = builder.load(builder.inttoptr(keys, INTS.as_pointer()), align=4)
        kept = builder.select(builder.icmp_signed(">=", vector, everywhere(builder, bound)), vector, zeros)
        builder.store(kept, builder.inttoptr(out, INTS.as_pointer()), align=4)
        return builder.bitcast(builder.icmp_signed(">", kept, zeros), ir.IntType(LANES))

    return types.uint16(types.int64, types.int32, types.int64), emit


@intrinsic
def _add_alive(typing_context: Any, row: Any, alive: Any, sums: Any) -> Any:
    """Zero row [16] where a bit of `alive` is not set, and add it to sums [16]."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, alive, sums = arguments
        row, sums = (builder.inttoptr(a, FLOATS.as_pointer()) for a in (row, sums))
        mask = builder.bitcast(alive, ir.VectorType(ir.IntType(1), LANES))
        number = builder.select(mask, builder.load(row, align=4), ir.Constant(FLOATS, None))
        builder.store(number, row, align=4)
        builder.store(builder.fadd(builder.load(sums, align=4), number), sums, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint16, types.int64), emit


@intrinsic
def _add_tile(
    typing_context: Any, left: Any, right: Any, unscale_left: Any, unscale_right: Any, sums: Any, ahead: Any
) -> Any:
    """sums [14, 32] += left [70 pairs, 14]^T @ right [70 pairs, 32] * unscale_left [14] * unscale_right [32].

    All are addresses; float32 but for the pairs. ahead: of `emit_block`.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, unscale_left, unscale_right, sums, ahead = arguments
        fma_type = ir.FunctionType(FLOATS, [FLOATS, FLOATS, FLOATS])
        fma = cgutils.get_or_insert_function(builder.module, fma_type, "llvm.fma.v16f32")
        columns = [builder.load(vector_at(builder, unscale_right, 64 * j, FLOATS), align=4) for j in range(VECTORS)]
        for r, news in enumerate(emit_block(builder, left, right, ir.Constant(ir.IntType(64), PAIRS), ahead)):
            row = everywhere(builder, builder.load(vector_at(builder, unscale_left, 4 * r, ir.FloatType()), align=4))
            for j, (new, column) in enumerate(zip(news, columns, strict=True)):
                number = builder.fmul(builder.sitofp(new, FLOATS), row)
                place = vector_at(builder, sums, 4 * (r * PANEL + j * LANES), FLOATS)
                total = builder.call(fma, [number, column, builder.load(place, align=4)])
                builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), emit
