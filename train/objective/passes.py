"""From codes to the loss and its gradients: three backward passes, of which each variant uses one.

    sparse_pass   codes that are chosen already; everything after that touches only the active pairs
    nested_pass   the same, if several partial sums of the codes must each reconstruct the vector
    dense_pass    each latent has its own threshold: any number may be active, so tiles of dense products

With c_n the row's weight, e = target - decoded, and G = d loss / d x_hat = -2 c e, an active pair's gradient is g = <G,
W_dec[j]>. AuxK and b_pre's gradient are the same for all (`train.objective.step`).

Shapes: N rows, n rows of a tile, D d_model, M n_latents, w the most active latents per row, B blocks.
Tested in test_variants.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from train.hardware import dense_dtype
from train.kernels.encode import tiles
from train.kernels.interface import Kernels, SparseCodes, WeightGradients
from train.objective.losses import FIRING_THRESHOLD
from train.objective.weights import Weights
from train.parallel.ranks import Ranks

SparsityTerm = Literal["l1", "l0", "target"]


@dataclass(frozen=True, kw_only=True)
class PassInputs:
    """What every pass reads."""

    inputs: Tensor
    """[N, D] the encoder's inputs."""
    target: Tensor
    """[N, D] what the active decoder rows should add up to: x_std - b_pre."""
    row_weight: Tensor
    """[N] c_n."""
    weights: Weights
    product_dtype: torch.dtype
    """Type of the encoder's product, and of a dense pass's other four."""
    tile_bytes: int
    """Pre-activations held at once."""
    kernels: Kernels
    out: WeightGradients
    """Memory for the weights' gradients, which a pass overwrites."""
    n: int
    """Rows of the batch, on all ranks together."""
    ranks: Ranks


class MainPass(NamedTuple):
    """The main loss of a batch, without AuxK, and its gradients."""

    loss: Tensor
    """Scalar: reconstruction, sum_n c_n |e_n|^2, summed over nested reconstructions if there are several."""
    sparsity: Tensor
    """Scalar: the sparsity term, coefficient included; zero if the variant itself limits the active latents."""
    error: Tensor
    """[N, D] target - decoded, of the whole code."""
    squared: Tensor
    """[N] |error|^2."""
    grad_out: Tensor
    """[N, D] d loss / d x_hat, summed over nested reconstructions."""
    gradients: WeightGradients
    """W_enc, W_dec, and for each latent the sum over rows of d loss / d z."""
    log_threshold: Tensor | None
    """[M] its gradient, if the variant has one."""
    active: Tensor
    """int64 scalar: active pairs."""
    fired: Tensor
    """The latents with an activation above `FIRING_THRESHOLD`: bool [M], or their indices with repeats."""


def sparse_pass(codes: SparseCodes, given: PassInputs) -> MainPass:
    """Loss and gradients of codes [N, w]."""
    kernels, W_dec, target, latents = given.kernels, given.weights.W_dec, given.target, given.ranks.latents
    if latents.size > 1:  # the part of the sum that other ranks' latents contribute is subtracted from the target
        whole = (own := kernels.decode(*codes, W_dec)).clone()
        latents.sum_(whole)
        target = target - (whole - own)
    main = kernels.reconstruct(codes, W_dec, target, given.row_weight)
    gradients = kernels.weight_gradients(codes, main.value_grads, main.grad_out, given.inputs, given.out)
    return _of_codes(codes, given.row_weight @ main.squared, main.error, main.squared, main.grad_out, gradients)


class Block(NamedTuple):
    """A part of the codes, and the weight of the reconstruction from all blocks up to it."""

    codes: SparseCodes
    """[N, w_b]"""
    weight: float
    """Factor of this reconstruction's squared error in the loss."""


def nested_pass(blocks: Sequence[Block], whole: int, codes: SparseCodes, given: PassInputs) -> MainPass:
    """Loss and gradients if block b's pairs take part in reconstructions b, b + 1, ..., B - 1; whole: which of these
    has its error reported and passed to AuxK; codes: its codes."""
    kernels, W_dec = given.kernels, given.weights.W_dec
    remaining, errors = given.target, []
    for block in blocks:
        remaining = remaining - kernels.decode(*block.codes, W_dec)
        errors.append(remaining)
    squares = [error.square().sum(dim=1) for error in errors]
    loss = given.row_weight.new_zeros(())
    for block, squared in zip(blocks, squares, strict=True):
        loss = loss + block.weight * (given.row_weight @ squared)
    gradients, memory = WeightGradients(*map(torch.zero_, given.out)), WeightGradients.zeros_like(W_dec)
    grad_out = torch.zeros_like(given.target)
    for block, error in zip(reversed(blocks), reversed(errors), strict=True):
        grad_out = grad_out + error * (-2 * block.weight * given.row_weight).unsqueeze(1)
        value_grads = kernels.activation_gradient(grad_out, block.codes.indices, W_dec)
        value_grads.masked_fill_(block.codes.values <= 0, 0)
        part = kernels.weight_gradients(block.codes, value_grads, grad_out, given.inputs, memory)
        for total, addend in zip(gradients, part, strict=True):
            total += addend
    return _of_codes(codes, loss, errors[whole], squares[whole], grad_out, gradients)


