"""The sparse pieces of a training step, compiled for CPUs: the same functions as `train.kernels.interface`.

Tensors go in and come out; inside, the loops of `train.kernels.cpu.topk_loops` and `train.kernels.cpu.sparse_loops`
work on their memory without a copy, on as many threads as torch uses, with the same bits for any number of threads.
Everything that is read or written is checked here first, latent numbers included, because the loops check nothing.

`reconstruct` does decoder, error and gradients of a row while its k decoder rows are in the core's cache, which saves
gathering them twice and the temporaries between.

NaN is not hidden: `topk_relu` takes it for the largest, as torch does, and everything else lets it through. First use
compiles (some seconds, once: see `train.kernels.cpu.compiling` for the cache).

Not here: gradients fused with the optimiser, so that no [M, D] gradient is stored; measured, it gained nothing.

Shapes: N rows of a batch, D d_model, M n_latents, k active latents a row.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.kernels.cpu import sparse_loops as kernels_sparse
from train.kernels.cpu import topk_loops as kernels_topk
from train.kernels.cpu.compiling import even_chunks, run_chunks
from train.kernels.interface import ADAM_BETAS, ADAM_EPSILON, Kernels, Reconstruction, SparseCodes, WeightGradients

_KEYS = {
    torch.bfloat16: (torch.int16, torch.int32, 0x7F80),
    torch.float32: (torch.int32, torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, torch.int64, 0x7FF0_0000_0000_0000),
}
"""Type of pre-activations -> integers of its width, integers of the values' width, the bits of +inf."""

_CHUNK = 2**17  # numbers that a chunk reads at least, some tens of microseconds of work


