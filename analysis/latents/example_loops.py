"""The compiled passes of `analysis.latents.examples` over sparse codes.

Shapes: T tokens, L layers, k active latents a vector, M n_latents, n examples kept, R examples, W tokens of a window, B
bins of a histogram.
"""

import math

import numpy as np

from analysis.sum_loops import _compiled


@_compiled(fastmath=False)
def insert(values, indices, token, document, best, best_token, best_document):
    """Offer the positive activations of T tokens to the examples of their (latent, layer).

    values float32 or float64 [T, L, k]; indices int64 [T, L, k]; token, document int64 [T]. Changed in place: best
    float32, best_token int32 (-1: none), best_document int32, each [M, L, n].
    """
    n_tokens, n_layers, k = values.shape
    floor = np.empty(best.shape[:2], np.float32)  # most activations are below it, and cost no more than this look
    for j in range(len(best)):
        for layer in range(n_layers):
            floor[j, layer] = _floor(best[j, layer], best_token[j, layer], best_document[j, layer])
    for t in range(n_tokens):
        for layer in range(n_layers):
            for i in range(k):
                value = np.float32(values[t, layer, i])
                j = indices[t, layer, i]
                if value > 0 and value >= floor[j, layer]:
                    _offer(best[j, layer], best_token[j, layer], best_document[j, layer], value, token[t], document[t])
                    floor[j, layer] = _floor(best[j, layer], best_token[j, layer], best_document[j, layer])


@_compiled(fastmath=False)
def insert_examples(other, other_token, other_document, best, best_token, best_document):
    """Offer the examples of another part, all [M, L, n] as in `insert`."""
    n_latents, n_layers, n = other.shape
    for j in range(n_latents):
        for layer in range(n_layers):
            for i in range(n):
                if other_token[j, layer, i] >= 0:
                    _offer(
                        best[j, layer],
                        best_token[j, layer],
                        best_document[j, layer],
                        other[j, layer, i],
                        other_token[j, layer, i],
                        other_document[j, layer, i],
                    )


@_compiled(fastmath=False)
def _floor(best, best_token, best_document):
    """A value below which no new one is kept: the least kept, once there are n of different documents."""
    n = len(best)
    least = best[0]
    for i in range(n):
        if best_token[i] < 0:
            return np.float32(0)
        least = min(least, best[i])
        for other in range(i):
            if best_document[i] == best_document[other]:
                return np.float32(0)
    return least


@_compiled(fastmath=False)
def _offer(best, best_token, best_document, value, token, document):
    """Keep the n that come first of those kept [n] and a new one: first what is the best of its document, then what is
    more active, then what comes earlier."""
    n = len(best)
    for i in range(n):
        if best_token[i] < 0:
            best[i], best_token[i], best_document[i] = value, token, document
            return
    last = n  # n stands for the new one
    last_value, last_token, last_again = value, token, False
    for i in range(n):
        if best_document[i] == document and (best[i] > value or (best[i] == value and best_token[i] < token)):
            last_again = True
    for i in range(n):
        again = best_document[i] == document and (value > best[i] or (value == best[i] and token < best_token[i]))
        for other in range(n):
            if best_document[other] == best_document[i] and (
                best[other] > best[i] or (best[other] == best[i] and best_token[other] < best_token[i])
            ):
                again = True
        if again != last_again:
            later = again
        elif best[i] != last_value:
            later = best[i] < last_value
        else:
            later = best_token[i] > last_token
        if later:
            last, last_value, last_token, last_again = i, best[i], best_token[i], again
    if last < n:
        best[last], best_token[last], best_document[last] = value, token, document


@_compiled(fastmath=False)
def fill_windows(values, indices, first, row_of_token, latent, layer, start, stop, out):
    """Note the activations of examples' latents at the tokens of their windows, as far as a tile holds them.

    values [T, L, k], indices int64 [T, L, k]; row_of_token int64: row of token first + i, or -1. latent, layer (an
    index into L), start, stop: int64 [R]. Written in place: out float32 [R, W], of token start + i at column i.
    """
    k = values.shape[2]
    end = first + len(row_of_token)
    for r in range(len(latent)):
        for token in range(max(start[r], first), min(stop[r], end)):
            row = row_of_token[token - first]
            if row >= 0:
                found = np.float32(0)
                for i in range(k):
                    if indices[row, layer[r], i] == latent[r]:
                        found = np.float32(values[row, layer[r], i])
                out[r, token - start[r]] = found


@_compiled(fastmath=False)
def add_histogram(values, indices, lowest, counts):
    """Count the positive activations of T tokens by size.

    values [T, L, k], indices int64 [T, L, k]. Added to in place: counts uint32 [M, L, B]; bin b holds activations from
    2^(lowest + b / 2) up to the next bin's, the first bin all smaller and the last all larger ones too.
    """
    n_tokens, n_layers, k = values.shape
    last = counts.shape[2] - 1
    for t in range(n_tokens):
        for layer in range(n_layers):
            for i in range(k):
                value = np.float64(values[t, layer, i])
                if value > 0:
                    mantissa, exponent = math.frexp(value)  # value = mantissa * 2^exponent, 0.5 <= mantissa < 1
                    upper = 1 if mantissa * mantissa >= 0.5 else 0
                    place = min(max(2 * (exponent - 1 - lowest) + upper, 0), last)
                    counts[indices[t, layer, i], layer, place] += np.uint32(1)


@_compiled(fastmath=False)
def shared_contexts(tokens, shared, pairs, shared_by_distance):
    """Count the tokens that each two layers' top contexts share.

    tokens int32 [M, L, n], each [n] ascending, -1 where there are fewer: such a layer is left out. Added to in place,
    int64: shared [M], pairs of layers [M, L] and shared_by_distance [L] by their distance.
    """
    n_latents, n_layers, n = tokens.shape
    for j in range(n_latents):
        for layer in range(n_layers):
            if tokens[j, layer, 0] < 0:
                continue
            for other in range(layer + 1, n_layers):
                if tokens[j, other, 0] < 0:
                    continue
                common, a, b = 0, 0, 0
                while a < n and b < n:
                    first, second = tokens[j, layer, a], tokens[j, other, b]
                    common += first == second
                    a += first <= second
                    b += second <= first
                shared[j] += common
                pairs[j, other - layer] += 1
                shared_by_distance[other - layer] += common
