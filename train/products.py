"""left @ right^T for one right operand and many left ones, in the type that the hardware is fast at.

float16 is what `train.kernels_half` does on a CPU: its results are float32. Every other type is torch's product, whose
results are of that type.

Shapes: n rows of the left operand, m of the right, d depth.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def times(right: Tensor, dtype: torch.dtype) -> Callable[..., Tensor]:
    """`product(left, out=None)` [n, d] -> [n, m] with `right` [m, d], both made `dtype`; `out` is of `result_dtype`."""
    if dtype == torch.float16:
        from train.kernels_half import HalfProduct  # here, because loading numba takes half a second

        return HalfProduct(right)
    transposed = right.to(dtype).t()
    return lambda left, out=None: torch.mm(left.to(dtype), transposed, out=out)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the results of products of type `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype
