"""The sparse pieces of a training step, in plain torch; they run on any device and in any float type.

A TopK autoencoder's codes have k entries a row, so everything after the encoder's product is sparse: the decoder
gathers k rows of W_dec, and both weight gradients are sums of outer products over the N * k active (row, latent)
pairs. Sorted by latent, those sums are bags of rows, which `embedding_bag` adds in a fixed order: no [N, M] gradient,
no [N, k, D] temporary, and the same bits every time.

The same bits on CUDA too: `embedding_bag` and a stable sort add nothing atomically; only `torch.topk` may choose
differently among equal entries on another card or version.

Not here: the order of a step (`train.objective.step`), losses (`train.objective.losses`), and the compiled versions of
the same functions, for CPUs (`train.kernels.cpu.backend`) and CUDA (`train.kernels.cuda.backend`), which
`choose_kernels` prefers where they apply.

Shapes: N rows of a batch, D d_model, M n_latents, k active latents a row.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from residscope.errors import UsageError
from residscope.memory import keep_freed_memory

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 6.25e-10
"""Gao et al. 2024, appendix A.1; small, because gradients of single latents are."""


class SparseCodes(NamedTuple):
    """The k largest pre-activations of each row, after ReLU."""

    values: Tensor
    """[N, k], >= 0; zero where the pre-activation was not positive."""

    indices: Tensor
    """int64 [N, k], which latent; distinct within a row."""


class Reconstruction(NamedTuple):
    """What the decoder and the main loss give of a batch."""

    error: Tensor
    """[N, D] target - decoded."""

    grad_out: Tensor
    """[N, D] d loss / d decoded = -2 * weight * error."""

    squared: Tensor
    """[N] |error|^2."""

    value_grads: Tensor
    """[N, k] d loss / d z of the active pairs: <grad_out, decoder row>, zero where the value is not positive."""


class WeightGradients(NamedTuple):
    """What one pass over the active (row, latent) pairs, sorted by latent, gives."""

    W_enc: Tensor
    """[M, D]: sum over a latent's pairs of d loss / d z times the centred input."""

    W_dec: Tensor
    """[M, D]: sum over a latent's pairs of the activation times d loss / d x_hat."""

    latent_sums: Tensor
    """[M]: sum over a latent's pairs of d loss / d z; `-latent_sums @ W_enc` is the centring's gradient of b_pre."""


def topk_relu(z: Tensor, k: int) -> SparseCodes:
    """The k largest entries of each row of `z` [N, M], exactly, largest first, then ReLU (Gao et al. 2024, 2.3)."""
    values, indices = torch.topk(z, k, dim=-1, sorted=True)
    return SparseCodes(values.relu_(), indices)


def keep_largest(z: Tensor, k: int) -> Tensor:
    """ReLU of `z` [N, M] with all but the k largest entries of each row set to zero; may be done in place."""
    if k >= z.shape[1]:
        return z.relu_()
    values, indices = torch.topk(z, k, dim=-1, sorted=False)
    return z.zero_().scatter_(1, indices, values.relu_())


def decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """sum_k values[n, k] * W_dec[indices[n, k]]: [N, k], [N, k], [M, D] -> [N, D]."""
    return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")


