"""The compiled passes over sparse codes and over vectors that fill the sums of `analysis.moments`,
`analysis.persistence` and `analysis.quality`.

Codes: for each token, every positive activation updates the weighted mean layer and the summed squared deviation of its
latent at that token (West 1979, the weighted form of Welford's update). So the within-token sum is a sum of
non-negative terms, exactly 0 for a latent that is active at one layer; no large sums are subtracted. Scratch arrays of
n_latents entries hold the token's latents, and a stamp tells which entries are this token's, so nothing is cleared.

Vectors: one pass reads each vector and its reconstruction once and accumulates in float64.

Imported where it is called, because it loads numba.

Shapes: T tokens, L layers, D d_model, k active latents a vector, M n_latents, G document groups present, S subsets of
tokens. Tested in test_moments.py, test_quality.py and test_persistence.py.
"""

import numpy as np

from store.pack import compiled

# Rows of `LayerMoments.sums`, in order; a is an activation, l its centred layer, and a (token, latent) pair's mean
# layer and variance are mu = sum_l l a / sum_l a and v = sum_l (l - mu)^2 a / sum_l a.
MASS, MASS_L, MASS_V, MASS_LL, PAIRS, PAIRS_L, PAIRS_V, PAIRS_LL = range(8)

# Rows of `LayerMoments.histograms`, each a distribution over positions 0 .. L - 1 of the analysed layers; the first two
# count layers, at position n - 1. Then the entries of its `run_sums` and the columns of its `latent_sums`.
N_ACTIVE, RUN_LENGTH, ONSET, OFFSET = range(4)
N_RUNS, CONTIGUITY, UNBROKEN = range(3)
LATENT_ACTIVE, LATENT_ONSET, LATENT_OFFSET, LATENT_RUN, LATENT_CONTIGUITY = range(5)

# Columns of the scratch array `seen`: for a latent at one token, the first and last layer at which it is active, the
# number of active layers and of runs, and the length of the current and of the longest run.
FIRST, LAST, ACTIVE, RUNS, RUN, LONGEST = range(6)


@compiled()
def add_codes(values, indices, rows, layers, group_of_token, sums, counts, totals, histograms, shape, latents):
    """Add the codes of T whole tokens.

    values float32 or float64 [V, k], finite and >= 0; indices int64 [V, k], distinct within a vector; rows int64 [T,
    L], which of the V vectors stands at a token and layer; layers float64 [L], centred; group_of_token int64 [T], row
    of `sums`. Added to in place: sums float64 [G, 8, M], counts int64 [M, L], totals float64 [M, L], and those of
    `analysis.persistence`: histograms float64 [G, 2, 4, L], shape float64 [G, 2, 3], latents float64 [M, 5].
    """
    n_tokens, n_layers = rows.shape
    n_latents = sums.shape[2]
    stamp = np.full(n_latents, -1, np.int64)
    moments = np.empty((3, n_latents), np.float64)  # mass, mean layer, summed squared deviation
    seen = np.empty((n_latents, 6), np.int32)
    touched = np.empty(min(n_latents, n_layers * values.shape[1]), np.int64)
    for t in range(n_tokens):
        n_touched = _collect(t, values, indices, rows[t], layers, stamp, moments, seen, touched, counts, totals)
        g = group_of_token[t]
        _add_pairs(touched[:n_touched], moments, seen, layers, sums[g], histograms[g], shape[g], latents)


@compiled()
def _collect(t, values, indices, rows, layers, stamp, moments, seen, touched, counts, totals):
    """Gather token t's latents: write their indices to `touched` and return how many there are."""
    mass, mean, spread = moments[0], moments[1], moments[2]
    n_touched = 0
    for i in range(len(rows)):
        layer, row = layers[i], rows[i]
        for s in range(values.shape[1]):
            a = np.float64(values[row, s])
            if a == 0.0:
                continue
            j = indices[row, s]
            counts[j, i] += 1
            totals[j, i] += a
            if stamp[j] != t:
                stamp[j] = t
                touched[n_touched] = j
                n_touched += 1
                mass[j] = a
                mean[j] = layer
                spread[j] = 0.0
                seen[j, FIRST] = i
                seen[j, LAST] = i
                seen[j, ACTIVE:] = 1
            else:
                mass[j] += a
                step = layer - mean[j]
                mean[j] += step * (a / mass[j])
                spread[j] += a * step * (layer - mean[j])
                seen[j, ACTIVE] += 1
                if seen[j, LAST] == i - 1:
                    seen[j, RUN] += 1
                    seen[j, LONGEST] = max(seen[j, LONGEST], seen[j, RUN])
                else:
                    seen[j, RUNS] += 1
                    seen[j, RUN] = 1
                seen[j, LAST] = i
    return n_touched


@compiled()
def _add_pairs(touched, moments, seen, layers, sums, histogram, shape, latents):
    """Add one token's pairs to the sums [8, M] of its document group, and to those of `analysis.persistence`."""
    mass, mean, spread = moments[0], moments[1], moments[2]
    for j in touched:
        mu, variance = mean[j], spread[j] / mass[j]
        sums[MASS, j] += mass[j]
        sums[MASS_L, j] += mass[j] * mu
        sums[MASS_V, j] += spread[j]
        sums[MASS_LL, j] += mass[j] * mu * mu
        sums[PAIRS, j] += 1.0
        sums[PAIRS_L, j] += mu
        sums[PAIRS_V, j] += variance
        sums[PAIRS_LL, j] += mu * mu
        first, last, active = seen[j, FIRST], seen[j, LAST], seen[j, ACTIVE]
        runs, longest = seen[j, RUNS], seen[j, LONGEST]
        contiguity = longest / (last - first + 1.0)
        for w in range(2):
            weight = mass[j] if w == 0 else 1.0
            histogram[w, N_ACTIVE, active - 1] += weight
            histogram[w, RUN_LENGTH, longest - 1] += weight
            histogram[w, ONSET, first] += weight
            histogram[w, OFFSET, last] += weight
            shape[w, N_RUNS] += weight * runs
            shape[w, CONTIGUITY] += weight * contiguity
            shape[w, UNBROKEN] += weight if runs == 1 else 0.0
        latents[j, LATENT_ACTIVE] += active
        latents[j, LATENT_ONSET] += layers[first]
        latents[j, LATENT_OFFSET] += layers[last]
        latents[j, LATENT_RUN] += longest
        latents[j, LATENT_CONTIGUITY] += contiguity


# Reassociation lets the sums over d_model run in vector registers; no other liberty is taken with the arithmetic.
@compiled(fastmath={"reassoc", "contract"})
def measure_vectors(x, x_hat, shift, member, squared_error, squared_deviation, norm, cosine, deviation_sum):
    """What `analysis.quality` needs of T tokens, in one pass.

    x, x_hat [T, L, D] and shift [L, D] of one float type; member bool [S, T]. Written, all float64 [T, L]:
    squared_error |x - x_hat|^2, squared_deviation |x - shift|^2, norm |x|, cosine between a layer's and the next
    layer's x - shift (NaN at the last layer and where one of them is 0). Added to in place: deviation_sum float64 [S,
    L, D], the sum of x - shift over each subset's tokens.
    """
    n_tokens, n_layers, d_model = x.shape
    deviation = np.empty((n_layers, d_model), x.dtype)
    for t in range(n_tokens):
        for i in range(n_layers):
            error_sum, deviation_square, square = 0.0, 0.0, 0.0
            for d in range(d_model):
                value = x[t, i, d]
                error = np.float64(value - x_hat[t, i, d])
                moved = value - shift[i, d]
                deviation[i, d] = moved
                error_sum += error * error
                deviation_square += np.float64(moved) * np.float64(moved)
                square += np.float64(value) * np.float64(value)
            squared_error[t, i] = error_sum
            squared_deviation[t, i] = deviation_square
            norm[t, i] = np.sqrt(square)
        for i in range(n_layers):
            scale = np.sqrt(squared_deviation[t, i] * squared_deviation[t, i + 1]) if i + 1 < n_layers else 0.0
            if scale > 0.0:
                dot = 0.0
                for d in range(d_model):
                    dot += np.float64(deviation[i, d]) * np.float64(deviation[i + 1, d])
                cosine[t, i] = dot / scale
            else:
                cosine[t, i] = np.nan
        for s in range(member.shape[0]):
            if member[s, t]:
                for i in range(n_layers):
                    for d in range(d_model):
                        deviation_sum[s, i, d] += np.float64(deviation[i, d])
