"""The sparse pieces of a training step in plain torch, on any device and in any float type.

A TopK autoencoder's codes have k entries a row, so everything after the encoder's product is sparse: the decoder
gathers k rows of W_dec, and both weight gradients are sums of outer products over the N * k active (row, latent)
pairs. Sorted by latent, those sums are bags of rows, which `embedding_bag` adds in a fixed order: no [N, M] gradient,
no [N, k, D] temporary, and the same bits every time, on CUDA too. Only `torch.topk` may choose differently among equal
entries on another card or version.

Shapes: N rows of a batch, D d_model, M n_latents, k active latents a row.
"""

import math
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from train.kernels.interface import (
    ADAM_BETAS,
    ADAM_EPSILON,
    Kernels,
    Reconstruction,
    SparseCodes,
    TopK,
    WeightGradients,
)

_CPU_GATHER_BYTES = 2**20  # a core's own cache
_CUDA_GATHER_BYTES = 2**28  # enough to fill the device


@final
class PlainKernels(Kernels):
    """The interface in torch's own operations."""

    name = "torch"

    def topk_relu(self, z: Tensor, k: int) -> SparseCodes:
        values, indices = torch.topk(z, k, dim=-1, sorted=True)
        return SparseCodes(values.relu_(), indices)

    def keep_largest(self, z: Tensor, k: int) -> Tensor:
        if k >= z.shape[1]:
            return z.relu_()
        values, indices = torch.topk(z, k, dim=-1, sorted=False)
        return z.zero_().scatter_(1, indices, values.relu_())

    def screen(self, W_enc: Tensor, k: int) -> TopK | None:
        return None

    def decode(self, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")

    def activation_gradient(self, grad_out: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        """The gathered rows are made a few rows of the batch at a time, to stay in the cache."""
        n, k = indices.shape
        out = grad_out.new_empty(n, k)
        budget = _CUDA_GATHER_BYTES if grad_out.is_cuda else _CPU_GATHER_BYTES
        rows = max(1, budget // (k * W_dec.shape[1] * W_dec.element_size()))
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            gathered = W_dec.index_select(0, indices[part].flatten()).view(-1, k, W_dec.shape[1])
            out[part] = gathered.mul_(grad_out[part].unsqueeze(1)).sum(dim=-1)
        return out

    def reconstruct(
        self, values: Tensor, indices: Tensor, W_dec: Tensor, target: Tensor, weight: Tensor
    ) -> Reconstruction:
        error = target - self.decode(values, indices, W_dec)
        grad_out = error * (-2 * weight).unsqueeze(1)
        value_grads = self.activation_gradient(grad_out, indices, W_dec).masked_fill_(values <= 0, 0)
        return Reconstruction(error, grad_out, error.square().sum(dim=1), value_grads)

    def weight_gradients(
        self,
        values: Tensor,
        value_grads: Tensor,
        indices: Tensor,
        grad_out: Tensor,
        centred: Tensor,
        n_latents: int,
        *,
        out: WeightGradients | None = None,
    ) -> WeightGradients:
        """`out` is of no use here."""
        order = _PairOrder.of(indices, n_latents)
        ones = centred.new_ones(len(centred), 1)
        return WeightGradients(
            W_enc=order.sum_rows(value_grads, centred),
            W_dec=order.sum_rows(values, grad_out),
            latent_sums=order.sum_rows(value_grads, ones).squeeze(-1),
        )

    def adam_rows(
        self,
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
        """On a CPU a few rows at a time, so that the five passes over them find them in the cache."""
        beta1, beta2 = ADAM_BETAS
        step_size = lr / (1 - beta1**step)
        correction = math.sqrt(1 - beta2**step)
        cached = max(1, _CPU_GATHER_BYTES // (4 * weight.shape[1] * weight.element_size()))
        rows = len(weight) if weight.is_cuda else cached
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
        """For each latent, the sum of coefficients[n, k] * rows[n] over its pairs: [N, k], [N, D] -> [M, D]."""
        weights = coefficients.flatten()[self.order]
        return F.embedding_bag(self.row, rows, self.starts, per_sample_weights=weights, mode="sum")


TORCH = PlainKernels()