def _of_codes(
    codes: SparseCodes, loss: Tensor, error: Tensor, squared: Tensor, grad_out: Tensor, gradients: WeightGradients
) -> MainPass:
    return MainPass(
        loss=loss,
        sparsity=loss.new_zeros(()),
        error=error,
        squared=squared,
        grad_out=grad_out,
        gradients=gradients,
        log_threshold=None,
        active=codes.values.count_nonzero(),
        fired=codes.indices[codes.values > FIRING_THRESHOLD],
    )


def dense_pass(given: PassInputs, kind: SparsityTerm, k: int, coefficient: float, bandwidth: float) -> MainPass:
    """Loss and gradients of h = z where z > threshold, else 0, by tiles of dense products.

    kind: what keeps the codes sparse, in the units of a vector's squared error, with a coefficient b: l1, b * sum_n c_n
    sum_j h_nj; l0, b * sum_n c_n L0_n; target, b * (L0 / k - 1)^2 with L0 the batch's mean.

    The threshold is exp(log_threshold), trained with straight-through gradients (Rajamanoharan et al. 2024, JumpReLU):
    with K = 1 where |z - threshold| < bandwidth / 2, else 0,

        d h / d threshold = -(threshold / bandwidth) K        d L0 / d threshold = -(1 / bandwidth) K

    Without thresholds it is 0, and h = ReLU(z).
    """
    weights, c = given.weights, given.row_weight
    dtype, raw = dense_dtype(given.product_dtype), given.inputs.dtype
    inputs, decoder = given.inputs.to(dtype), weights.W_dec.to(dtype)
    threshold = None if weights.log_threshold is None else weights.log_threshold.exp()  # [M]
    count_weight = c if kind == "l0" else torch.full_like(c, 1 / given.n)  # [N]
    out = WeightGradients(*map(torch.zero_, given.out))
    error, grad_out = torch.empty_like(given.target), torch.empty_like(given.target)
    # Sums over the pairs in the window: of g, and of the row's weight in the sparsity term.
    by_value, by_count = (torch.zeros(len(decoder), dtype=raw, device=c.device) for _ in range(2))
    l1, l0 = c.new_zeros((), dtype=raw), torch.zeros_like(c)  # [], [N]
    fired = torch.zeros(len(decoder), dtype=torch.bool, device=c.device)
    for part, z in tiles(given.inputs, weights.W_enc, weights.b_enc, dtype, given.tile_bytes):  # z [n, M]
        h = z.clamp(min=0) if threshold is None else z.masked_fill(z <= threshold, 0).clamp_(min=0)
        active = h > 0
        error[part] = given.target[part] - (h @ decoder).to(raw)
        grad_out[part] = error[part] * (-2 * c[part]).unsqueeze(1)
        tile_grad = grad_out[part].to(dtype)
        out.W_dec.add_(h.t() @ tile_grad)
        g = (tile_grad @ decoder.t()).to(raw)  # [n, M] d loss / d h
        if threshold is not None:
            near = (z - threshold).abs() < bandwidth / 2  # [n, M]
            by_value += (g * near).sum(dim=0)
            by_count += count_weight[part] @ near.to(raw)
        if kind == "l1":
            g += (coefficient * c[part]).unsqueeze(1)
            l1 += c[part] @ h.sum(dim=1, dtype=raw)
        g.masked_fill_(~active, 0)
        out.W_enc.add_(g.to(dtype).t() @ inputs[part])
        out.latent_sums.add_(g.sum(dim=0))
        l0[part] = active.sum(dim=1).to(raw)
        fired |= (h > FIRING_THRESHOLD).any(dim=0)

    # The sparsity term, and its derivative by the rows' counts weighted by `count_weight`.
    mean = l0.sum()
    given.ranks.rows.sum_(mean)
    excess = mean / given.n / k - 1
    term, slope = {  # each rank's part of the term
        "target": (coefficient * excess.square() / given.ranks.rows.size, 2 * coefficient * excess / k),
        "l0": (coefficient * (c @ l0), coefficient),
        "l1": (coefficient * l1, 0),
    }[kind]
    log_threshold = None
    if threshold is not None:  # d / d log threshold = threshold * d / d threshold
        log_threshold = -threshold / bandwidth * (threshold * by_value + slope * by_count)
    squared = error.square().sum(dim=1)
    return MainPass(
        loss=c @ squared,
        sparsity=term,
        error=error,
        squared=squared,
        grad_out=grad_out,
        gradients=out,
        log_threshold=log_threshold,
        active=l0.sum().long(),
        fired=fired,
    )
