"""The sparse pieces of a training step for CUDA, in Triton: `train.kernels.interface`.

The programs are in `train.kernels.cuda.row_programs`. The fixed order of all sums costs only a stable sort of the N * k
latent indices. The first use compiles (seconds, once: Triton caches its code in ~/.triton).

With TRITON_INTERPRET=1 in the environment before the import the programs run on the CPU, slowly, for tests.

Block sizes are reasoned, not tuned; their speed on an H200: benchmarks/results/2026-11-29-gpu.md. Not here: the
encoder's product, which is torch's.

Shapes: N rows of a batch, D d_model, M n_latents, k active latents per row, P = N * k pairs.
"""
# Launches take more than a program's own parameters:
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any, final

import torch
import triton
from torch import Tensor

from train.kernels.cuda import row_programs
from train.kernels.interface import AdamStep, Kernels, Reconstruction, SparseCodes, WeightGradients
from train.kernels.plain import TORCH

_CANDIDATES = 4096  # most entries of a row that are candidates: k groups
_GROUPS = 16384  # most groups of a row; a program holds all their maxima
_CHUNK = 64  # sorted pairs that a program adds up
_PIECE = 1024  # numbers that a program of the optimiser updates, if it does not need a whole row


@final
class CudaKernels(Kernels):
    """The interface, compiled by Triton."""

    name = "triton"
    pair_bytes = 16 / _CHUNK  # sums of each chunk's first and last latent, for both weights

    def topk_relu(self, z: Tensor, k: int) -> SparseCodes:
        """One pass over z, then one over the k groups that can hold the largest; torch's own if k is so large
        (thousands) that these would not fit a program, and in float64."""
        n, m = z.shape
        group = _group_size(m, k)
        if group is None or z.dtype == torch.float64:
            values, indices = torch.topk(z, k, dim=-1, sorted=True)
            return SparseCodes(values.to(torch.float64 if z.dtype == torch.float64 else torch.float32).relu_(), indices)
        z = z.contiguous()
        n_groups = -(-m // group)
        maxima = torch.empty(n, n_groups, dtype=torch.int32, device=z.device)
        block = min(64, triton.next_power_of_2(n_groups))
        row_programs.group_maxima[(n, -(-n_groups // block))](z, maxima, m, n_groups, GROUP=group, BLOCK=block)
        values = torch.empty(n, k, dtype=torch.float32, device=z.device)
        indices = torch.empty(n, k, dtype=torch.int64, device=z.device)
        width = triton.next_power_of_2(k)
        chosen = torch.empty(n, width, dtype=torch.int32, device=z.device)
        winners = torch.empty(n, 2, width, dtype=torch.int32, device=z.device)
        memory = (z, maxima, chosen, winners, values, indices)
        sizes = {"GROUP": group, "GROUPS": triton.next_power_of_2(n_groups), "K": width}
        lowest_bit = 16 if z.dtype == torch.bfloat16 else 0
        row_programs.select[(n,)](*memory, m, n_groups, k, **sizes, LOWEST_BIT=lowest_bit, num_warps=8)
        return SparseCodes(values, indices)

    def keep_largest(self, z: Tensor, k: int) -> Tensor:
        return TORCH.keep_largest(z, k)

    def decode(self, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        (n, k), d = values.shape, W_dec.shape[1]
        out = W_dec.new_empty(n, d)
        inputs = (t.contiguous() for t in (values, indices, W_dec))
        row_programs.decode[(n,)](*inputs, out, k, d, **_row_block(d))
        return out

    def activation_gradient(self, grad_out: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        (n, k), d = indices.shape, W_dec.shape[1]
        out = W_dec.new_empty(n, k)
        inputs = (t.contiguous() for t in (grad_out, indices, W_dec))
        row_programs.activation_gradient[(n,)](*inputs, out, k, d, **_row_block(d))
        return out

    def reconstruct(self, codes: SparseCodes, W_dec: Tensor, target: Tensor, weight: Tensor) -> Reconstruction:
        (n, k), d = codes.values.shape, W_dec.shape[1]
        out = Reconstruction(*(W_dec.new_empty(shape) for shape in ((n, d), (n, d), (n,), (n, k))))
        inputs = (t.contiguous() for t in (*codes, W_dec, target, weight))
        row_programs.reconstruct[(n,)](*inputs, *out, k, d, **_row_block(d))
        return out

    def weight_gradients(
        self, codes: SparseCodes, value_grads: Tensor, grad_out: Tensor, centred: Tensor, out: WeightGradients
    ) -> WeightGradients:
        """Cuts the sorted pairs into chunks of equal length, so that no program has all of a latent that is active
        everywhere; a second program adds up, in order, the latents whose pairs lie in several chunks."""
        (values, indices), (n_latents, d) = codes, out.W_enc.shape
        pairs, k = indices.numel(), indices.shape[1]
        number = torch.int32 if max(pairs, n_latents) < 2**31 else torch.int64
        latent, order = torch.sort(indices.flatten().to(number), stable=True)
        starts = torch.searchsorted(latent, torch.arange(n_latents + 1, device=latent.device, dtype=number))
        n_chunks = -(-pairs // _CHUNK)
        parts = grad_out.new_empty(2, n_chunks, 2, d)  # of W_enc and W_dec; of each chunk's first and last latent
        sum_parts = grad_out.new_empty(n_chunks, 2)
        block = min(512, triton.next_power_of_2(d))
        grid_d = -(-d // block)
        inputs = (value_grads, values, latent, order, starts, centred, grad_out)
        memory = (*(t.contiguous() for t in inputs), *out, *parts, sum_parts)
        row_programs.chunk_sums[(n_chunks, grid_d)](*memory, pairs, k, d, CHUNK=_CHUNK, BLOCK=block)
        row_programs.join_chunks[(n_latents, grid_d)](starts, *out, *parts, sum_parts, d, CHUNK=_CHUNK, BLOCK=block)
        return out

    def adam_rows(self, weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, how: AdamStep) -> None:
        for name, tensor in (("weight", weight), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            if not tensor.is_contiguous():
                raise ValueError(f"{name}: expected contiguous memory; it is written in place")
        # If rows do not matter, the numbers are cut into pieces of a suitable size: a bias is one row of M numbers.
        by_row = how.columns is not None
        d = weight.shape[1] if how.unit_rows or by_row else min(weight.numel(), _PIECE)
        beta1, beta2 = how.betas
        numbers = (how.grad_scale, how.step_size, 1 - beta1, beta2, 1 - beta2, how.correction, how.EPSILON)
        # Passed in memory, because arguments are rounded to float32.
        memory = (weight, grad.contiguous(), exp_avg, exp_avg_sq, weight if how.columns is None else how.columns)
        numbers, size = weight.new_tensor(numbers, dtype=torch.float64), weight.numel()
        kind = {"UNIT_ROWS": how.unit_rows, "BY_ROW": by_row}
        row_programs.adam[(-(-size // d),)](*memory, numbers, d, size, **kind, **_row_block(d))


def _group_size(m: int, k: int) -> int | None:
    """Latents per group: the most with at least k groups, of which k are few enough candidates; None if none fits."""
    for group in (64, 32, 16, 8):
        n_groups = -(-m // group)
        if triton.next_power_of_2(k) * group <= _CANDIDATES and k <= n_groups <= _GROUPS:
            return group
    return None


def _row_block(d: int) -> dict[str, Any]:
    """Sizes for a program that holds a whole row: a power of two, and enough warps that a thread has few numbers."""
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


TRITON = CudaKernels()
