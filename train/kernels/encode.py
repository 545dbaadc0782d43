"""From encoder inputs to sparse codes: the one dense product, a tile of rows at a time, and three ways to choose.

All three keep only positive values. No more than a tile of the [N, M] pre-activations is in memory at a time. If the
number of active latents varies, rows are padded to the longest with value 0; a latent whose value is 0 is not active.

Tested in tests/train/objective/test_variants.py, tests/train/test_model.py and tests/train/kernels/cpu/test_screen.py.

Shapes: N rows, D d_model, M n_latents, k active latents per row, w the most of any row, P active (row, latent) pairs.
"""

import threading
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple, final

import torch
from torch import Tensor

from train.hardware import dense_dtype
from train.kernels.interface import Kernels, SparseCodes, TopK

TILE_BYTES = 16 * 2**20
"""Pre-activations held at once: a tile this large is still in the last-level cache when top-k reads it."""


def tiles(
    inputs: Tensor, W_enc: Tensor, b_enc: Tensor | None, dtype: torch.dtype, tile_bytes: int = TILE_BYTES
) -> Iterator[tuple[slice, Tensor]]:
    """A slice of the rows at a time, with its inputs @ W_enc^T + b_enc [n, M] in memory that the next tile overwrites.

    inputs [N, D], W_enc [M, D], b_enc [M] or None; product and sum are of type `dtype`.
    """
    n, m = len(inputs), len(W_enc)
    transposed = W_enc.to(dtype).t()
    bias = None if b_enc is None else b_enc.to(dtype)
    rows = max(1, min(n, tile_bytes // (m * dtype.itemsize)))
    memory = torch.empty(rows, m, dtype=dtype, device=inputs.device)  # reused: fresh memory costs page faults
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        z = torch.mm(inputs[part].to(dtype), transposed, out=memory[: n - start])
        yield part, z if bias is None else z.add_(bias)


class BatchCodes(NamedTuple):
    """The largest pre-activations of a batch."""

    codes: SparseCodes
    """[N, w]"""
    smallest: Tensor | None
    """[] the smallest value that was kept; None if nothing was positive."""


@final
class ReadyEncoder:
    """An encoder's weights, prepared for batches of inputs [N, D] (x_std - b_pre); they must not change meanwhile."""

    def __init__(
        self,
        kernels: Kernels,
        W_enc: Tensor,
        b_enc: Tensor | None = None,
        *,
        product_dtype: torch.dtype | None = None,
        screened: bool = False,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        """W_enc [M, D], b_enc [M].

        product_dtype: of the encoder's product; default: the weights'. screened: the k largest may be found without
        computing all products, if the kernels can; the result is that of the float32 product, summed in another order.
        int8 means screened, with the type of `train.hardware.dense_dtype` where all products are computed.
        """
        self._kernels, self._tile_bytes = kernels, tile_bytes
        self._W_enc, self._b_enc = W_enc.detach(), None if b_enc is None else b_enc.detach()
        dtype = product_dtype or W_enc.dtype
        self._dtype = dense_dtype(dtype)
        # A threshold measured with the screen is of float32 products.
        self._threshold_dtype = W_enc.dtype if dtype == torch.int8 else dtype
        self._screened = (screened or dtype == torch.int8) and b_enc is None
        self._screens: dict[int, TopK | None] = {}
        self._making = threading.Lock()

    @torch.no_grad()
    def topk(self, inputs: Tensor, k: int) -> SparseCodes:
        """ReLU(TopK_k(inputs @ W_enc^T + b_enc)): [N, k]."""
        if (screen := self._screen(k)) is not None:
            return screen(inputs, k)
        values = inputs.new_empty(len(inputs), k)
        indices = torch.empty(len(inputs), k, dtype=torch.int64, device=inputs.device)
        for part, z in self._tiles(inputs, self._dtype):
            values[part], indices[part] = self._kernels.topk_relu(z, k)
        return SparseCodes(values, indices)

    @torch.no_grad()
    def above(self, inputs: Tensor, threshold: Tensor) -> SparseCodes:
        """Pre-activations above `threshold` ([] or [M], >= 0) and their latents: [N, w]."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for part, z in self._tiles(inputs, self._threshold_dtype):
            row, latent = (z > _rounded_down(threshold.clamp(min=0), z.dtype)).nonzero(as_tuple=True)
            found.append((row + part.start, latent, z[row, latent].to(inputs.dtype)))
        if not found:
            return SparseCodes(inputs.new_zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64, device=inputs.device))
        row, latent, value = (torch.cat(part) for part in zip(*found, strict=True))
        return _padded(row, latent, value, len(inputs))

    @torch.no_grad()
    def batch(self, inputs: Tensor, count: int) -> BatchCodes:
        """The `count` largest positive pre-activations of all N rows together (Bussmann et al. 2024, BatchTopK).

        Ties at the border go to the first rows, and within a row to the first latents. Exact for any tile size: after
        each tile only the `count` largest so far are kept, and the smallest of these is a lower bound for the tiles
        that follow. So memory is a tile and `count` pairs, not N x M.
        """
        n, m = len(inputs), len(self._W_enc)
        width = 2 * -(-count // max(n, 1))  # few rows have more than twice their share
        screen = self._screen(width) if n else None
        if screen is not None:
            return _batch_by_rows(screen, inputs, m, count, width)
        values = inputs.new_empty(0)
        places = torch.empty(0, dtype=torch.int64, device=inputs.device)  # row * M + latent, ascending
        bound = torch.zeros((), dtype=self._dtype, device=inputs.device)
        for part, z in self._tiles(inputs, self._dtype):
            flat = z.view(-1)
            chosen = (flat > bound).nonzero().squeeze(1)
            values = torch.cat([values, flat[chosen].to(inputs.dtype)])
            places = torch.cat([places, chosen + part.start * m])
            if len(values) > count:
                kept = _first_largest(values, count)
                values, places = values[kept], places[kept]
            if len(values) == count:
                bound = values.min().to(bound.dtype)
        return _batch_codes(places // m, places % m, values, n)

    def _tiles(self, inputs: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        W_enc = self._weights if dtype == self._dtype else self._W_enc
        return tiles(inputs, W_enc, self._b_enc, dtype, self._tile_bytes)

    @cached_property
    def _weights(self) -> Tensor:
        return self._W_enc.to(self._dtype)

    def _screen(self, k: int) -> TopK | None:
        if not self._screened:
            return None
        with self._making:
            if k not in self._screens:
                self._screens[k] = self._kernels.screen(self._W_enc, k)
            return self._screens[k]


def _rounded_down(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of `dtype` that is not above `threshold` (>= 0): z of that type is above both or neither.

    So a bfloat16 tile can be compared without widening it, with the same result as in training.
    """
    if dtype == torch.bfloat16 and threshold.dtype == torch.float32:
        return (threshold.view(torch.int32) & -0x10000).view(torch.float32).to(dtype)
    return threshold.to(dtype)


def _batch_by_rows(topk: TopK, inputs: Tensor, n_latents: int, count: int, width: int) -> BatchCodes:
    """The `count` largest of all rows, from each row's `width` largest. A row whose `width` largest are all among the
    `count` may have more of them: it is searched again with four times the width, until there is no such row."""
    parts: list[tuple[Tensor, SparseCodes]] = []  # row indices, and the codes of these rows
    rows = torch.arange(len(inputs))
    while True:
        codes = topk(inputs[rows], width)
        every = torch.cat([codes.values.view(-1), *(part.values.view(-1) for _, part in parts)])
        largest = every.kthvalue(len(every) - count + 1).values
        more = (codes.values[:, -1] >= largest) & (codes.values[:, -1] > 0)
        if width == n_latents or not bool(more.any()):
            parts.append((rows, codes))
            break
        parts.append((rows[~more], SparseCodes(codes.values[~more], codes.indices[~more])))
        rows, width = rows[more], min(4 * width, n_latents)
    chosen = [part.values >= largest.clamp(min=torch.finfo(inputs.dtype).tiny) for _, part in parts]
    row = torch.cat([rows[mask.nonzero()[:, 0]] for (rows, _), mask in zip(parts, chosen, strict=True)])
    row, order = row.sort(stable=True)
    values, latents = (
        torch.cat([part[i][mask] for (_, part), mask in zip(parts, chosen, strict=True)])[order] for i in range(2)
    )
    if len(values) > count:
        kept = _first_largest(values, count)
        row, latents, values = row[kept], latents[kept], values[kept]
    return _batch_codes(row, latents, values, len(inputs))


def _first_largest(values: Tensor, count: int) -> Tensor:
    """bool [P]: the `count` largest of `values` [P]; ties at the border go to the first."""
    if values.is_cuda:  # torch refuses kthvalue there: its choice among equal entries is not deterministic
        smallest = values.topk(count, sorted=False).values.min()
    else:
        smallest = values.kthvalue(len(values) - count + 1).values
    above, equal = values > smallest, values == smallest
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def _batch_codes(row: Tensor, latent: Tensor, value: Tensor, n: int) -> BatchCodes:
    return BatchCodes(_padded(row, latent, value, n), value.min() if len(value) else None)


def _padded(row: Tensor, latent: Tensor, value: Tensor, n: int) -> SparseCodes:
    """Active pairs, row by row (row int64 [P] ascending, latent int64 [P], value [P]), as codes [n, w]; w >= 1."""
    counts = torch.bincount(row, minlength=n)
    width = max(1, int(counts.max()) if n else 0)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    values = value.new_zeros(n, width)
    indices = latent.new_zeros(n, width)
    values[row, place] = value
    indices[row, place] = latent
    return SparseCodes(values, indices)
