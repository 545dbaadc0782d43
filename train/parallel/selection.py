"""The largest pre-activations of a batch whose rows, or whose latents, are spread over several ranks.

Shapes: N rows of this rank, D d_model, w the most active latents per row, R ranks, A dead latents of this rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from train.kernels.encode import BatchCodes, ReadyEncoder
from train.kernels.interface import Kernels, SparseCodes
from train.parallel.ranks import Ranks

_BITS = 8
"""Bits of a value that are settled by one sum over ranks."""


def batch_codes(encoder: ReadyEncoder, inputs: Tensor, count: int, ranks: Ranks) -> BatchCodes:
    """The `count` largest positive pre-activations of all ranks' rows together: those in `inputs` [N, D] of this rank,
    and the smallest of all. Exact; of equal ones at the border, the first ranks' are taken."""
    if ranks.size == 1:
        return encoder.batch(inputs, count)
    sought = min(2 * -(-count // ranks.size), count)  # it is rare for a rank to have twice its share
    while True:
        codes, lowest = encoder.batch(inputs, sought)
        values = codes.values[codes.values > 0]
        if (smallest := _nth_largest(values, count, ranks)) is None:
            return BatchCodes(codes, None)
        cut = len(values) == sought and lowest is not None and bool(lowest >= smallest)  # some may be missing
        if not ranks.any(cut and sought < count):
            break
        sought = min(4 * sought, count)
    above, equal = codes.values > smallest, codes.values == smallest
    counts = ranks.all_of(torch.stack([above.sum(), equal.sum()]))  # [R, 2]
    room = count - counts[:, 0].sum() - counts[: ranks.rank, 1].sum()
    keep = above | (equal & (equal.view(-1).cumsum(0).view_as(equal) <= room))
    return BatchCodes(SparseCodes(codes.values.masked_fill(~keep, 0), codes.indices), smallest)


def _nth_largest(values: Tensor, n: int, ranks: Ranks) -> Tensor | None:
    """The n-th largest of all ranks' positive float32 `values` [P], the smallest if there are fewer, None if none.

    By their bits, which order positive floats as integers: eight at a time, from counts of each of the 256 values.
    """
    bits, found = values.float().view(torch.int32).long(), 0
    for shift in range(32 - _BITS, -1, -_BITS):
        digits = (bits[bits >> (shift + _BITS) == found] >> shift) & (2**_BITS - 1)
        at_least = torch.bincount(digits, minlength=2**_BITS)
        ranks.sum_(at_least)
        at_least = at_least.flip(0).cumsum(0).flip(0)  # [256] values with this digit or a larger one
        if shift == 32 - _BITS:
            n = min(n, int(at_least[0]))
            if n == 0:
                return None
        digit = int((at_least >= n).sum()) - 1
        n -= int(at_least[digit + 1]) if digit + 1 < len(at_least) else 0
        found = (found << _BITS) + digit
    return torch.tensor(found, dtype=torch.int32, device=values.device).view(torch.float32).to(values.dtype)


def row_codes(codes: SparseCodes, latents: Ranks) -> SparseCodes:
    """This rank's k largest, `codes` [N, k], with those set to 0 that are not among the k largest of all ranks."""
    if latents.size == 1:
        return codes
    n, k = codes.values.shape
    values = latents.all_of(codes.values).transpose(0, 1).reshape(n, -1)  # [N, R k]
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]  # ties: the first latents
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)
    own = chosen[:, latents.rank * k : (latents.rank + 1) * k]
    return SparseCodes(codes.values.masked_fill(~own, 0), codes.indices)


def keep_largest(z: Tensor, k: int, kernels: Kernels, latents: Ranks) -> Tensor:
    """ReLU of `z` [N, A] with all set to zero but each row's k largest over the latents of all ranks."""
    if latents.size == 1:
        return kernels.keep_largest(z, k)
    width = min(k, z.shape[1])
    values, indices = kernels.topk_relu(z, width) if width else SparseCodes(z.float(), z.long())
    kept = row_codes(SparseCodes(F.pad(values, (0, k - width)), indices), latents).values[:, :width]
    return torch.zeros_like(z).scatter_(1, indices, kept.to(z.dtype))
