"""The sparse pieces of a training step, compiled for CPUs.

Arguments and results are tensors; inside, the loops of `train.kernels.cpu.topk_loops` and
`train.kernels.cpu.sparse_loops` work on their memory without a copy, on as many threads as torch uses. All that is read
or written is checked first, latent indices included, because the loops check nothing. The first use compiles (some
seconds, once: see `train.kernels.cpu.compiling` for the cache).

Fusing gradients with the optimiser, so that no [M, D] gradient is stored, gained nothing when measured.

Shapes: N rows of a batch, D d_model, M n_latents, k active latents per row.
"""

from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from train.kernels.cpu import sparse_loops as loops
from train.kernels.cpu.compiling import even_chunks, run_chunks
from train.kernels.cpu.screen import Screen
from train.kernels.cpu.selection import CHUNK, array_of, keep_largest, topk_relu
from train.kernels.interface import AdamStep, Kernels, Reconstruction, SparseCodes, TopK, WeightGradients


@final
class CpuKernels(Kernels):
    """The interface, compiled by numba."""

    name = "numba"

    def topk_relu(self, z: Tensor, k: int) -> SparseCodes:
        return topk_relu(z, k)

    def keep_largest(self, z: Tensor, k: int) -> Tensor:
        return keep_largest(z, k)

    def screen(self, W_enc: Tensor, k: int) -> TopK | None:
        return Screen(W_enc).topk_relu if Screen.fits(W_enc, k) else None

    def decode(self, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        (n, k), (m, d) = values.shape, W_dec.shape
        out = W_dec.new_empty(n, d)
        inputs = (
            array_of(values, "values", n, k, like=W_dec),
            _latents(indices, n, k, m),
            array_of(W_dec, "W_dec", m, d),
        )
        run_chunks(loops.decode_rows, even_chunks(n, 1 + CHUNK // (k * d)), *inputs, out.numpy())
        return out

    def activation_gradient(self, grad_out: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        (n, k), (m, d) = indices.shape, W_dec.shape
        out, rows = W_dec.new_empty(n, k), array_of(grad_out, "grad_out", n, d, like=W_dec)
        inputs = rows, _latents(indices, n, k, m), array_of(W_dec, "W_dec", m, d)
        run_chunks(loops.gradient_rows, even_chunks(n, 1 + CHUNK // (k * d)), *inputs, out.numpy())
        return out

    def reconstruct(self, codes: SparseCodes, W_dec: Tensor, target: Tensor, weight: Tensor) -> Reconstruction:
        (n, k), (m, d) = codes.values.shape, W_dec.shape
        values, indices = array_of(codes.values, "values", n, k, like=W_dec), _latents(codes.indices, n, k, m)
        targets, weights = array_of(target, "target", n, d, like=W_dec), array_of(weight, "weight", n, like=W_dec)
        inputs = values, indices, array_of(W_dec, "W_dec", m, d), targets, weights
        out = Reconstruction(*(W_dec.new_empty(shape) for shape in ((n, d), (n, d), (n,), (n, k))))
        outputs = (tensor.numpy() for tensor in out)
        run_chunks(loops.reconstruct_rows, even_chunks(n, 1 + CHUNK // (k * d)), *inputs, *outputs)
        return out

    def weight_gradients(
        self, codes: SparseCodes, value_grads: Tensor, grad_out: Tensor, centred: Tensor, out: WeightGradients
    ) -> WeightGradients:
        (values, indices), (n_latents, d) = codes, out.W_enc.shape
        n, k = indices.shape
        starts, order = np.empty(n_latents + 1, np.int64), np.empty(n * k, np.int64)
        pairs = array_of(values, "coefficients", n, k), array_of(value_grads, "coefficients", n, k, like=values)
        loops.sort_pairs(_latents(indices, n, k, n_latents).ravel(), *(part.ravel() for part in pairs), starts, order)
        # Work is counted as 1 for a pair, whose row is added, and 2 for a latent, whose sum is written.
        work = starts + 2 * np.arange(n_latents + 1)
        borders = even_chunks(int(work[-1]), CHUNK // 512)
        borders[1:-1] = np.searchsorted(work, borders[1:-1]).tolist()
        borders[-1] = n_latents
        for coefficients, rows, weight, sums in (
            (value_grads, centred, out.W_enc, out.latent_sums),
            (values, grad_out, out.W_dec, torch.empty_like(out.latent_sums)),
        ):
            read = array_of(coefficients, "coefficients", n, k, like=rows).ravel(), array_of(rows, "rows", n, d)
            written = (
                array_of(weight, "out", n_latents, d, like=rows, written=True),
                array_of(sums, "sums", n_latents, like=rows, written=True),
            )
            run_chunks(loops.weight_rows, borders, starts, order, k, *read, *written)
        return out

    def adam_rows(self, weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, how: AdamStep) -> None:
        m, d = weight.shape
        numbers = (float(how.grad_scale), how.step_size, *how.betas, how.correction, how.EPSILON)
        columns = weight.new_empty(0) if how.columns is None else how.columns
        named = {"weight": weight, "grad": grad, "exp_avg": exp_avg}
        arrays = [array_of(t, name, m, d, like=weight, written=name != "grad") for name, t in named.items()]
        arrays.append(array_of(exp_avg_sq, "exp_avg_sq", m, 1 if len(columns) else d, like=weight, written=True))
        arrays.append(array_of(columns, "columns", d if len(columns) else 0, like=weight))
        run_chunks(loops.adam_rows, even_chunks(m, 1 + CHUNK // (4 * d)), *arrays, *numbers, how.unit_rows)


def _latents(indices: Tensor, n: int, k: int, n_latents: int) -> np.ndarray[Any, Any]:
    """The memory of `indices` [N, k], after checking that every entry is a latent."""
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected int64, found {indices.dtype}")
    if indices.numel():
        low, high = indices.aminmax()
        if low < 0 or high >= n_latents:
            raise IndexError(f"indices: expected latents 0 to {n_latents - 1}, found {int(low)} to {int(high)}")
    return array_of(indices, "indices", n, k)


NUMBA = CpuKernels()
