"""Choosing the k largest of each row on a CPU: passes tensors to the loops of `train.kernels.cpu.topk_loops`.

Shapes: N rows, M n_latents, k active latents per row.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.kernels.cpu import topk_loops as loops
from train.kernels.cpu.compiling import even_chunks, run_chunks
from train.kernels.interface import SparseCodes

_KEYS = {
    torch.bfloat16: (torch.int16, torch.int32, 0x7F80),
    torch.float32: (torch.int32, torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, torch.int64, 0x7FF0_0000_0000_0000),
}
"""Type of pre-activations -> integers of its width, integers of the values' width, the bits of +inf."""

CHUNK = 2**17
"""Least numbers that a chunk reads: some tens of microseconds of work."""


def topk_relu(z: Tensor, k: int) -> SparseCodes:
    """As `Kernels.topk_relu`; values are float32, or float64 for float64. Equal entries are ordered by latent."""
    key_type, value_type, infinity = _keys(z)
    if z.dim() != 2 or not 1 <= k <= z.shape[1]:
        raise ValueError(f"z {list(z.shape)}, k {k}: expected a matrix [N, M] and 1 <= k <= M")
    n, m = z.shape
    bits = z.detach().contiguous().view(key_type)
    values = torch.empty(n, k, dtype=value_type)
    indices = torch.empty(n, k, dtype=torch.int64)
    borders = even_chunks(n, 1 + CHUNK // m)
    run_chunks(loops.topk_rows, borders, array_of(bits, "z", n, m), k, infinity, values.numpy(), indices.numpy())
    return SparseCodes(values.view(torch.float64 if value_type == torch.int64 else torch.float32), indices)


def keep_largest(z: Tensor, k: int) -> Tensor:
    """As `Kernels.keep_largest`, in place; of equal entries the lowest latents stay."""
    key_type, _, infinity = _keys(z)
    if z.dim() != 2 or k < 1:
        raise ValueError(f"z {list(z.shape)}, k {k}: expected a matrix [N, M] and k of at least 1")
    n, m = z.shape
    if k >= m:
        return z.relu_()
    bits = array_of(z.view(key_type), "z", n, m, written=True)
    run_chunks(loops.keep_rows, even_chunks(n, 1 + CHUNK // (8 * m)), bits, k, infinity, bits)
    return z


def _keys(z: Tensor) -> tuple[torch.dtype, torch.dtype, int]:
    if z.dtype not in _KEYS:
        raise TypeError(f"z: expected bfloat16, float32 or float64, found {z.dtype}; convert it first")
    return _KEYS[z.dtype]


def array_of(
    tensor: Tensor, name: str, *shape: int, like: Tensor | None = None, written: bool = False
) -> np.ndarray[Any, Any]:
    """The tensor's memory for a loop, after checking that it has this shape and the type of `like`, on the CPU.

    A tensor that is only read may have any strides and is copied if necessary; one that is written must be contiguous.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor on the CPU, found one on {tensor.device}; choose other kernels")
    if like is not None and tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} like the others, found {tensor.dtype}")
    if written and not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous memory, found strides {tensor.stride()}; it is written in place")
    return tensor.detach().contiguous().numpy()
