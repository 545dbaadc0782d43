"""The loops of `train.kernels.cpu.screen`: 8-bit products, the few latents that may be among the largest, their exact
products.

- Rows are rounded to signed bytes and packed in blocks of 14, latents to unsigned bytes (plus 128) in panels of 32,
  four coordinates side by side: what VPDPBUSD of AVX-512 VNNI multiplies and adds in one instruction. 14 x 32 sums stay
  in registers, become estimates there, and are compared with each row's bound; only those that exceed it are kept.
- Whenever the number of latents seen has quadrupled, a row's bound is drawn up. They are a fair sample, of which the
  largest estimates say what k of all latents are nearly sure to reach; whether k did is known at the end. So a row has
  some two hundred candidates in all, of M. Where they fill their room before, the bound is what k surely reach.
- The k candidates of the largest estimates are multiplied out, and then those that may still exceed the least of them.

A row's bits depend on itself and the weights alone, not on the block or the thread: a product is summed in one order,
wherever its latent stands among the candidates. Not here: what to do with the rows that are left out.

Shapes: N rows, D d_model, M n_latents, k; q = D / 4 quads, b blocks of 14 rows, p panels of 32 latents.
"""

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.cpython.unsafe.numbers import trailing_zeros
from numba.extending import intrinsic

from train.kernels.cpu.compiling import compiled, inlined

_VECTORS, _LANES = 2, 16
ROWS, PANEL = 14, _VECTORS * _LANES
"""Estimates of a block: 14 x 32; 28 of the 32 vector registers."""

GROUP = 24
"""Blocks that a thread takes through all panels: so many that reading a panel is a small part of using it."""

_ROOM = 224
"""Candidates beyond k before a row is cut for the first time."""

_MOST = 1024
"""Candidates that a row may have after a cut; with more it is left out."""

_TILE = 64
"""Latents that one row after another is multiplied with: so many stay in a core's cache."""

_CHECKED = 0.75
"""Of the margin: a row in which an estimate is further off is left out."""


