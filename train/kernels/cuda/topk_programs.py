"""The k largest of each row, exactly, in one pass over the row: two Triton programs.

1. `group_maxima`: the largest of each group of neighbouring latents, as an ordered integer.
2. `select`, a program a row: the k-th largest maximum bounds the k-th largest latent from below, and k groups, those
   above it and the first of those equal to it, hold the answer (a later group that is equal to the bound can only hold
   later latents of that value). Of their latents the k-th largest is found the same way, and the k winners are ranked
   by comparing each with each.

"Keys" are int32 in the order of the floats: -0 equals +0, NaN is the largest. Bounds are built bit by bit from the top,
by counting; bfloat16's lower 16 bits are zero and are left out.

Shapes: N rows, M n_latents, k; GROUP latents a group, GROUPS a power of two of groups, K one of winners.
"""
# tl.static_range is declared as never returning:
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _keys(z):
    """float32 -> int32 keys."""
    bits = z.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    keys = tl.where(bits < 0, -size, size)
    return tl.where(size > 0x7F800000, 0x7FFF0000, keys)  # a NaN whose lower bits are zero, as bfloat16's are


@triton.jit
def _kth_largest(keys, k, LOWEST_BIT: tl.constexpr):
    """The k-th largest of the keys; places that hold none should hold the smallest integer."""
    enough = tl.sum((keys >= 0).to(tl.int32)) >= k
    bound = tl.where(enough, 0, -0x80000000).to(tl.int32)
    for step in tl.static_range(31 - LOWEST_BIT):
        trial = bound | (1 << (30 - step))
        bound = tl.where(tl.sum((keys >= trial).to(tl.int32)) >= k, trial, bound)
    return bound


@triton.jit
def _places(keys, bound, k):
    """Which keys are taken, and the place of each: all above the bound and the first of those equal to it, k in all."""
    above = keys > bound
    equal = keys == bound
    spare = k - tl.sum(above.to(tl.int32))
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    return taken, tl.cumsum(taken.to(tl.int32), 0) - 1


@triton.jit
def group_maxima(z, maxima, m, n_groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """maxima [N, n_groups] = the largest key of each group of z [N, M]; BLOCK groups a program."""
    n = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    latents = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    entries = tl.load(z + n * m + latents, mask=latents < m, other=0.0).to(tl.float32)
    keys = tl.where(latents < m, _keys(entries), -0x80000000)
    tl.store(maxima + n * n_groups + groups, tl.max(keys, 1), mask=groups < n_groups)


@triton.jit
def select(
    z,
    maxima,
    chosen,
    winners,
    values,
    indices,
    m,
    n_groups,
    k,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    LOWEST_BIT: tl.constexpr,
):
    """values, indices [N, k] of z [N, M]; chosen [N, K], winners [N, 2, K] are the program's own scratch memory."""
    n = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    largest = tl.load(maxima + n * n_groups + groups, mask=groups < n_groups, other=-0x80000000)
    taken, place = _places(largest, _kth_largest(largest, k, LOWEST_BIT), k)
    tl.store(chosen + n * K + place, groups, mask=taken)
    tl.debug_barrier()  # what other threads stored is loaded next

    slots = tl.arange(0, K)
    group = tl.load(chosen + n * K + slots, mask=slots < k, other=0)
    latents = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (slots < k)[:, None] & (latents < m)
    entries = tl.load(z + n * m + latents, mask=inside, other=0.0).to(tl.float32)
    keys = tl.reshape(tl.where(inside, _keys(entries), -0x80000000), [K * GROUP])
    taken, place = _places(keys, _kth_largest(keys, k, LOWEST_BIT), k)
    mine = winners + n * 2 * K
    tl.store(mine + place, keys, mask=taken)
    tl.store(mine + K + place, tl.reshape(latents, [K * GROUP]), mask=taken)
    tl.debug_barrier()

    key = tl.load(mine + slots, mask=slots < k, other=-0x80000000)
    latent = tl.load(mine + K + slots, mask=slots < k, other=0)
    earlier = (slots[None, :] < slots[:, None]) & (key[None, :] == key[:, None])
    first = ((key[None, :] > key[:, None]) | earlier) & (slots < k)[None, :]
    rank = tl.sum(first.to(tl.int32), 1)
    value = tl.maximum(key, 0).to(tl.float32, bitcast=True)
    tl.store(values + n * k + rank, value, mask=slots < k)
    tl.store(indices + n * k + rank, latent.to(tl.int64), mask=slots < k)
