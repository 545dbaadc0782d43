"""The sparse pieces of a training step in plain torch, on any device and in any float type.

The decoder gathers k rows of W_dec, and both weight gradients are sums of outer products over the N * k active (row,
latent) pairs. Sorted by latent, those sums are bags of rows, which `embedding_bag` adds in a fixed order: no [N, M]
gradient and no [N, k, D] temporary. Only `torch.topk` may choose differently among equal entries on another GPU or
version.

Shapes: N rows of a batch, D d_model, M n_latents, k active latents per row.
"""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from train.kernels.interface import AdamStep, Kernels, Reconstruction, SparseCodes, WeightGradients

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

    def decode(self, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")

    def activation_gradient(self, grad_out: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        """Gathers decoder rows for a few rows of the batch at a time, so that they stay in the cache."""
        n, k = indices.shape
        out = grad_out.new_empty(n, k)
        budget = _CUDA_GATHER_BYTES if grad_out.is_cuda else _CPU_GATHER_BYTES
        rows = max(1, budget // (k * W_dec.shape[1] * W_dec.element_size()))
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            gathered = W_dec.index_select(0, indices[part].flatten()).view(-1, k, W_dec.shape[1])
            out[part] = gathered.mul_(grad_out[part].unsqueeze(1)).sum(dim=-1)
        return out

    def reconstruct(self, codes: SparseCodes, W_dec: Tensor, target: Tensor, weight: Tensor) -> Reconstruction:
        error = target - self.decode(*codes, W_dec)
        grad_out = error * (-2 * weight).unsqueeze(1)
        value_grads = self.activation_gradient(grad_out, codes.indices, W_dec).masked_fill_(codes.values <= 0, 0)
        return Reconstruction(error, grad_out, error.square().sum(dim=1), value_grads)

    def weight_gradients(
        self, codes: SparseCodes, value_grads: Tensor, grad_out: Tensor, centred: Tensor, out: WeightGradients
    ) -> WeightGradients:
        """`out` is not used here."""
        ordered, order = torch.sort(codes.indices.flatten(), stable=True)  # within a latent, by row
        starts = torch.searchsorted(ordered, torch.arange(len(out.W_enc), device=ordered.device))
        row = order // codes.indices.shape[1]

        def sum_rows(coefficients: Tensor, rows: Tensor) -> Tensor:
            """For each latent, the sum of coefficients[n, k] * rows[n] over its pairs: [N, k], [N, D] -> [M, D]."""
            weights = coefficients.flatten()[order]
            return F.embedding_bag(row, rows, starts, per_sample_weights=weights, mode="sum")

        latent_sums = sum_rows(value_grads, centred.new_ones(len(centred), 1)).squeeze(-1)
        return WeightGradients(sum_rows(value_grads, centred), sum_rows(codes.values, grad_out), latent_sums)

    def adam_rows(self, weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, how: AdamStep) -> None:
        beta1, beta2 = how.betas
        if how.grad_scale != 1:
            grad.mul_(how.grad_scale)
        if how.unit_rows:
            grad.addcmul_((grad * weight).sum(dim=1, keepdim=True), weight, value=-1)
        exp_avg.lerp_(grad, 1 - beta1)
        if how.columns is None:
            root = exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2).sqrt()
        else:
            squares = (grad / how.columns).square().mean(dim=1, keepdim=True)
            root = exp_avg_sq.lerp_(squares, 1 - beta2).sqrt() * how.columns
        weight.addcdiv_(exp_avg, root.div_(how.correction).add_(how.EPSILON), value=-how.step_size)
        if how.unit_rows:
            weight.div_(weight.norm(dim=1, keepdim=True))


TORCH = PlainKernels()