def activation_gradient(grad_out: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """<grad_out[n], W_dec[indices[n, k]]>: [N, D], [N, k], [M, D] -> [N, k].

    The gathered rows are made a few rows of the batch at a time, to stay in the cache instead of filling [N, k, D].
    """
    n, k = indices.shape
    out = grad_out.new_empty(n, k)
    budget = _CUDA_GATHER_BYTES if grad_out.is_cuda else _CPU_GATHER_BYTES
    rows = max(1, budget // (k * W_dec.shape[1] * W_dec.element_size()))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        gathered = W_dec.index_select(0, indices[part].flatten()).view(-1, k, W_dec.shape[1])
        out[part] = gathered.mul_(grad_out[part].unsqueeze(1)).sum(dim=-1)
    return out


_CPU_GATHER_BYTES = 2**20  # a core's own cache
_CUDA_GATHER_BYTES = 2**28  # enough to fill the device


def reconstruct(values: Tensor, indices: Tensor, W_dec: Tensor, target: Tensor, weight: Tensor) -> Reconstruction:
    """Decode, and take the loss sum_n weight[n] |target[n] - decoded[n]|^2 back to the pre-activations.

    values, indices [N, k]; W_dec [M, D]; target [N, D], without b_pre; weight [N].
    """
    error = target - decode(values, indices, W_dec)
    grad_out = error * (-2 * weight).unsqueeze(1)
    value_grads = activation_gradient(grad_out, indices, W_dec).masked_fill_(values <= 0, 0)
    return Reconstruction(error, grad_out, error.square().sum(dim=1), value_grads)


def weight_gradient(coefficients: Tensor, indices: Tensor, rows: Tensor, n_latents: int) -> Tensor:
    """For each latent, the sum of coefficients[n, k] * rows[n] over its pairs: [N, k], [N, k], [N, D] -> [M, D]."""
    return _PairOrder.of(indices, n_latents).sum_rows(coefficients, rows)


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
    [N, k]; grad_out [N, D] d loss / d x_hat; centred [N, D] the encoder's input x_std - b_pre. `out` is memory that an
    implementation may overwrite and return; this one has no use for it.
    """
    order = _PairOrder.of(indices, n_latents)
    ones = centred.new_ones(len(centred), 1)
    return WeightGradients(
        W_enc=order.sum_rows(value_grads, centred),
        W_dec=order.sum_rows(values, grad_out),
        latent_sums=order.sum_rows(value_grads, ones).squeeze(-1),
    )


class _PairOrder(NamedTuple):
    """The N * k (row, latent) pairs sorted by latent; within a latent, by row, so that sums have one fixed order."""

    order: Tensor
    """int64 [N * k], positions in the flattened [N, k] arrays."""

    row: Tensor
    """int64 [N * k], the batch row of each sorted pair."""

    starts: Tensor
    """int64 [M], where each latent's pairs start."""

    @classmethod
    def of(cls, indices: Tensor, n_latents: int) -> "_PairOrder":
        ordered, order = torch.sort(indices.flatten(), stable=True)
        starts = torch.searchsorted(ordered, torch.arange(n_latents, device=indices.device))
        return cls(order, order // indices.shape[1], starts)

    def sum_rows(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        weights = coefficients.flatten()[self.order]
        return F.embedding_bag(self.row, rows, self.starts, per_sample_weights=weights, mode="sum")


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
    """One Adam step (Kingma & Ba 2015) on `weight` [M, D], in place; `step` counts from 1; `grad` is used up.

    With `unit_rows`, the component of each row's gradient along the row is removed before the step and the row is
    brought back to unit norm after it (Gao et al. 2024, appendix A.3), so what is saved is always on the sphere.
    `grad_scale` multiplies the gradient first, as clipping by norm needs. A few rows at a time on a CPU, so that the
    five passes over them find them in the cache.
    """
    beta1, beta2 = ADAM_BETAS
    step_size = lr / (1 - beta1**step)
    correction = math.sqrt(1 - beta2**step)
    rows = len(weight) if weight.is_cuda else max(1, _CPU_GATHER_BYTES // (4 * weight.shape[1] * weight.element_size()))
    for start in range(0, len(weight), rows):
        w, g, m, v = (t[start : start + rows] for t in (weight, grad, exp_avg, exp_avg_sq))
        if grad_scale != 1:
            g.mul_(grad_scale)
        if unit_rows:
            g.addcmul_((g * w).sum(dim=1, keepdim=True), w, value=-1)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = v.sqrt().div_(correction).add_(ADAM_EPSILON)
        w.addcdiv_(m, denominator, value=-step_size)
        if unit_rows:
            w.div_(w.norm(dim=1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One implementation of the functions above; `choose_kernels` picks it once a run."""

    name: str
    """torch, numba or triton; recorded in checkpoints, because two implementations need not round alike."""

    topk_relu: Callable[[Tensor, int], SparseCodes]
    decode: Callable[[Tensor, Tensor, Tensor], Tensor]
    activation_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight_gradients: Callable[..., WeightGradients]
    adam_rows: Callable[..., None]
    reconstruct: Callable[..., Any] = reconstruct
    keep_largest: Callable[[Tensor, int], Tensor] = keep_largest


TORCH = Kernels(
    name="torch",
    topk_relu=topk_relu,
    decode=decode,
    activation_gradient=activation_gradient,
    weight_gradients=weight_gradients,
    adam_rows=adam_rows,
)


def choose_kernels(like: Tensor, name: str = "auto") -> Kernels:
    """The kernels for tensors of the type and on the device of `like`.

    "auto": the compiled ones where they apply (float32 or float64; numba on a CPU, Triton on CUDA, installed), else
    plain torch; "torch", "numba" and "triton" insist. Raises `UsageError` where what is insisted on cannot be had.
    """
    if like.device.type == "cpu":
        keep_freed_memory()  # What follows is step after step of the same temporaries.
    compiled = {"cpu": "numba", "cuda": "triton"}.get(like.device.type)
    applies = like.dtype in (torch.float32, torch.float64)
    if name == "auto":
        name = compiled if applies and compiled is not None and _installed(compiled) else "torch"
    if name == "torch":
        return TORCH
    if name != compiled or not applies:
        kind = "a CPU" if name == "numba" else "CUDA"
        raise UsageError(f"{name} kernels run on {kind}, in float32 or float64; found {like.device}, {like.dtype}")
    if not _installed(name):
        raise UsageError(f"{name} is not installed: `pip install {name}`, or choose the torch kernels")
    # Here, because loading either takes half a second.
    if name == "numba":
        from train.kernels.cpu import backend as kernels_numba

        return kernels_numba.NUMBA
    from train.kernels.cuda import backend as kernels_triton

    return kernels_triton.TRITON


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
