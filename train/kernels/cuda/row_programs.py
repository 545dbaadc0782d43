"""What follows the codes, row by row: decoder, gradients and the optimiser's step as Triton programs.

- A program of `decode`, `activation_gradient`, `reconstruct` and `adam` holds one row of D numbers in registers; rows
  that are picked by number are read whole, so memory is read in long runs. `reconstruct` reads a row's decoder rows
  twice, the second time from the cache.
- Weight gradients: the (row, latent) pairs, sorted by latent, are cut into chunks of CHUNK. `chunk_sums` adds up each
  latent's pairs in a chunk; a latent that lies within the chunk is written, the sums of one that does not go to
  scratch memory: first [c, 0] where its pairs began before the chunk, [c, 1] where they begin in it and go on after.
  `join_chunks` adds those up in order, and writes zeros for latents without pairs.

Sums are made in the numbers' own type. Shapes: N rows, D d_model, M n_latents, k active latents a row, P pairs.
"""

import triton
import triton.language as tl


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
    """What `chunk_sums` left to do for latent program_id(0): nothing, zeros, or the sum of its chunks' parts."""
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
def adam(weight, grad, exp_avg, exp_avg_sq, numbers, d, total, UNIT_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Adam on d of `total` numbers (with UNIT_ROWS a whole row), in place.

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
    v = tl.load(exp_avg_sq + j * d + at, mask=inside, other=0.0)
    m += tl.load(numbers + 2).to(kind) * (g - m)
    v = tl.load(numbers + 3).to(kind) * v + tl.load(numbers + 4).to(kind) * (g * g)
    denominator = tl.sqrt(v) / tl.load(numbers + 5).to(kind) + tl.load(numbers + 6).to(kind)
    w -= tl.load(numbers + 1).to(kind) * m / denominator
    if UNIT_ROWS:
        w = w / tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0)))
    tl.store(weight + j * d + at, w, mask=inside)
    tl.store(exp_avg + j * d + at, m, mask=inside)
    tl.store(exp_avg_sq + j * d + at, v, mask=inside)
