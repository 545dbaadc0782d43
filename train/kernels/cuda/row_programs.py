"""Row by row: the k largest, decoder, gradients and the optimiser's step as Triton programs.

- A program of `decode`, `activation_gradient`, `reconstruct` and `adam` holds one row of D numbers in registers; rows
  that are picked by index are read whole, so memory is read in long runs. `reconstruct` reads a row's decoder rows
  twice, the second time from the cache.
- Weight gradients: the (row, latent) pairs, sorted by latent, are cut into chunks of CHUNK. `chunk_sums` adds up each
  latent's pairs in a chunk. A latent whose pairs all lie in the chunk is written; otherwise its sums go to scratch
  memory: to [c, 0] if its pairs begin before the chunk, to [c, 1] if they begin in it and go on after it.
  `join_chunks` adds those up in order, and writes zeros for latents without pairs.
- The k largest of each row, exactly, in one pass over the row: `group_maxima` gives the largest of each group of
  neighbouring latents, as an ordered integer. In `select`, a program per row, the k-th largest maximum bounds the k-th
  largest latent from below, and k groups, those above it and the first of those equal to it, hold the answer (a later
  group that is equal to the bound can only hold later latents of that value). Among their latents the k-th largest is
  found the same way, and the k winners are ranked by comparing all pairs. "Keys" are int32 in the order of the
  floats: -0 equals +0, NaN is the largest. Bounds are built bit by bit from the top, by counting; bfloat16's lower 16
  bits are zero and are left out.

Sums are made in the numbers' own type. Shapes: N rows, D d_model, M n_latents, k active latents per row, P pairs; GROUP
latents per group, GROUPS and K powers of two for groups, winners. Tested in tests/train/kernels/cuda/test_backend.py.
"""

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
    """The k-th largest of the keys; empty places should hold the smallest integer."""
    enough = tl.sum((keys >= 0).to(tl.int32)) >= k
    bound = tl.where(enough, 0, -0x80000000).to(tl.int32)
    bit = tl.full([], 1 << 30, tl.int32)
    for _ in range(31 - LOWEST_BIT):  # unrolled, it takes seconds to compile
        bound = tl.where(tl.sum((keys >= (bound | bit)).to(tl.int32)) >= k, bound | bit, bound)
        bit = bit >> 1
    return bound


@triton.jit
def _places(keys, bound, k):
    """Which keys are taken, and their places: all above the bound and the first of those equal to it, k in all."""
    above = keys > bound
    equal = keys == bound
    spare = k - tl.sum(above.to(tl.int32))
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    return taken, tl.cumsum(taken.to(tl.int32), 0) - 1


