"""The k largest pre-activations by an 8-bit screen: as exact as the float32 product, at a fraction of its time.

Where the processor multiplies bytes (AVX-512 VNNI, AMX), a product of 8-bit integers is four times as fast as one in
float32, and too coarse to be the answer. It is good enough to say which latents can be among the k largest:

1. Vectors and encoder rows are rotated by the same orthogonal matrix (random signs, then a Hadamard matrix on blocks of
   coordinates), which leaves every product as it is and spreads outliers, then rounded to 8 bits with a scale each.
2. The integer product estimates every pre-activation. Rounding errors are sums of hundreds of small independent terms,
   so they are sub-Gaussian with a standard deviation sigma that the scales give, and an estimate is off by more than
   8 sigma once in 10^13.
3. The k largest estimates are multiplied out in float32 with the weights as they are, and then every latent whose
   estimate plus 8 sigma reaches the least of those products: values and order come from the products alone. They also
   show the estimates' true errors; a row in which one is above 6 sigma is screened again with a margin twice as wide,
   until none is.

So the result is that of the float32 product, to its rounding, in an order of summation that depends on the processor's
vector width and on nothing else. Vectors that are not finite have no scale, and go through the plain product.
Not here: gradients; activations other than the k largest.

Shapes: N vectors, D d_model, M n_latents, k active latents a vector.
"""

import functools
import math

import numpy as np
import torch
from numba.cpython.unsafe.numbers import trailing_zeros
from torch import Tensor

from train.encode import encode_tiled
from train.kernels import SparseCodes
from train.kernels_compile import compiled, even_chunks, inlined, run_chunks

TILE_BYTES = 16 * 2**20
"""Integer products that are held at once: as much as stays in the last-level cache."""

MAX_BLOCK = 64
"""Coordinates that are rotated among themselves at most."""

SIGMAS = 8.0
"""Margin of an estimate, in standard deviations of its error."""

_CHECKED = 0.75  # of the margin: an error above this widens it
_GROUP, _LANES = 64, 16  # latents whose largest estimate is looked at first; groups that are filled side by side


@functools.cache
def can_screen() -> bool:
    """Whether this machine multiplies bytes fast, and torch does so rightly."""
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    left = torch.tensor([[127, -127, 5] * 22, [-127, 127, -128] * 22], dtype=torch.int8)
    right = torch.tensor([[127, -127, -3] * 22] * 20, dtype=torch.int8)
    try:
        found = torch._int_mm(left, right.T)  # pyright: ignore[reportPrivateImportUsage]
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(found.long(), left.long() @ right.long().T)


