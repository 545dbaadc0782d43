"""The largest pre-activations of a batch whose rows are spread over several ranks.

Shapes: N rows of this rank, D d_model, w active latents a row at most.
"""

import torch
from torch import Tensor

from train.kernels.encode import BatchCodes, ReadyEncoder
from train.kernels.interface import SparseCodes
from train.parallel.ranks import Ranks

_BITS = 8
"""Of a value that one sum over ranks decides."""


def batch_codes(encoder: ReadyEncoder, inputs: Tensor, count: int, ranks: Ranks) -> BatchCodes:
    """The `count` largest positive pre-activations of all ranks' rows together, those of `inputs` [N, D] here, and the
    smallest of all. Exact; of equal ones at the border, those of the first ranks."""
    if ranks.size == 1:
        return encoder.batch(inputs, count)
    sought = min(2 * -(-count // ranks.size), count)  # few ranks have twice their share
    while True:
        codes, lowest = encoder.batch(inputs, sought)
        values = codes.values[codes.values > 0]
        smallest = _nth_largest(values, count, ranks)
        if smallest is None:
            return BatchCodes(codes, None)
        cut = len(values) == sought and lowest is not None and bool(lowest >= smallest)  # may have more that count
        if not ranks.any(cut and sought < count):
            break
        sought = min(4 * sought, count)
    above, equal = codes.values > smallest, codes.values == smallest
    counts = torch.stack([above.sum(), equal.sum()])
    before = ranks.before(counts)
    ranks.sum_(counts)
    room = count - counts[0] - before[1]
    keep = above | (equal & (equal.view(-1).cumsum(0).view_as(equal) <= room))
    return BatchCodes(SparseCodes(codes.values.masked_fill(~keep, 0), codes.indices), smallest)


def _nth_largest(values: Tensor, n: int, ranks: Ranks) -> Tensor | None:
    """The n-th largest of all ranks' positive float32 `values` [P], or the smallest where they are fewer; None of none.

    By the bits, which order positive numbers as integers do: eight at a time, from counts of the 256 that there are.
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