def _choice(name: str) -> Any:
    """The LLVM operation of that name on two float32 numbers neither of which is a NaN: loops of it are vectorised, as
    those of comparisons and branches are not."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 2)
        operation = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.f32")
        return builder.call(operation, arguments, fastmath=("nnan", "nsz"))

    @intrinsic
    def choose(typing_context: Any, a: Any, b: Any) -> Any:
        return types.float32(types.float32, types.float32), emit

    return choose


_greater, _lesser = _choice("maxnum"), _choice("minnum")


@inlined
def _rotate(row, signs, blocks, out):
    """out [D] = signs * row, its `blocks` equal parts mixed by a Hadamard matrix (Sylvester 1867): sums and differences
    of parts, then of pairs of parts, and so on. That is sqrt(blocks) times an orthogonal matrix."""
    d = row.size
    for i in range(d):
        out[i] = row[i] * signs[i]
    half = d // blocks
    while half < d:
        for first in range(0, d, 2 * half):
            low, high = out[first : first + half], out[first + half : first + 2 * half]
            for i in range(half):
                total, difference = low[i] + high[i], low[i] - high[i]
                low[i], high[i] = total, difference
        half *= 2


@inlined
def _round(rotated, line):
    """The nearest bytes to multiples of one scale, line int8 [D]: the scale, and the sum of the bytes. Of numbers that
    are not finite or all zero, the scale and the bytes are 0."""
    largest = np.float32(0)
    for i in range(rotated.size):
        largest = _greater(largest, abs(rotated[i]))  # pyright: ignore[reportCallIssue]  numba passes its context
    inverse = np.float32(127) / largest if np.float32(1e-30) < largest < np.inf else np.float32(0)
    total = np.int32(0)
    for i in range(rotated.size):
        byte = np.int32(np.rint(rotated[i] * inverse))
        total += byte
        line[i] = np.int8(byte)
    return largest / np.float32(127) if inverse > 0 else np.float32(0), total


@compiled
def pack_latents(start, stop, weights, order, signs, blocks, panels, scale, norm):
    """Panels start..stop of int32 [p, q, 32], from weights [M, D] in the order of `order` [32 p]: rotated, rounded,
    plus 128, as bytes; and the scale and norm of each, [32 p]. Beyond the first M all are those of a row of zeros."""
    m, d = weights.shape
    unit = np.float32(1 / np.sqrt(blocks))
    rotated, line = np.empty(d, np.float32), np.empty(d, np.int8)
    quads = line.view(np.int32)
    flip = np.int32(-0x7F7F7F80)  # adds 128 to each of four bytes
    for place in range(start * PANEL, stop * PANEL):
        if place < m:
            row = weights[order[place]]
            norm[place] = np.sqrt(_dot(row, row))
            _rotate(row, signs, blocks, rotated)
        else:
            norm[place] = 0
            rotated[:] = 0
        scale[place] = unit * _round(rotated, line)[0]
        for quad in range(quads.size):
            panels[place // PANEL, quad, place % PANEL] = quads[quad] ^ flip


@compiled
def pack_rows(start, stop, rows, signs, blocks, packed, scale, square, offset):
    """Blocks start..stop of int32 [b, q, 14], from rows [N, D]: rotated and rounded, four bytes each.

    Also each row's scale, squared norm and -128 times the sum of its bytes, all [14 b]. Rows beyond N, of zeros and of
    numbers that are not finite have bytes and scale 0.
    """
    n, d = rows.shape
    unit = np.float32(1 / np.sqrt(blocks))
    rotated, line = np.empty(d, np.float32), np.empty(d, np.int8)
    quads = line.view(np.int32)
    for r in range(start * ROWS, stop * ROWS):
        square[r] = _dot(rows[r], rows[r]) if r < n else np.float32(0)
        if 0 < square[r] < np.inf:
            _rotate(rows[r], signs, blocks, rotated)
        else:
            rotated[:] = 0
        largest, total = _round(rotated, line)
        scale[r], offset[r] = unit * largest, np.int32(-128) * total
        for quad in range(quads.size):
            packed[r // ROWS, quad, r % ROWS] = quads[quad]


@inlined
def _dot(a, b):
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@intrinsic
def _collect_block(
    typing_context: Any,
    left: Any,
    right: Any,
    quads: Any,
    offset: Any,
    scale: Any,
    size: Any,
    margin: Any,
    bound: Any,
    latent: Any,
    guesses: Any,
    latents: Any,
    room: Any,
    counts: Any,
) -> Any:
    """Estimates of 14 rows and a panel; those that may exceed their row's bound join its candidates.

    left: int32 [quads, 14]; right: int32 [quads, 32]; offset: int32 [14], where the sums begin; scale, size: [32];
    margin, bound: [14]; latent: int32 [32], their numbers. A latent joins if estimate + margin * size > bound, with
    estimate = sum * scale: it is written to guesses float32 [14, room], its number to latents int32 [14, room], both
    from the row's count on, int32 [14], which goes up. Something may be written to the 32 places beyond. All but
    `quads` and `room` are addresses.
    """
    return types.void(*(types.int64,) * 13), _emit_block


def _emit_block(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    left, right, quads, offset, scale, size, margin, bound, latent, guesses, latents, room, counts = arguments
    i16, i32, i64, f32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
    lanes, floats, bits = (ir.VectorType(kind, _LANES) for kind in (i32, f32, ir.IntType(1)))
    # Since LLVM 21 the operands are typed as bytes.
    operands = ir.VectorType(ir.IntType(8), 4 * _LANES) if binding.llvm_version_info[0] >= 21 else lanes

    def instruction(name: str, result: Any, *operands: Any) -> Any:
        return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, operands), f"llvm.{name}")

    add_products = instruction("x86.avx512.vpdpbusd.512", lanes, lanes, operands, operands)
    pack_floats = instruction("x86.avx512.mask.compress.v16f32", floats, floats, floats, bits)
    pack_lanes = instruction("x86.avx512.mask.compress.v16i32", lanes, lanes, lanes, bits)
    count_bits = instruction("ctpop.i16", i16, i16)

    def at(address: Any, place: Any, kind: Any) -> Any:
        place = i64(place) if isinstance(place, int) else place
        return builder.inttoptr(builder.add(address, builder.shl(place, i64(2))), kind.as_pointer())

    def everywhere(number: Any, kind: Any) -> Any:
        none = ir.Constant(kind, ir.Undefined)
        first = builder.insert_element(none, number, i32(0))
        return builder.shuffle_vector(first, none, ir.Constant(lanes, [0] * _LANES))

    def load(address: Any, place: int, kind: Any) -> Any:
        return builder.load(at(address, place, kind), align=4)

    starts = [everywhere(load(offset, r, i32), lanes) for r in range(ROWS)]
    entry = builder.block
    loop, done = (builder.function.append_basic_block(name) for name in ("quads", "sums"))
    builder.branch(loop)
    builder.position_at_end(loop)
    quad = builder.phi(i64)
    quad.add_incoming(i64(0), entry)
    before = [[builder.phi(lanes) for _ in range(_VECTORS)] for _ in range(ROWS)]
    panel = builder.add(right, builder.mul(quad, i64(4 * PANEL)))
    block = builder.add(left, builder.mul(quad, i64(4 * ROWS)))
    columns = [load(panel, _LANES * j, operands) for j in range(_VECTORS)]
    after = []
    for r, olds in enumerate(before):
        row = builder.bitcast(everywhere(load(block, r, i32), lanes), operands)
        after.append(
            [builder.call(add_products, [old, column, row]) for old, column in zip(olds, columns, strict=True)]
        )
    following = builder.add(quad, i64(1))
    quad.add_incoming(following, loop)
    for first, olds, news in zip(starts, before, after, strict=True):
        for old, new in zip(olds, news, strict=True):
            old.add_incoming(first, entry)
            old.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, quads), loop, done)

    builder.position_at_end(done)
    scales, sizes = ([load(address, _LANES * j, floats) for j in range(_VECTORS)] for address in (scale, size))
    numbers = [load(latent, _LANES * j, lanes) for j in range(_VECTORS)]
    for r, news in enumerate(after):
        margins, bounds = (everywhere(load(address, r, f32), floats) for address in (margin, bound))
        estimates, masks = [], []
        for new, scale_, size_ in zip(news, scales, sizes, strict=True):
            estimate = builder.fmul(builder.sitofp(new, floats), scale_)
            most = builder.fadd(estimate, builder.fmul(margins, size_, flags=["contract"]), flags=["contract"])
            estimates.append(estimate)
            masks.append(builder.fcmp_ordered(">", most, bounds))
        joining = [builder.bitcast(mask, i16) for mask in masks]
        with builder.if_then(builder.icmp_unsigned("!=", builder.or_(*joining), i16(0)), likely=False):
            count = builder.sext(load(counts, r, i32), i64)
            for estimate, number, mask, bits_ in zip(estimates, numbers, masks, joining, strict=True):
                end = builder.add(builder.mul(room, i64(r)), count)
                packed = builder.call(pack_floats, [estimate, ir.Constant(floats, None), mask])
                builder.store(packed, at(guesses, end, floats), align=4)
                packed = builder.call(pack_lanes, [number, ir.Constant(lanes, None), mask])
                builder.store(packed, at(latents, end, lanes), align=4)
                count = builder.add(count, builder.zext(builder.call(count_bits, [bits_]), i64))
            builder.store(builder.trunc(count, i32), at(counts, r, i32), align=4)
    return context.get_dummy_value()


@compiled
def screen_blocks(
    start,
    stop,
    blocks,
    offset,
    row_scale,
    margin,
    panels,
    scale,
    size,
    order,
    ranks,
    own_size,
    centred,
    weights,
    values,
    indices,
    left_out,
):
    """Rows of the blocks start..stop: values [N, k], indices [N, k], and whether a row was left out [N].

    blocks, offset, row_scale: of `pack_rows`; margin [14 b], 0 for rows that have no scale; panels: of `pack_latents`;
    scale, size, order [32 p]: those of the panels' latents, size -inf where there is none; own_size [M]: by latent. An
    estimate is off by at most margin * size. ranks [p]: after which panels bounds are drawn up, and to which of a row's
    candidates; else 0. centred [N, D], weights [M, D].
    """
    n, k = indices.shape
    groups = -(-(stop - start) // GROUP)
    most = -(-(stop - start) // groups) * ROWS
    room = k + _MOST + 4 * PANEL
    guesses, latents = np.empty((most, room), np.float32), np.empty((most, room), np.int32)
    counts, limits, bounds = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.float32)
    exact = np.empty(room, np.float32)
    quads, largest = panels.shape[1], own_size.max()

    for group in range(groups):
        first = start + (stop - start) * group // groups
        last = start + (stop - start) * (group + 1) // groups
        counts[:] = 0
        limits[:] = k + _ROOM
        for place in range((last - first) * ROWS):
            bounds[place] = -np.inf if margin[first * ROWS + place] > 0 else np.inf
        for panel in range(panels.shape[0]):
            rank = ranks[panel] if ranks[panel] > 0 else k
            for b in range(first, last):
                begin = (b - first) * ROWS
                _collect_block(  # pyright: ignore[reportCallIssue]  numba passes its typing context itself
                    blocks[b].ctypes.data,
                    panels[panel].ctypes.data,
                    quads,
                    offset.ctypes.data + 4 * ROWS * b,
                    scale.ctypes.data + 4 * PANEL * panel,
                    size.ctypes.data + 4 * PANEL * panel,
                    margin.ctypes.data + 4 * ROWS * b,
                    bounds.ctypes.data + 4 * begin,
                    order.ctypes.data + 4 * PANEL * panel,
                    guesses.ctypes.data + 4 * room * begin,
                    latents.ctypes.data + 4 * room * begin,
                    room,
                    counts.ctypes.data + 4 * begin,
                )
                for place in range(begin, begin + ROWS):
                    count = counts[place]
                    if count > limits[place] or (ranks[panel] > 0 and count >= rank):
                        guess, slack = guesses[place], margin[first * ROWS + place] * largest
                        bound = _kth_largest(guess, count, rank) - (slack if rank == k else 0)
                        bounds[place] = max(bounds[place], bound)
                        count = _put_first(guess, latents[place], 0, count, bounds[place] - slack)
                        limits[place] = min(k + max(_ROOM, 2 * count), k + _MOST)
                        if count > limits[place]:
                            count, bounds[place] = 0, np.inf
                        counts[place] = count
        for place in range(min((last - first) * ROWS, n - first * ROWS)):
            r = first * ROWS + place
            left_out[r] = not _finish(
                guesses[place],
                latents[place],
                counts[place],
                bounds[place],
                row_scale[r],
                margin[r],
                own_size,
                largest,
                centred[r],
                weights,
                exact,
                values[r],
                indices[r],
            )


@inlined
def _finish(guess, latent, n, bound, scale, margin, size, largest, own, weights, exact, values, indices):
    """The k largest products of a row, whose candidates [:n] are all latents that may exceed `bound`; False where that
    leaves a doubt."""
    k = values.size
    if n < k:
        return False
    # First the k largest estimates: the k-th of their products is at most the k-th of all.
    first = _put_first(guess, latent, 0, n, _kth_largest(guess, n, k))
    _multiply(own, weights, latent, 0, first, exact)
    least, inverse = _kth_largest(exact, first, k), np.float32(1) / scale
    reached = least * inverse
    if reached < bound:
        return False
    n = _put_first(guess, latent, first, n, reached - margin * largest)
    end = first
    for i in range(first, n):
        estimate, j = guess[i], latent[i]
        guess[end], latent[end] = estimate, j
        end += estimate + margin * size[j] >= reached
    _multiply(own, weights, latent, first, end, exact)
    for i in range(end):
        if not abs(exact[i] * inverse - guess[i]) <= np.float32(_CHECKED) * margin * size[latent[i]]:
            return False
    padded = _padded(exact, end)
    for i in range(end):
        number, j, place = exact[i], latent[i], np.int32(0)
        if number < least:
            continue
        for other in range(padded):
            before = (exact[other] > number) | ((exact[other] == number) & (latent[other] < j))
            place = np.int32(place + np.int32(before))
        if place < k:
            values[place] = max(number, np.float32(0))
            indices[place] = j
    return True


@inlined
def _put_first(guess, latent, start, stop, bound):
    """Of the candidates start..stop, put those whose estimate reaches the bound first; returns where they end.

    64 comparisons become the bits of a mask, which compilers know how to vectorise; hits are rare.
    """
    end = start
    for begin in range(start, stop, 64):
        part = guess[begin : begin + 64]  # there is room beyond `stop`
        hits = np.uint64(0)
        for i in range(64):
            hits |= np.uint64(part[i] >= bound) << np.uint64(i)
        if stop - begin < 64:
            hits &= (np.uint64(1) << np.uint64(stop - begin)) - np.uint64(1)
        while hits != 0:
            i = begin + trailing_zeros(hits)  # pyright: ignore[reportCallIssue]  numba passes its context
            guess[i], guess[end] = guess[end], guess[i]
            latent[i], latent[end] = latent[end], latent[i]
            end += 1
            hits &= hits - np.uint64(1)
    return end


@compiled
def multiply_latents(start, stop, centred, weights, out):
    """Latents start..stop of out [N, M] = centred [N, D] @ weights [M, D]^T, to the bit as `screen_blocks`."""
    latents = np.arange(stop).astype(np.int32)
    for first in range(start, stop, _TILE):
        for r in range(centred.shape[0]):
            _multiply(centred[r], weights, latents, first, min(first + _TILE, stop), out[r])


@inlined
def _multiply(own, weights, latent, start, stop, exact):
    """Fill exact [start..stop] with the products of the candidates, always four at a time: all in the same order."""
    for i in range(start, stop, 4):
        second, third, fourth = min(i + 1, stop - 1), min(i + 2, stop - 1), min(i + 3, stop - 1)
        row_a, row_b = weights[latent[i]], weights[latent[second]]
        row_c, row_d = weights[latent[third]], weights[latent[fourth]]
        a = b = c = d = np.float32(0)
        for j in range(own.size):
            a += own[j] * row_a[j]
            b += own[j] * row_b[j]
            c += own[j] * row_c[j]
            d += own[j] * row_d[j]
        exact[fourth], exact[third], exact[second], exact[i] = d, c, b, a


@inlined
def _kth_largest(numbers, n, k):
    """At most the k-th largest of numbers[:n] and nearly that, by halving the range that holds it."""
    low, high = numbers[0], numbers[0]
    for i in range(n):
        low, high = _lesser(low, numbers[i]), _greater(high, numbers[i])  # pyright: ignore[reportCallIssue]
    padded = _padded(numbers, n)
    for _ in range(24):  # at least k numbers reach `low` throughout
        middle = low + (high - low) * np.float32(0.5)
        reached = np.int32(0)
        for i in range(padded):
            reached = np.int32(reached + np.int32(numbers[i] >= middle))
        if reached >= k:
            low = middle
            if reached == k:
                break
        else:
            high = middle
    return low


@inlined
def _padded(numbers, n):
    """Put -inf after numbers[:n], where there is room, up to a length of loops that compilers vectorise whole."""
    padded = (n + 31) // 32 * 32
    numbers[n:padded] = -np.inf
    return padded