class Screen:
    """An encoder's weights, made ready to be screened; they must not change while it is used."""

    def __init__(self, W_enc: Tensor) -> None:
        """W_enc float32 [M, D]."""
        self._weights = W_enc.detach().contiguous()
        d = self._weights.shape[1]
        block = math.gcd(d, MAX_BLOCK)
        generator = torch.Generator().manual_seed(0)
        self._signs = torch.randint(0, 2, (d,), generator=generator).float() * 2 - 1
        self._hadamard = torch.tensor(_hadamard(block)) / block**0.5
        rotated = self._rotate(self._weights)
        self._scale = rotated.abs().amax(dim=1).clamp_min(1e-30) / 127  # [M]
        self._bytes = (rotated / self._scale[:, None]).round().to(torch.int8)
        self._largest_norm = float(torch.linalg.vector_norm(self._weights, dim=1).max())
        self._largest_scale = float(self._scale.max())

    @staticmethod
    def fits(W_enc: Tensor, k: int) -> bool:
        """Whether it works and pays: finite float32 weights [M, D], coordinates to rotate, many latents for each of the
        k, and a machine that can."""
        m, d = W_enc.shape
        shaped = W_enc.dtype == torch.float32 and W_enc.device.type == "cpu" and d % 16 == 0 and m >= 2 * _GROUP * k
        return shaped and bool(W_enc.isfinite().all()) and can_screen()

    @torch.no_grad()
    def topk_relu(self, centred: Tensor, k: int) -> SparseCodes:
        """ReLU of the k largest of centred @ W_enc^T: values float32 [N, k], largest first, indices int64 [N, k]; of
        equal values the lowest latent first. `centred` float32 [N, D]."""
        n, m = len(centred), len(self._weights)
        centred = centred.contiguous()
        rotated = self._rotate(centred)
        scale = rotated.abs().amax(dim=1).clamp_min(1e-30) / 127  # [N]
        rows = rotated.div_(scale[:, None]).round_().to(torch.int8)
        # Standard deviation of an estimate's error, in units of the row's scale.
        norm = torch.linalg.vector_norm(centred, dim=1) / scale
        if not norm.isfinite().all():
            return encode_tiled(centred, self._weights, k)
        spread = ((self._largest_norm**2 + self._largest_scale**2 * norm.square()) / 12).sqrt()
        values, indices = centred.new_empty(n, k), torch.empty(n, k, dtype=torch.int64)
        tile = min(n, max(16, TILE_BYTES // (4 * m)))
        product = torch.empty(tile, m, dtype=torch.int32)  # one for all: fresh memory costs page faults
        for start in range(0, n, tile):
            stop = min(start + tile, n)
            estimates = product[: stop - start]
            torch._int_mm(rows[start:stop], self._bytes.T, out=estimates)  # pyright: ignore[reportPrivateImportUsage]
            run_chunks(
                screen_rows,
                even_chunks(stop - start, 8),
                estimates.numpy(),
                self._scale.numpy(),
                scale[start:stop].numpy(),
                SIGMAS * spread[start:stop].numpy(),
                centred[start:stop].numpy(),
                self._weights.numpy(),
                values[start:stop].numpy(),
                indices[start:stop].numpy(),
            )
        return SparseCodes(values, indices)

    def _rotate(self, x: Tensor) -> Tensor:
        """x [N, D] times the orthogonal matrix."""
        blocks = (x * self._signs).view(len(x), -1, len(self._hadamard))
        return (blocks @ self._hadamard).view(x.shape)


def _hadamard(n: int) -> np.ndarray:
    """The n x n Hadamard matrix (Sylvester 1867), n a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@compiled
def screen_rows(start, stop, product, latent_scale, row_scale, margin, centred, weights, values, indices):
    """Rows start..stop of: product int32 [N, M], latent_scale [M], row_scale [N], margin [N] of an estimate (product *
    latent_scale), centred [N, D], weights [M, D] -> values [N, k], indices [N, k]."""
    m, k = product.shape[1], values.shape[1]
    estimate, maxima = (
        np.empty(m, np.float32),
        np.empty(m // (_GROUP * _LANES) * _LANES + min(_LANES, m % (_GROUP * _LANES)), np.float32),
    )
    found, guess, exact = np.empty(m, np.int32), np.empty(m, np.float32), np.empty(m, np.float32)
    for n in range(start, stop):
        row, own = product[n], centred[n]
        if not own.any():  # all products are equal, and ranking them would take time with the square of m
            for i in range(k):
                values[n, i], indices[n, i] = np.float32(0), i
            continue
        for j in range(m):
            estimate[j] = np.float32(row[j]) * latent_scale[j]
        _group_maxima(estimate, maxima)
        # k groups hold an estimate that reaches this, so the k-th largest estimate does.
        bound = _kth_largest(maxima, maxima.size, k)
        wide = margin[n]
        while True:
            n_found = _reaching(estimate, bound - 2 * wide, found)
            for i in range(n_found):
                guess[i] = estimate[found[i]]
            # First those of the k largest estimates: the k-th of their true values is at most the k-th of all.
            n_first = _put_first(guess, found, 0, n_found, _kth_largest(guess, n_found, k))
            error = _multiply(own, weights, row_scale[n], guess, found, 0, n_first, exact)
            least = _kth_largest(exact, n_first, k) / row_scale[n]
            n_found = _put_first(guess, found, n_first, n_found, least - wide)
            error = max(error, _multiply(own, weights, row_scale[n], guess, found, n_first, n_found, exact))
            if error <= _CHECKED * wide or n_found == m:
                break
            wide *= 2
        for i in range(n_found):
            place = _above(exact, n_found, exact[i])
            if place < k:
                for other in range(n_found):
                    place += exact[other] == exact[i] and found[other] < found[i]
            if place < k:
                values[n, place] = max(exact[i], np.float32(0))
                indices[n, place] = found[i]


@inlined
def _group_maxima(estimate, maxima):
    """Fill maxima [groups] with the largest estimate of each group: the latents of one lane among 16 * 64."""
    for first in range(0, estimate.size, _GROUP * _LANES):
        lanes = maxima[first // _GROUP : first // _GROUP + _LANES]
        part = estimate[first : first + _GROUP * _LANES]
        for i in range(lanes.size):
            lanes[i] = part[i]
        whole = part.size // _LANES
        for step in range(1, whole):
            for i in range(_LANES):
                guess = part[step * _LANES + i]
                lanes[i] = guess if guess > lanes[i] else lanes[i]
        for j in range(max(whole, 1) * _LANES, part.size):
            lanes[j % _LANES] = max(lanes[j % _LANES], part[j])


@inlined
def _above(numbers, n, bound):
    """How many of numbers[:n] are above the bound."""
    count = np.int32(0)
    for i in range(n):
        count = np.int32(count + np.int32(numbers[i] > bound))
    return count


@inlined
def _dot(a, b):
    total = np.float32(0)
    for d in range(a.size):
        total += a[d] * b[d]
    return total


@inlined
def _reaching(estimate, bound, found):
    """Fill `found` with the latents whose estimate reaches the bound, ascending; returns how many.

    64 comparisons become the bits of a mask, which compilers know how to vectorise; hits are rare.
    """
    n_found, m = 0, estimate.size
    for start in range(0, m, 64):
        part = estimate[start : min(start + 64, m)]
        hits = np.uint64(0)
        if part.size == 64:
            for i in range(64):
                hits |= np.uint64(part[i] >= bound) << np.uint64(i)
        else:
            for i in range(part.size):
                hits |= np.uint64(part[i] >= bound) << np.uint64(i)
        while hits != 0:
            found[n_found] = start + trailing_zeros(hits)  # pyright: ignore[reportCallIssue]  numba passes its context
            n_found += 1
            hits &= hits - np.uint64(1)
    return n_found


@inlined
def _put_first(guess, found, start, stop, bound):
    """Of the latents start..stop, put those whose estimate reaches the bound first; returns where they end."""
    end = start
    for i in range(start, stop):
        if guess[i] >= bound:
            guess[i], guess[end] = guess[end], guess[i]
            found[i], found[end] = found[end], found[i]
            end += 1
    return end


@inlined
def _multiply(own, weights, scale, guess, found, start, stop, exact):
    """Fill exact [start..stop] with the products of the latents found; returns the largest error of an estimate."""
    error = np.float32(0)
    for i in range(start, stop):
        exact[i] = _dot(own, weights[found[i]])
        error = max(error, abs(exact[i] / scale - guess[i]))
    return error


@inlined
def _kth_largest(numbers, n, k):
    """The k-th largest of numbers[:n], by halving the range that holds it until it is one number, or nearly: what is
    returned is at most the k-th largest."""
    low, high = numbers[0], numbers[0]
    for i in range(n):
        low = min(low, numbers[i])
        high = max(high, numbers[i])
    for _ in range(24):  # at least k numbers reach `low` throughout
        middle = low + (high - low) * np.float32(0.5)
        reached = np.int32(0)
        for i in range(n):
            reached = np.int32(reached + np.int32(numbers[i] >= middle))
        if reached >= k:
            low = middle
            if reached == k:
                break
        else:
            high = middle
    return low
