"""From encoder inputs to sparse codes: the one dense product, a tile of rows at a time, and three ways to choose.

    encode_tiled   the k largest pre-activations of each row
    encode_batch   the largest of a whole batch, as many as asked for
    encode_above   all above a threshold, one for all latents or one for each

All keep positive values only. No more than a tile of the [N, M] pre-activations is ever held. Where the number of
active latents varies, rows are padded with value 0 to the longest; whatever latent a 0 names, it is not active.

Shapes: N rows, D d_model, M n_latents, k active latents a row, w the most that a row has, P active (row, latent) pairs.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from train.hardware import dense_dtype
from train.kernels.interface import Kernels, SparseCodes, choose_kernels

if TYPE_CHECKING:
    from train.kernels.cpu.screen import Screen

TILE_BYTES = 16 * 2**20
"""Pre-activations held at once: a tile this large is still in the last-level cache when top-k reads it."""


class Tile(NamedTuple):
    """The pre-activations of some rows."""

    part: slice
    """Which rows."""

    z: Tensor
    """[n, M], in memory that the next tile writes over."""


def tiles(
    inputs: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    product_dtype: torch.dtype | None = None,
    tile_bytes: int = TILE_BYTES,
) -> Iterator[Tile]:
    """inputs @ W_enc^T + b_enc, `inputs` [N, D], W_enc [M, D], b_enc [M] or None, in `product_dtype`, as z is too."""
    n, m = len(inputs), len(W_enc)
    dtype = dense_dtype(product_dtype or W_enc.dtype)
    transposed = W_enc.to(dtype).t()
    bias = None if b_enc is None else b_enc.to(dtype)
    rows = max(1, min(n, tile_bytes // (m * dtype.itemsize)))
    memory = torch.empty(rows, m, dtype=dtype, device=inputs.device)  # one for all: fresh memory costs page faults
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        z = torch.mm(inputs[part].to(dtype), transposed, out=memory[: n - start])
        yield Tile(part, z if bias is None else z.add_(bias))


@torch.no_grad()
def encode_tiled(
    inputs: Tensor,
    W_enc: Tensor,
    k: int,
    *,
    b_enc: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    tile_bytes: int = TILE_BYTES,
    kernels: Kernels | None = None,
) -> SparseCodes:
    """ReLU(TopK_k(inputs @ W_enc^T + b_enc)) [N, k]: `inputs` [N, D] is x_std - b_pre.

    With `product_dtype` int8, by a screen where one applies: then those of the float32 product.
    """
    kernels = kernels or choose_kernels(W_enc)
    screen = _screen(W_enc, k, b_enc, product_dtype, kernels)
    if screen is not None:
        return screen.topk_relu(inputs, k)
    values = inputs.new_empty(len(inputs), k)
    indices = torch.empty(len(inputs), k, dtype=torch.int64, device=inputs.device)
    for part, z in tiles(inputs, W_enc, b_enc, product_dtype=product_dtype, tile_bytes=tile_bytes):
        values[part], indices[part] = kernels.topk_relu(z, k)
    return SparseCodes(values, indices)


def _screen(
    W_enc: Tensor, k: int, b_enc: Tensor | None, product_dtype: torch.dtype | None, kernels: Kernels
) -> "Screen | None":
    """The screen that finds the k largest, where one was asked for and applies."""
    if product_dtype != torch.int8 or b_enc is not None or kernels.name != "numba":
        return None
    from train.kernels.cpu.screen import Screen  # here, because loading numba takes half a second

    return Screen(W_enc) if Screen.fits(W_enc, k) else None


@torch.no_grad()
def encode_above(
    inputs: Tensor,
    W_enc: Tensor,
    threshold: Tensor,
    *,
    b_enc: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    tile_bytes: int = TILE_BYTES,
) -> SparseCodes:
    """Pre-activations above `threshold` ([] or [M], >= 0) and what latents they are of: [N, w].

    With `product_dtype` int8 of the float32 product, as the thresholds that a screen measures are.
    """
    product_dtype = torch.float32 if product_dtype == torch.int8 else product_dtype
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part, z in tiles(inputs, W_enc, b_enc, product_dtype=product_dtype, tile_bytes=tile_bytes):
        row, latent = (z > _rounded_down(threshold.clamp(min=0), z.dtype)).nonzero(as_tuple=True)
        found.append((row + part.start, latent, z[row, latent].to(inputs.dtype)))
    if not found:
        return SparseCodes(inputs.new_zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64, device=inputs.device))
    row, latent, value = (torch.cat(part) for part in zip(*found, strict=True))
    return padded(row, latent, value, len(inputs))


def _rounded_down(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of `dtype` that is not above `threshold` (>= 0): z of that type is above both or neither.

    So a bfloat16 tile need not be widened for the comparison, and exceeds the threshold as often as in training.
    """
    if dtype == torch.bfloat16 and threshold.dtype == torch.float32:
        return (threshold.view(torch.int32) & -0x10000).view(torch.float32).to(dtype)
    return threshold.to(dtype)


