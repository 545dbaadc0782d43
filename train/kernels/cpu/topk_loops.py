"""Compiled loops that find the k largest of each row, exactly, at about the speed of reading the row once.

1. One pass over the row takes the maximum of each block of 64 latents.
2. The k-th largest block maximum bounds the k-th largest latent from below: k blocks hold a latent that reaches it.
3. Only blocks that reach the bound are searched again, for the latents that reach it: a few more than k.
4. Those are sorted, and the first k are the answer.

If k is more than half of the blocks, the bound is found from the latents themselves. Numbers are compared as integers:
the bits of floats that are not negative, read as an integer, are in the floats' order. A row without a positive bound,
or with a NaN, is first mapped to integers that are in order for every float, with NaN the largest (as in torch.topk);
its bound is the k-th largest latent. Bounds are built bit by bit from the top, by counting the entries that reach them.

Order of the result: largest first, equal values by ascending latent (-0 equals +0, and one NaN another).

Tested in tests/train/kernels/cpu/test_selection.py.

Shapes: N rows, M n_latents, k latents. "Keys" are signed integers of the floats' width (int16, int32 or int64).
"""

import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from train.kernels.cpu.compiling import compiled, inlined

_BLOCK = 64  # latents; each has one bit of a 64-bit mask


@compiled
def topk_rows(start, stop, bits, k, infinity, values, indices):
    """For rows start..stop: bits [N, M] of the pre-activations -> bits of values [N, k] after ReLU, indices [N, k].

    `infinity` is the key of +inf. `values` has the keys' type, or int32 if the keys are int16: bfloat16's bits become
    float32's.
    """
    n_latents = bits.shape[1]
    n_blocks = -(-n_latents // _BLOCK)
    sign_bit = 8 * bits.itemsize - 1
    largest = bits.dtype.type((1 << sign_bit) - 1)
    shift = 8 * (values.itemsize - bits.itemsize)
    maxima = np.empty(n_blocks, bits.dtype)
    ordered = np.empty(n_latents, bits.dtype)
    keys = np.empty(n_latents, bits.dtype)
    latents = np.empty(n_latents, np.int32)

    for n in range(start, stop):
        row = bits[n]
        magnitude = _block_maxima(row, largest, maxima)
        bound = bits.dtype.type(0)
        if magnitude <= infinity:
            few = k <= n_blocks // 2
            bound = _kth_largest(maxima if few else row, n_blocks if few else n_latents, k, sign_bit, k >> 3)
        if bound <= 0:
            for j in range(n_latents):
                size = bits.dtype.type(row[j] & largest)
                key = bits.dtype.type(-size) if row[j] < 0 else size
                ordered[j] = largest if size > infinity else key
            row = ordered
            _block_maxima(row, largest, maxima)
            bound = _kth_largest(row, n_latents, k, sign_bit, 0)

        found = 0
        for b in range(n_blocks):
            if maxima[b] >= bound:
                found = _take_block(row, b * _BLOCK, bound, keys, latents, found)
        if found > 2 * k:  # many are equal, or lie in few blocks
            found = _cut_to_largest(keys, latents, found, k, _kth_largest(keys, found, k, sign_bit, 0))
        order = np.argsort(np.invert(keys[:found]), kind="mergesort")  # largest first; a stable sort
        for i in range(k):
            key = keys[order[i]]
            values[n, i] = values.dtype.type(key if key > 0 else 0) << shift
            indices[n, i] = latents[order[i]]


@compiled
def keep_rows(start, stop, bits, k, infinity, out):
    """Rows start..stop of out [N, M] (which may be `bits`): ReLU of the row, with all but its k largest set to zero.

    Of equal entries the lowest latents stay; every NaN becomes the same NaN, which counts as the largest.
    """
    n_latents = bits.shape[1]
    sign_bit = 8 * bits.itemsize - 1
    largest = bits.dtype.type((1 << sign_bit) - 1)
    zero = bits.dtype.type(0)
    keys = np.empty(n_latents, bits.dtype)
    for n in range(start, stop):
        row, kept = bits[n], out[n]
        for j in range(n_latents):
            size = bits.dtype.type(row[j] & largest)
            key = row[j] if row[j] > 0 else zero
            keys[j] = largest if size > infinity else key
        bound = _kth_largest(keys, n_latents, k, sign_bit, 0)
        if _count_reaching(keys, n_latents, bound) <= k:
            for j in range(n_latents):
                kept[j] = keys[j] if keys[j] >= bound else zero
            continue
        spare = k
        for j in range(n_latents):
            spare -= keys[j] > bound
        for j in range(n_latents):
            tied = keys[j] == bound and spare > 0
            spare -= tied
            kept[j] = keys[j] if tied or keys[j] > bound else zero


@inlined
def _block_maxima(row, largest, maxima):
    """Fill maxima [n_blocks] with the largest key of each block; returns the row's largest bits without the sign."""
    magnitude = row.dtype.type(0)
    whole = row.size // _BLOCK
    for b in range(whole):
        block = row[b * _BLOCK : (b + 1) * _BLOCK]
        best = block[0]
        for i in range(_BLOCK):
            key = block[i]
            best = key if key > best else best
            size = row.dtype.type(key & largest)
            magnitude = size if size > magnitude else magnitude
        maxima[b] = best
    if whole < maxima.size:
        best = row[whole * _BLOCK]
        for j in range(whole * _BLOCK, row.size):
            key = row[j]
            best = key if key > best else best
            size = row.dtype.type(key & largest)
            magnitude = size if size > magnitude else magnitude
        maxima[whole] = best
    return magnitude


@inlined
def _kth_largest(keys, n, k, sign_bit, slack):
    """A bound that at least k of keys[:n] reach: the k-th largest key, or less if at most k + slack reach it."""
    one = keys.dtype.type(1)
    bound = keys.dtype.type(one << sign_bit)  # the smallest key
    for bit in range(sign_bit, -1, -1):
        trial = keys.dtype.type(bound ^ (one << bit))  # the first trial is 0, later ones set a bit
        reached = _count_reaching(keys, n, trial)
        if reached >= k:
            bound = trial
            if reached <= k + slack:
                break
    return bound


@inlined
def _count_reaching(keys, n, bound):
    """How many of keys[:n] reach the bound."""
    count = np.int32(0)
    for i in range(n):
        count = np.int32(count + np.int32(keys[i] >= bound))
    return count


@inlined
def _take_block(row, start, bound, keys, latents, found):
    """Append the keys of the block at `start` that reach the bound; returns how many there are now.

    The 64 comparisons become the bits of a mask, which compilers can vectorise; hits are rare.
    """
    block = row[start : min(start + _BLOCK, row.size)]
    hits = np.uint64(0)
    if block.size == _BLOCK:
        for i in range(_BLOCK):
            hits |= np.uint64(block[i] >= bound) << np.uint64(i)
    else:
        for i in range(block.size):
            hits |= np.uint64(block[i] >= bound) << np.uint64(i)
    while hits != 0:
        i = trailing_zeros(hits)  # pyright: ignore[reportCallIssue]  numba passes its typing context itself
        keys[found] = block[i]
        latents[found] = start + i
        found += 1
        hits &= hits - np.uint64(1)
    return found


@inlined
def _cut_to_largest(keys, latents, n, k, bound):
    """Keep the k largest of keys[:n] in place, where `bound` is the k-th; of equals the first. Returns k."""
    spare = k
    for i in range(n):
        spare -= keys[i] > bound
    kept = 0
    for i in range(n):
        if keys[i] > bound or (keys[i] == bound and spare > 0):
            spare -= keys[i] == bound
            keys[kept] = keys[i]
            latents[kept] = latents[i]
            kept += 1
    return kept
