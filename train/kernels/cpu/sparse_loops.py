"""Compiled loops for what follows the codes, row by row: decoder, gradients, and the optimiser's step.

- A decoded row and a row of a weight gradient are both a weighted sum of rows picked by index (a "bag"): over a batch
  row's latents in the one case, over a latent's batch rows in the other. Four picked rows are added at a time, so that
  the sum is loaded and stored a quarter as often; nothing of size [N, k, D] is made.
- The (row, latent) pairs are sorted by latent with a counting sort, which is stable: within a latent the rows ascend,
  so every sum has a fixed order. Pairs whose coefficients are both zero are left out.
- Adam, the projection before it and the normalisation after it process a row while it is in the core's cache.

Sums are vectorised, in an order that depends on the processor's vector width and nothing else.

Tested in tests/train/kernels/cpu/test_backend.py.

Shapes: N rows of a batch, D d_model, M n_latents, k active latents per row, P <= N * k pairs.
"""

import numpy as np

from train.kernels.cpu.compiling import compiled, inlined


@inlined
def _bag(coefficients, picked, first, last, rows, out):
    """out [D] = the sum over p in first..last of coefficients[p] * rows[picked[p]]."""
    for d in range(out.size):
        out[d] = 0
    fours = first + (last - first) // 4 * 4
    for p in range(first, fours, 4):
        a, b, c, d = coefficients[p], coefficients[p + 1], coefficients[p + 2], coefficients[p + 3]
        row_a, row_b, row_c, row_d = rows[picked[p]], rows[picked[p + 1]], rows[picked[p + 2]], rows[picked[p + 3]]
        for i in range(out.size):
            out[i] += (a * row_a[i] + b * row_b[i]) + (c * row_c[i] + d * row_d[i])
    for p in range(fours, last):
        a = coefficients[p]
        row_a = rows[picked[p]]
        for i in range(out.size):
            out[i] += a * row_a[i]


