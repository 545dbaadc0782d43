"""The k largest pre-activations by an 8-bit screen: as exact as the float32 product, at a fraction of its time.

If the processor multiplies bytes (AVX-512 VNNI), a product of 8-bit integers is four times as fast as one in float32.
It is too coarse to be the answer, but good enough to tell which latents can be among the k largest:

1. Vectors and encoder rows are rotated by the same orthogonal matrix (random signs, then a Hadamard matrix on up to 64
   parts of the coordinates), which keeps every product and spreads outliers, then rounded to 8 bits, each with its own
   scale.
2. The integer product estimates every pre-activation. Rounding errors are sums of hundreds of small independent terms,
   so they are sub-Gaussian with a standard deviation sigma, one per latent, that follows from the scales and norms; an
   estimate is off by more than 8 sigma once in 10^13. Estimates stay in registers; only those that may be among the k
   largest, some two hundred per vector, are kept, and their bound rises (`train.kernels.cpu.screen_loops`).
3. The k latents with the largest estimates are computed in float32 with the original weights, then every latent whose
   estimate plus 8 sigma reaches the least of those products: values and order come only from the products. They also
   show the estimates' true errors.
4. If such an error is above 6 sigma, or more than a thousand latents are too close to tell, or the bound rose too far,
   or the vector is zero or not finite, all its products are computed instead.

So the result is that of the float32 product, up to rounding, summed in an order that depends only on the processor's
vector width, not on the number of threads or the other vectors.

Shapes: N vectors, D d_model, M n_latents, k active latents per vector.
"""

import math

import numpy as np
import torch
from torch import Tensor

from train.hardware import has_byte_products
from train.kernels.cpu import screen_loops as loops
from train.kernels.cpu.compiling import even_chunks, run_chunks
from train.kernels.cpu.selection import topk_relu
from train.kernels.interface import SparseCodes

TILE_BYTES = 16 * 2**20  # memory for all products of vectors that the screen leaves out
MAX_BLOCKS = 64  # most parts of a vector that are mixed
SIGMAS = 8.0  # margin of an estimate, in standard deviations of its error
_MANY = 64  # the screen pays from so many latents for each of the k
_FIRST_SAMPLE = 4  # panels after which the first bounds are set
_LEAST_NORM = 1e-3  # relative to the largest row's norm: smaller rows get the margin of this norm


class Screen:
    """An encoder's weights, prepared for screening; they must not change while it is used."""

    def __init__(self, W_enc: Tensor) -> None:
        """W_enc float32 [M, D]."""
        self._weights = W_enc.detach().contiguous()
        m, d = self._weights.shape
        generator = torch.Generator().manual_seed(0)
        self._signs = torch.randint(0, 2, (d,), generator=generator).float() * 2 - 1
        self._blocks = math.gcd(d, MAX_BLOCKS)
        n_panels = -(-m // loops.PANEL)
        places = n_panels * loops.PANEL
        # In random order, so that the first are a fair sample.
        self._order = torch.zeros(places, dtype=torch.int32)
        self._order[:m] = torch.randperm(m, generator=generator)
        # torch aligns memory to a cache line; numpy may not, which makes products slower.
        self._panels = torch.empty(n_panels, d // 4, loops.PANEL, dtype=torch.int32)
        self._scale, self._size = torch.empty(2, places)
        arrays = (part.numpy() for part in (self._weights, self._order, self._signs))
        results = (part.numpy() for part in (self._panels, self._scale, self._size))
        run_chunks(loops.pack_latents, even_chunks(n_panels, 8), *arrays, self._blocks, *results)
        largest = float(self._size.max())
        self._sound = math.isfinite(largest)
        """Whether all weights are finite; if not, all products are computed."""
        self._size.clamp_(min=max(1e-30, _LEAST_NORM * largest))
        self._coarseness = float((self._scale / self._size).max())
        self._size[m:] = -torch.inf
        self._own_size = torch.empty(m)
        self._own_size[self._order[:m].long()] = self._size[:m]

    @staticmethod
    def fits(W_enc: Tensor, k: int) -> bool:
        """Whether it works and pays: float32 weights [M, D], D a multiple of 16, many latents per k, a CPU that can."""
        m, d = W_enc.shape
        shaped = W_enc.dtype == torch.float32 and W_enc.device.type == "cpu" and d % 16 == 0 and m >= _MANY * k
        return shaped and has_byte_products()

    @torch.no_grad()
    def topk_relu(self, centred: Tensor, k: int) -> SparseCodes:
        """As `selection.topk_relu` of centred @ W_enc^T; `centred` float32 [N, D]."""
        n, d = centred.shape
        centred = centred.contiguous()
        n_blocks = -(-n // loops.ROWS)
        blocks = torch.empty(n_blocks, d // 4, loops.ROWS, dtype=torch.int32)
        scale, square = torch.empty(2, n_blocks * loops.ROWS)
        offset = torch.empty(n_blocks * loops.ROWS, dtype=torch.int32)
        packed = (part.numpy() for part in (blocks, scale, square, offset))
        run_chunks(
            loops.pack_rows, even_chunks(n_blocks, 8), centred.numpy(), self._signs.numpy(), self._blocks, *packed
        )
        # The error's standard deviation relative to a latent's norm, in units of the row's scale.
        spread = ((1 + self._coarseness**2 * square / scale.square()) / 12).sqrt()
        margin = torch.where(scale > 0, SIGMAS * spread, 0)
        values, indices = torch.empty(n, k), torch.empty(n, k, dtype=torch.int64)
        left_out = np.ones(n, np.bool_)
        rows, screened, exact = (
            tuple(part.numpy() for part in parts)
            for parts in (
                (blocks, offset, scale, margin),
                (self._panels, self._scale, self._size, self._order),
                (self._own_size, centred, self._weights, values, indices),
            )
        )
        borders = even_chunks(n_blocks if self._sound else 0, loops.GROUP)
        run_chunks(loops.screen_blocks, borders, rows, screened, self._ranks(k), *exact, left_out)
        tile = max(1, TILE_BYTES // (4 * len(self._weights)))
        for rest in torch.from_numpy(left_out).nonzero().squeeze(1).split(tile):
            values[rest], indices[rest] = self._from_all_products(centred[rest], k)
        return SparseCodes(values, indices)

    def _ranks(self, k: int) -> np.ndarray:
        """int32 [p]: after each panel, 0, or if the number of latents has quadrupled, the rank among those so far that
        at least k of all M reach, but for one vector in some hundred thousand (5 standard deviations)."""
        n_panels = len(self._panels)
        ranks = np.zeros(n_panels, np.int32)
        panels = _FIRST_SAMPLE
        while panels < n_panels:
            share = panels / n_panels  # the mean share of the k largest that is among them
            ranks[panels - 1] = min(k, math.ceil(k * share + 5 * (k * share * (1 - share)) ** 0.5) + 1)
            panels *= 4
        return ranks

    def _from_all_products(self, centred: Tensor, k: int) -> SparseCodes:
        z = torch.empty(len(centred), len(self._weights))
        arrays = (part.numpy() for part in (centred, self._weights, z))
        run_chunks(loops.multiply_latents, even_chunks(len(self._weights), 64), *arrays)
        return topk_relu(z, k)