def topk_relu(z: Tensor, k: int) -> SparseCodes:
    """The k largest entries of each row of `z` [N, M], exactly, then ReLU (Gao et al. 2024, 2.3).

    `z` is bfloat16, float32 or float64; values are float32, or float64 for float64. Largest first; of equal entries the
    lowest latent, both in what is taken and in its order. NaN counts as the largest and stays NaN.
    """
    if z.dtype not in _KEYS:
        raise TypeError(f"z: expected bfloat16, float32 or float64, found {z.dtype}; convert it first")
    if z.dim() != 2 or not 1 <= k <= z.shape[1]:
        raise ValueError(f"z {list(z.shape)}, k {k}: expected a matrix [N, M] and 1 <= k <= M")
    n, m = z.shape
    key_type, value_type, infinity = _KEYS[z.dtype]
    bits = z.detach().contiguous().view(key_type)
    values = torch.empty(n, k, dtype=value_type)
    indices = torch.empty(n, k, dtype=torch.int64)
    borders = even_chunks(n, 1 + _CHUNK // m)
    run_chunks(kernels_topk.topk_rows, borders, _array(bits, "z", n, m), k, infinity, values.numpy(), indices.numpy())
    return SparseCodes(values.view(torch.float64 if value_type == torch.int64 else torch.float32), indices)


def keep_largest(z: Tensor, k: int) -> Tensor:
    """ReLU of `z` [N, M] with all but the k largest entries of each row set to zero, in place.

    Of equal entries the lowest latents stay; NaN counts as the largest and stays NaN. For k a large share of M, where
    sorted codes cost more than they save.
    """
    if z.dtype not in _KEYS:
        raise TypeError(f"z: expected bfloat16, float32 or float64, found {z.dtype}; convert it first")
    if z.dim() != 2 or k < 1:
        raise ValueError(f"z {list(z.shape)}, k {k}: expected a matrix [N, M] and k of at least 1")
    n, m = z.shape
    if k >= m:
        return z.relu_()
    key_type, _, infinity = _KEYS[z.dtype]
    bits = _array(z.view(key_type), "z", n, m, written=True)
    run_chunks(kernels_topk.keep_rows, even_chunks(n, 1 + _CHUNK // (8 * m)), bits, k, infinity, bits)
    return z


def decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """sum_k values[n, k] * W_dec[indices[n, k]]: [N, k], [N, k], [M, D] -> [N, D]."""
    (n, k), (m, d) = values.shape, W_dec.shape
    out = W_dec.new_empty(n, d)
    run_chunks(
        kernels_sparse.decode_rows,
        even_chunks(n, 1 + _CHUNK // (k * d)),
        _array(values, "values", n, k, like=W_dec),
        _latents(indices, n, k, m),
        _array(W_dec, "W_dec", m, d),
        out.numpy(),
    )
    return out


def activation_gradient(grad_out: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """<grad_out[n], W_dec[indices[n, k]]>: [N, D], [N, k], [M, D] -> [N, k]."""
    (n, k), (m, d) = indices.shape, W_dec.shape
    out = W_dec.new_empty(n, k)
    run_chunks(
        kernels_sparse.gradient_rows,
        even_chunks(n, 1 + _CHUNK // (k * d)),
        _array(grad_out, "grad_out", n, d, like=W_dec),
        _latents(indices, n, k, m),
        _array(W_dec, "W_dec", m, d),
        out.numpy(),
    )
    return out


def reconstruct(values: Tensor, indices: Tensor, W_dec: Tensor, target: Tensor, weight: Tensor) -> Reconstruction:
    """Decode, and take the loss sum_n weight[n] |target[n] - decoded[n]|^2 back to the pre-activations, in one pass.

    values, indices [N, k]; W_dec [M, D]; target [N, D], without b_pre; weight [N].
    """
    (n, k), (m, d) = values.shape, W_dec.shape
    out = Reconstruction(
        error=W_dec.new_empty(n, d),
        grad_out=W_dec.new_empty(n, d),
        squared=W_dec.new_empty(n),
        value_grads=W_dec.new_empty(n, k),
    )
    run_chunks(
        kernels_sparse.reconstruct_rows,
        even_chunks(n, 1 + _CHUNK // (k * d)),
        _array(values, "values", n, k, like=W_dec),
        _latents(indices, n, k, m),
        _array(W_dec, "W_dec", m, d),
        _array(target, "target", n, d, like=W_dec),
        _array(weight, "weight", n, like=W_dec),
        *(tensor.numpy() for tensor in out),
    )
    return out


def weight_gradient(coefficients: Tensor, indices: Tensor, rows: Tensor, n_latents: int) -> Tensor:
    """For each latent, the sum of coefficients[n, k] * rows[n] over its pairs: [N, k], [N, k], [N, D] -> [M, D].

    Pairs whose coefficient is zero are skipped; a latent without pairs has a row of zeros.
    """
    out = rows.new_empty(n_latents, rows.shape[1])
    _Pairs(indices, coefficients, coefficients, n_latents).sum_rows(coefficients, rows, out, rows.new_empty(n_latents))
    return out


def weight_gradients(
    values: Tensor,
    value_grads: Tensor,
    indices: Tensor,
    grad_out: Tensor,
    centred: Tensor,
    n_latents: int,
    *,
    out: WeightGradients | None = None,
) -> WeightGradients:
    """Both weight gradients from one sort of the pairs.

    values [N, k] activations; value_grads [N, k] d loss / d z of the active pairs (zero where ReLU cut); indices
    [N, k]; grad_out [N, D] d loss / d x_hat; centred [N, D] the encoder's input x_std - b_pre. `out` is overwritten and
    returned: with large dictionaries, fresh memory for every step costs as much as the sums.
    """
    pairs = _Pairs(indices, values, value_grads, n_latents)
    if out is None:
        shape = (n_latents, grad_out.shape[1])
        out = WeightGradients(grad_out.new_empty(shape), grad_out.new_empty(shape), grad_out.new_empty(n_latents))
    pairs.sum_rows(value_grads, centred, out.W_enc, out.latent_sums)
    pairs.sum_rows(values, grad_out, out.W_dec, torch.empty_like(out.latent_sums))
    return out


class _Pairs:
    """The (row, latent) pairs of a batch in the order of their latents."""

    def __init__(self, indices: Tensor, first: Tensor, second: Tensor, n_latents: int) -> None:
        """Of the pairs for which either coefficient, `first` or `second` [N, k], is not zero."""
        self._n, self._k = indices.shape
        self._starts = np.empty(n_latents + 1, np.int64)
        self._order = np.empty(indices.numel(), np.int64)
        kernels_sparse.sort_pairs(
            _latents(indices, self._n, self._k, n_latents).ravel(),
            _array(first, "coefficients", self._n, self._k).ravel(),
            _array(second, "coefficients", self._n, self._k, like=first).ravel(),
            self._starts,
            self._order,
        )
        # Adding a row is most of a pair's work, writing the sum about twice that.
        work = self._starts + 2 * np.arange(n_latents + 1)
        self._borders = even_chunks(int(work[-1]), _CHUNK // 512)
        self._borders[1:-1] = np.searchsorted(work, self._borders[1:-1]).tolist()
        self._borders[-1] = n_latents

    def sum_rows(self, coefficients: Tensor, rows: Tensor, out: Tensor, sums: Tensor) -> None:
        """Write, for each latent, its sum of coefficient * rows[n] to out [M, D] and of coefficients to sums [M]."""
        m, d = len(self._starts) - 1, rows.shape[1]
        run_chunks(
            kernels_sparse.weight_rows,
            self._borders,
            self._starts,
            self._order,
            self._k,
            _array(coefficients, "coefficients", self._n, self._k, like=rows).ravel(),
            _array(rows, "rows", self._n, d),
            _array(out, "out", m, d, like=rows, written=True),
            _array(sums, "sums", m, like=rows, written=True),
        )


def adam_rows(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    step: int,
    unit_rows: bool,
    grad_scale: float = 1.0,
) -> None:
    """One Adam step (Kingma & Ba 2015) on `weight` [M, D], in place; `step` counts from 1; `grad` is left as it was.

    With `unit_rows`, the component of each row's gradient along the row is removed before the step and the row is
    brought back to unit norm after it (Gao et al. 2024, appendix A.3). `grad_scale` multiplies the gradient first, as
    clipping by norm needs.
    """
    m, d = weight.shape
    beta1, beta2 = ADAM_BETAS
    run_chunks(
        kernels_sparse.adam_rows,
        even_chunks(m, 1 + _CHUNK // (4 * d)),
        _array(weight, "weight", m, d, written=True),
        _array(grad, "grad", m, d, like=weight),
        _array(exp_avg, "exp_avg", m, d, like=weight, written=True),
        _array(exp_avg_sq, "exp_avg_sq", m, d, like=weight, written=True),
        float(grad_scale),
        lr / (1 - beta1**step),
        beta1,
        beta2,
        math.sqrt(1 - beta2**step),
        ADAM_EPSILON,
        unit_rows,
    )


def _array(
    tensor: Tensor, name: str, *shape: int, like: Tensor | None = None, written: bool = False
) -> np.ndarray[Any, Any]:
    """The tensor's memory for a loop, of this shape, on the CPU, and of the type of `like`.

    What is only read may have any strides and is copied if need be; what is written must be contiguous itself.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
    if tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: expected a tensor on the CPU, found one on {tensor.device}; use train.kernels.interface"
        )
    if like is not None and tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} like the others, found {tensor.dtype}")
    if written and not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous memory, found strides {tensor.stride()}; it is written in place")
    return tensor.detach().contiguous().numpy()


def _latents(indices: Tensor, n: int, k: int, n_latents: int) -> np.ndarray[Any, Any]:
    """The memory of `indices` [N, k] once every number is known to be a latent's."""
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected int64, found {indices.dtype}")
    if indices.numel():
        low, high = indices.aminmax()
        if low < 0 or high >= n_latents:
            raise IndexError(f"indices: expected latents 0 to {n_latents - 1}, found {int(low)} to {int(high)}")
    return _array(indices, "indices", n, k)


NUMBA = Kernels(
    name="numba",
    topk_relu=topk_relu,
    decode=decode,
    activation_gradient=activation_gradient,
    weight_gradients=weight_gradients,
    adam_rows=adam_rows,
    reconstruct=reconstruct,
    keep_largest=keep_largest,
)
"""The compiled kernels, for `train.kernels.interface.choose_kernels`."""
