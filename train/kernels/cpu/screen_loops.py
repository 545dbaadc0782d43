"""Compiled loops of the 8-bit screen: packing bytes, finding latents that may be among the largest, exact products.

- Rows are rounded to signed bytes and packed in blocks of 14, latents to unsigned bytes (plus 128) in panels of 32,
  four coordinates side by side, as `train.kernels.cpu.screen_instructions` multiplies them.
- Whenever the number of latents seen has quadrupled, a row's bound is raised. The latents seen are a fair sample: their
  largest estimates tell what k of all latents almost certainly reach; the end shows whether k did. So a row has some
  two hundred candidates of M in all. If they fill their room earlier, the bound is one that k certainly reach.

A row's bits depend only on itself and the weights: a product is summed in the same order wherever its latent stands
among the candidates. `train.kernels.cpu.screen` describes the whole method.

Tested in tests/train/kernels/cpu/test_screen.py.

Shapes: N rows, D d_model, M n_latents, k active latents; q = D / 4 quads, b blocks of 14 rows, p panels of 32 latents.
"""

import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from train.kernels.cpu.compiling import compiled, inlined
from train.kernels.cpu.screen_instructions import PANEL, ROWS, collect_block, greater, lesser
from train.kernels.cpu.sparse_loops import dot

GROUP = 24
"""Blocks that a thread takes through all panels together: enough that reading a panel costs little beside using it."""

_ROOM = 224  # candidates beyond k before a row is first cut
_MOST = 1024  # most candidates beyond k after a cut; a row with more is left out
_TILE = 64  # latents that are multiplied with all rows in turn: so many fit a core's cache
_CHECKED = 0.75  # share of the margin; a row with an estimate further off is left out


@inlined
def _rotate(row, signs, blocks, out):
    """out [D] = signs * row, its `blocks` equal parts mixed by a Hadamard matrix (Sylvester 1867): sums and differences
    of parts, then of pairs of parts, and so on. This is sqrt(blocks) times an orthogonal matrix."""
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
    """Round to multiples of one scale, as bytes in line int8 [D]; returns the scale and the sum of the bytes. If the
    numbers are not finite or all zero, the scale and the bytes are 0."""
    largest = np.float32(0)
    for i in range(rotated.size):
        largest = greater(largest, abs(rotated[i]))  # pyright: ignore[reportCallIssue]  numba passes its context
    inverse = np.float32(127) / largest if np.float32(1e-30) < largest < np.inf else np.float32(0)
    total = np.int32(0)
    for i in range(rotated.size):
        byte = np.int32(np.rint(rotated[i] * inverse))
        total += byte
        line[i] = np.int8(byte)
    return largest / np.float32(127) if inverse > 0 else np.float32(0), total


@compiled
def pack_latents(start, stop, weights, order, signs, blocks, panels, scale, norm):
    """Fill panels start..stop of int32 [p, q, 32] with weights [M, D] in the order of `order` [32 p], rotated, rounded,
    plus 128, as bytes; and their scales and norms [32 p]. Places beyond M are filled as for rows of zeros."""
    m, d = weights.shape
    unit = np.float32(1 / np.sqrt(blocks))
    rotated, line = np.empty(d, np.float32), np.empty(d, np.int8)
    quads = line.view(np.int32)
    flip = np.int32(-0x7F7F7F80)  # adds 128 to each of four bytes
    for place in range(start * PANEL, stop * PANEL):
        if place < m:
            row = weights[order[place]]
            norm[place] = np.sqrt(dot(row, row))
            _rotate(row, signs, blocks, rotated)
        else:
            norm[place] = 0
            rotated[:] = 0
        scale[place] = unit * _round(rotated, line)[0]
        for quad in range(quads.size):
            panels[place // PANEL, quad, place % PANEL] = quads[quad] ^ flip


@compiled
def pack_rows(start, stop, rows, signs, blocks, packed, scale, square, offset):
    """Fill blocks start..stop of int32 [b, q, 14] with rows [N, D], rotated and rounded, four bytes each.

    Also each row's scale, squared norm and -128 times the sum of its bytes, all [14 b]. Rows beyond N, of zeros, or not
    finite get bytes and scale 0.
    """
    n, d = rows.shape
    unit = np.float32(1 / np.sqrt(blocks))
    rotated, line = np.empty(d, np.float32), np.empty(d, np.int8)
    quads = line.view(np.int32)
    for r in range(start * ROWS, stop * ROWS):
        square[r] = dot(rows[r], rows[r]) if r < n else np.float32(0)
        if 0 < square[r] < np.inf:
            _rotate(rows[r], signs, blocks, rotated)
        else:
            rotated[:] = 0
        largest, total = _round(rotated, line)
        scale[r], offset[r] = unit * largest, np.int32(-128) * total
        for quad in range(quads.size):
            packed[r // ROWS, quad, r % ROWS] = quads[quad]


@compiled
def screen_blocks(start, stop, packed, screened, ranks, own_size, centred, weights, values, indices, left_out):
    """For the rows of blocks start..stop: values [N, k], indices [N, k], and whether a row was left out [N].

    packed: blocks, offset and scale of `pack_rows`, and margin [14 b], 0 for rows that have no scale. screened: panels
    of `pack_latents`, and scale, size, order [32 p] of their latents, size -inf where there is none; own_size [M]: the
    sizes by latent. An estimate is off by at most margin * size. ranks [p]: which of a row's candidates becomes its
    bound after a panel; 0: none. centred [N, D], weights [M, D].
    """
    blocks, offset, row_scale, margin = packed
    panels, scale, size, order = screened
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
                collect_block(  # pyright: ignore[reportCallIssue]  numba passes its typing context itself
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
            candidates = guesses[place], latents[place], counts[place], bounds[place]
            row = row_scale[r], margin[r], centred[r]
            left_out[r] = not _finish(candidates, row, own_size, largest, weights, exact, values[r], indices[r])


@inlined
def _finish(candidates, row, size, largest, weights, exact, values, indices):
    """The k largest products of a row whose candidates [:n] are all that may exceed `bound`; False if in doubt."""
    guess, latent, n, bound = candidates
    scale, margin, own = row
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
    """Move the candidates start..stop whose estimate reaches the bound to the front; returns where they end.

    64 comparisons become the bits of a mask, which compilers can vectorise; hits are rare.
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
    """Latents start..stop of out [N, M] = centred [N, D] @ weights [M, D]^T, with the same bits as `screen_blocks`."""
    latents = np.arange(stop).astype(np.int32)
    for first in range(start, stop, _TILE):
        for r in range(centred.shape[0]):
            _multiply(centred[r], weights, latents, first, min(first + _TILE, stop), out[r])


@inlined
def _multiply(own, weights, latent, start, stop, exact):
    """Fill exact [start..stop] with the candidates' products, always four at a time, each summed in the same order."""
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
    """The k-th largest of numbers[:n] or slightly less, by halving the range that holds it."""
    low, high = numbers[0], numbers[0]
    for i in range(n):
        low, high = lesser(low, numbers[i]), greater(high, numbers[i])  # pyright: ignore[reportCallIssue]
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
    """Fill up numbers[:n], which has room behind, with -inf to a length whose loops vectorise whole; returns it."""
    padded = (n + 31) // 32 * 32
    numbers[n:padded] = -np.inf
    return padded
