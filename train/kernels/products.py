"""left @ right^T for one right operand and many left ones, in the type that the hardware is fast at.

int16 is what `train.kernels.cpu.int16` does on a CPU: its results are float32. int8 names the 8-bit screen of
`train.kernels.cpu.screen`, which finds the k largest of a float32 product; where every result is wanted, it stands for
int16, which the same processors have. Every other type is torch's product, whose results are of that type.

Shapes: n rows of the left operand, m of the right, d depth.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def times(right: Tensor, dtype: torch.dtype) -> Callable[..., Tensor]:
    """`product(left, out=None)` [n, d] -> [n, m] with `right` [m, d], both made `dtype`; `out` is of `result_dtype`."""
    if int16_products(dtype):
        from train.kernels.cpu.int16 import Int16Product  # here: loading numba takes half a second

        return Int16Product(right)
    transposed = right.to(dtype).t()
    return lambda left, out=None: torch.mm(left.to(dtype), transposed, out=out)


def int16_products(dtype: torch.dtype) -> bool:
    """Whether products of type `dtype` are those of `train.kernels.cpu.int16`."""
    return dtype in (torch.int16, torch.int8)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the results of products of type `dtype`."""
    return torch.float32 if int16_products(dtype) else dtype