@triton.jit
def group_maxima(z, maxima, m, n_groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """maxima [N, n_groups] = the largest key of each group of z [N, M]; BLOCK groups per program."""
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
    taken, place = _places(largest, _kth_largest(largest, k, LOWEST_BIT), k)  # type: ignore # NoReturn to Triton 3.7
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


@triton.jit
def decode(values, indices, W_dec, out, k, d, BLOCK: tl.constexpr):
    """out[n] = sum_k values[n, k] W_dec[indices[n, k]]."""
    n = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < d
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for i in range(k):
        latent = tl.load(indices + n * k + i)
        total += tl.load(values + n * k + i) * tl.load(W_dec + latent * d + at, mask=inside, other=0.0)
    tl.store(out + n * d + at, total, mask=inside)


@triton.jit
def activation_gradient(grad_out, indices, W_dec, out, k, d, BLOCK: tl.constexpr):
    """out[n, i] = <grad_out[n], W_dec[indices[n, i]]>."""
    n = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < d
    grad = tl.load(grad_out + n * d + at, mask=inside, other=0.0)
    for i in range(k):
        latent = tl.load(indices + n * k + i)
        tl.store(out + n * k + i, tl.sum(grad * tl.load(W_dec + latent * d + at, mask=inside, other=0.0)))


@triton.jit
def reconstruct(
    values, indices, W_dec, target, weight, error, grad_out, squared, value_grads, k, d, BLOCK: tl.constexpr
):
    """`train.kernels.interface.Reconstruction` of row program_id(0)."""
    n = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < d
    total = tl.zeros([BLOCK], dtype=error.dtype.element_ty)
    for i in range(k):
        latent = tl.load(indices + n * k + i)
        total += tl.load(values + n * k + i) * tl.load(W_dec + latent * d + at, mask=inside, other=0.0)
    missed = tl.load(target + n * d + at, mask=inside, other=0.0) - total
    grad = missed * (-2 * tl.load(weight + n))
    tl.store(error + n * d + at, missed, mask=inside)
    tl.store(grad_out + n * d + at, grad, mask=inside)
    tl.store(squared + n, tl.sum(missed * missed))
    for i in range(k):
        latent = tl.load(indices + n * k + i)
        slope = tl.sum(grad * tl.load(W_dec + latent * d + at, mask=inside, other=0.0))
        tl.store(value_grads + n * k + i, tl.where(tl.load(values + n * k + i) > 0, slope, 0.0))


@triton.jit
def chunk_sums(
    value_grads,
    values,
    latents,
    order,
    starts,
    centred,
    grad_out,
    W_enc,
    W_dec,
    latent_sums,
    parts_enc,
    parts_dec,
    sum_parts,
    n_pairs,
    k,
    d,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of each latent's pairs within chunk program_id(0), over the BLOCK of D number program_id(1)."""
    chunk = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    lead = tl.program_id(1) == 0
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, n_pairs)
    enc = tl.zeros([BLOCK], dtype=W_enc.dtype.element_ty)
    dec = tl.zeros([BLOCK], dtype=W_enc.dtype.element_ty)
    total = tl.sum(enc)
    for p in range(begin, end):
        pair = tl.load(order + p)
        row = pair // k
        slope = tl.load(value_grads + pair)
        enc += slope * tl.load(centred + row * d + at, mask=inside, other=0.0)
        dec += tl.load(values + pair) * tl.load(grad_out + row * d + at, mask=inside, other=0.0)
        total += slope
        latent = tl.load(latents + p).to(tl.int64)
        first = tl.load(starts + latent)
        last = tl.load(starts + latent + 1) - 1
        if (p == last) | (p == end - 1):
            if (first >= begin) & (last < end):
                tl.store(W_enc + latent * d + at, enc, mask=inside)
                tl.store(W_dec + latent * d + at, dec, mask=inside)
                tl.store(latent_sums + latent, total, mask=lead)
            else:
                part = chunk * 2 + (first >= begin).to(tl.int64)
                tl.store(parts_enc + part * d + at, enc, mask=inside)
                tl.store(parts_dec + part * d + at, dec, mask=inside)
                tl.store(sum_parts + part, total, mask=lead)
            enc = tl.zeros([BLOCK], dtype=W_enc.dtype.element_ty)
            dec = tl.zeros([BLOCK], dtype=W_enc.dtype.element_ty)
            total = tl.sum(enc)


@triton.jit
def join_chunks(
    starts, W_enc, W_dec, latent_sums, parts_enc, parts_dec, sum_parts, d, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Finish latent program_id(0) after `chunk_sums`: nothing to do, zeros, or the sum of its chunks' parts."""
    latent = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + latent)
    end = tl.load(starts + latent + 1)
    chunk = first // CHUNK
    last_chunk = (end - 1) // CHUNK
    if (first == end) | (last_chunk > chunk):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < d
        enc = tl.zeros([BLOCK], dtype=W_enc.dtype.element_ty)
        dec = tl.zeros([BLOCK], dtype=W_enc.dtype.element_ty)
        total = tl.sum(enc)
        if first < end:
            for c in range(chunk, last_chunk + 1):
                part = c * 2 + (first >= c * CHUNK).to(tl.int64)
                enc += tl.load(parts_enc + part * d + at, mask=inside, other=0.0)
                dec += tl.load(parts_dec + part * d + at, mask=inside, other=0.0)
                total += tl.load(sum_parts + part)
        tl.store(W_enc + latent * d + at, enc, mask=inside)
        tl.store(W_dec + latent * d + at, dec, mask=inside)
        tl.store(latent_sums + latent, total, mask=tl.program_id(1) == 0)


@triton.jit
def adam(
    weight,
    grad,
    exp_avg,
    exp_avg_sq,
    columns,
    numbers,
    d,
    total,
    UNIT_ROWS: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adam on d of `total` numbers (with UNIT_ROWS or BY_ROW a whole row), in place; only BY_ROW reads columns.

    numbers float64 [7]: scale, step size, 1 - beta1, beta2, 1 - beta2, correction, eps.
    """
    j = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = (at < d) & (j * d + at < total)
    kind = weight.dtype.element_ty
    w = tl.load(weight + j * d + at, mask=inside, other=0.0)
    g = tl.load(grad + j * d + at, mask=inside, other=0.0) * tl.load(numbers).to(kind)
    if UNIT_ROWS:
        g -= tl.sum(g * w) * w
    m = tl.load(exp_avg + j * d + at, mask=inside, other=0.0)
    m += tl.load(numbers + 2).to(kind) * (g - m)
    keep, new, correction = tl.load(numbers + 3).to(kind), tl.load(numbers + 4).to(kind), tl.load(numbers + 5).to(kind)
    if BY_ROW:
        column = tl.load(columns + at, mask=inside, other=1.0)
        share = g / column
        v = keep * tl.load(exp_avg_sq + j) + new * (tl.sum(share * share) / d)
        tl.store(exp_avg_sq + j, v)
        root = tl.sqrt(v) / correction * column
    else:
        v = keep * tl.load(exp_avg_sq + j * d + at, mask=inside, other=0.0) + new * (g * g)
        tl.store(exp_avg_sq + j * d + at, v, mask=inside)
        root = tl.sqrt(v) / correction
    w -= tl.load(numbers + 1).to(kind) * m / (root + tl.load(numbers + 6).to(kind))
    if UNIT_ROWS:
        w = w / tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0)))
    tl.store(weight + j * d + at, w, mask=inside)
    tl.store(exp_avg + j * d + at, m, mask=inside)