@inlined
def dot(a, b):
    """<a, b> of two rows [D]."""
    total = a.dtype.type(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@inlined
def _dots(row, picked, first, last, rows, out):
    """out[p - first] = <row, rows[picked[p]]> for p in first..last, four at a time as in `_bag`."""
    fours = first + (last - first) // 4 * 4
    for p in range(first, fours, 4):
        row_a, row_b, row_c, row_d = rows[picked[p]], rows[picked[p + 1]], rows[picked[p + 2]], rows[picked[p + 3]]
        a = b = c = d = row.dtype.type(0)
        for i in range(row.size):
            a += row[i] * row_a[i]
            b += row[i] * row_b[i]
            c += row[i] * row_c[i]
            d += row[i] * row_d[i]
        out[p - first], out[p + 1 - first], out[p + 2 - first], out[p + 3 - first] = a, b, c, d
    for p in range(fours, last):
        out[p - first] = dot(row, rows[picked[p]])


@compiled
def decode_rows(start, stop, values, indices, W_dec, out):
    """out[n] = sum_k values[n, k] W_dec[indices[n, k]] for n in start..stop."""
    k = values.shape[1]
    flat_values, flat_indices = values.ravel(), indices.ravel()
    for n in range(start, stop):
        _bag(flat_values, flat_indices, n * k, (n + 1) * k, W_dec, out[n])


@compiled
def gradient_rows(start, stop, grad_out, indices, W_dec, out):
    """out[n, i] = <grad_out[n], W_dec[indices[n, i]]> for n in start..stop."""
    k = indices.shape[1]
    flat_indices = indices.ravel()
    for n in range(start, stop):
        _dots(grad_out[n], flat_indices, n * k, (n + 1) * k, W_dec, out[n])


@compiled
def reconstruct_rows(start, stop, values, indices, W_dec, centred, weight, error, grad_out, squared, value_grads):
    """`train.kernels.interface.Reconstruction` of rows start..stop, each made while its decoder rows are cached."""
    k = values.shape[1]
    flat_values, flat_indices = values.ravel(), indices.ravel()
    for n in range(start, stop):
        row_error, row_grad = error[n], grad_out[n]
        width = k  # skip trailing zeros: most of a row if the number of active latents varies
        while width > 0 and values[n, width - 1] == 0:
            width -= 1
        _bag(flat_values, flat_indices, n * k, n * k + width, W_dec, row_error)
        scale = -2 * weight[n]
        for i in range(row_error.size):
            difference = centred[n, i] - row_error[i]
            row_error[i] = difference
            row_grad[i] = scale * difference
        squared[n] = dot(row_error, row_error)
        _dots(row_grad, flat_indices, n * k, n * k + width, W_dec, value_grads[n])
        for i in range(k):
            if values[n, i] <= 0:
                value_grads[n, i] = 0


@compiled
def sort_pairs(indices, first, second, starts, order):
    """Stable counting sort of the pairs by latent: indices, two coefficients [N * k] -> starts [M + 1], order [P].

    Latent j's pairs are order[starts[j]:starts[j + 1]], ascending numbers n * k + i; pairs of two zeros are left out.
    """
    starts[:] = 0
    for pair in range(indices.size):
        starts[indices[pair] + 1] += (first[pair] != 0) | (second[pair] != 0)
    for j in range(1, starts.size):
        starts[j] += starts[j - 1]
    free = starts[:-1].copy()
    for pair in range(indices.size):
        if (first[pair] != 0) | (second[pair] != 0):
            latent = indices[pair]
            order[free[latent]] = pair
            free[latent] += 1


@compiled
def weight_rows(start, stop, starts, order, k, coefficients, rows, out, sums):
    """For j in start..stop, over latent j's pairs: out[j] = sum of coefficient * rows[n]; sums[j] = of coefficients."""
    base = starts[start]
    picked = np.empty(starts[stop] - base, np.int64)
    chosen = np.empty(starts[stop] - base, coefficients.dtype)
    for p in range(picked.size):
        pair = order[base + p]
        picked[p] = pair // k
        chosen[p] = coefficients[pair]
    for j in range(start, stop):
        first, last = starts[j] - base, starts[j + 1] - base
        _bag(chosen, picked, first, last, rows, out[j])
        total = sums.dtype.type(0)
        for p in range(first, last):
            total += chosen[p]
        sums[j] = total


@compiled
def adam_rows(
    start, stop, weight, grad, exp_avg, exp_avg_sq, columns, scale, size, beta1, beta2, correction, epsilon, unit_rows
):
    """Adam on rows start..stop, in place; the numbers are those of `train.kernels.interface.AdamStep`, size its step
    size; columns is empty if each weight has its own mean square."""
    number = weight.dtype.type
    new_1, keep_2, new_2 = number(1 - beta1), number(beta2), number(1 - beta2)
    scale, size = number(scale), number(size)
    correction, epsilon = number(correction), number(epsilon)
    for j in range(start, stop):
        w, m, v = weight[j], exp_avg[j], exp_avg_sq[j]
        along = scale * dot(grad[j], w) if unit_rows else number(0)
        if columns.size == 0:
            for i in range(w.size):
                g = scale * grad[j, i] - along * w[i]
                m[i] += new_1 * (g - m[i])
                v[i] = keep_2 * v[i] + new_2 * (g * g)
                w[i] -= size * m[i] / (np.sqrt(v[i]) / correction + epsilon)
        else:
            square = number(0)
            for i in range(w.size):
                g = scale * grad[j, i] - along * w[i]
                m[i] += new_1 * (g - m[i])
                share = g / columns[i]
                square += share * share
            v[0] = keep_2 * v[0] + new_2 * (square / number(w.size))
            root = np.sqrt(v[0]) / correction
            for i in range(w.size):
                w[i] -= size * m[i] / (root * columns[i] + epsilon)
        if unit_rows:
            norm = np.sqrt(dot(w, w))
            for i in range(w.size):
                w[i] /= norm