class BatchCodes(NamedTuple):
    """The largest pre-activations of a batch."""

    codes: SparseCodes
    """[N, w]"""

    smallest: Tensor | None
    """[] the smallest value that was kept; None where nothing was positive."""


@torch.no_grad()
def encode_batch(
    inputs: Tensor,
    W_enc: Tensor,
    count: int,
    *,
    b_enc: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    tile_bytes: int = TILE_BYTES,
) -> BatchCodes:
    """The `count` largest positive pre-activations of all N rows together (Bussmann et al. 2024, BatchTopK).

    Of equal ones at the border, those of the first rows, and within a row of the first latents. Exact for any tile
    size: what has been kept so far is cut back to `count` after each tile, and its smallest value is a lower bound for
    all that follow. So memory is a tile and `count` pairs, not N x M. With `product_dtype` int8, by a screen where one
    applies.
    """
    n, m = len(inputs), len(W_enc)
    width = 2 * -(-count // max(n, 1))  # few rows have twice their share
    screen = _screen(W_enc, width, b_enc, product_dtype, choose_kernels(W_enc)) if n else None
    if screen is not None:
        return _batch_by_rows(screen.topk_relu, inputs, m, count, width)
    values = inputs.new_empty(0)
    places = torch.empty(0, dtype=torch.int64, device=inputs.device)  # row * M + latent, ascending
    bound = torch.zeros((), dtype=dense_dtype(product_dtype or W_enc.dtype), device=inputs.device)
    for part, z in tiles(inputs, W_enc, b_enc, product_dtype=product_dtype, tile_bytes=tile_bytes):
        flat = z.view(-1)
        chosen = (flat > bound).nonzero().squeeze(1)
        values = torch.cat([values, flat[chosen].to(inputs.dtype)])
        places = torch.cat([places, chosen + part.start * m])
        if len(values) > count:
            kept = _first_largest(values, count)
            values, places = values[kept], places[kept]
        if len(values) == count:
            bound = values.min().to(bound.dtype)
    if len(values) == 0:
        empty = SparseCodes(inputs.new_zeros(len(inputs), 1), places.new_zeros(len(inputs), 1))
        return BatchCodes(empty, None)
    return BatchCodes(padded(places // m, places % m, values, len(inputs)), values.min())


def _batch_by_rows(
    topk: Callable[[Tensor, int], SparseCodes], inputs: Tensor, n_latents: int, count: int, width: int
) -> BatchCodes:
    """The `count` largest of all rows, from each row's `width` largest; of rows of which all these are among the
    `count`, four times as many are looked at, until none is such a row."""
    parts: list[tuple[Tensor, SparseCodes]] = []  # numbers of rows, and their codes
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
    order = row.sort(stable=True)
    values, latents = (
        torch.cat([part[i][mask] for (_, part), mask in zip(parts, chosen, strict=True)])[order.indices]
        for i in range(2)
    )
    if len(values) == 0:
        empty = SparseCodes(inputs.new_zeros(len(inputs), 1), latents.new_zeros(len(inputs), 1))
        return BatchCodes(empty, None)
    row = order.values
    if len(values) > count:
        kept = _first_largest(values, count)
        row, latents, values = row[kept], latents[kept], values[kept]
    return BatchCodes(padded(row, latents, values, len(inputs)), values.min())


def _first_largest(values: Tensor, count: int) -> Tensor:
    """bool [P]: the `count` largest of `values` [P], the first ones where several equal the smallest of them."""
    if values.is_cuda:  # kthvalue is not deterministic there: which of equal entries it names, so torch refuses it
        smallest = values.topk(count, sorted=False).values.min()
    else:
        smallest = values.kthvalue(len(values) - count + 1).values
    above, equal = values > smallest, values == smallest
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def padded(row: Tensor, latent: Tensor, value: Tensor, n: int) -> SparseCodes:
    """Active pairs, row by row (row int64 [P] ascending, latent int64 [P], value [P]), as codes [n, w]; w >= 1."""
    counts = torch.bincount(row, minlength=n)
    width = max(1, int(counts.max()) if n else 0)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    values = value.new_zeros(n, width)
    indices = latent.new_zeros(n, width)
    values[row, place] = value
    indices[row, place] = latent
    return SparseCodes(values, indices)
