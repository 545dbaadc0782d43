"""From codes to the loss and its gradients: three backward passes, of which each variant takes one.

    sparse_pass   codes that were chosen already; all that follows touches the active pairs only
    nested_pass   the same, where several partial sums of the codes must each reconstruct the vector
    dense_pass    a threshold of each latent's own: any number may be active, so tiles of dense products

With c_n the row's weight, e = target - decoded, and G = d loss / d x_hat = -2 c e, a pair's gradient is g = <G,
W_dec[j]> where it is active. Not here: which latents are active (`train.kernels.encode`, `train.objective.variants`),
AuxK and b_pre's gradient, which are the same for all (`train.objective.step`).

Tested in tests/train/objective/test_step.py and test_variants.py.

Shapes: N rows, n rows of a tile, D d_model, M n_latents, w active latents a row at most, B blocks.
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
    """The autoencoder's."""
    product_dtype: torch.dtype
    """Type of the encoder's product, and of a dense pass's other four."""
    tile_bytes: int
    """Pre-activations held at once."""
    kernels: Kernels
    """The sparse pieces."""
    out: WeightGradients | None
    """Memory for the weights' gradients."""


class MainPass(NamedTuple):
    """The main loss of a batch, without AuxK, and its gradients."""

    loss: Tensor
    """Scalar: reconstruction, sum_n c_n |e_n|^2, over all nested reconstructions where there are several."""
    sparsity: Tensor
    """Scalar: the sparsity term, coefficient included; zero where the codes are sparse by choice."""
    error: Tensor
    """[N, D] target - decoded, of the whole code."""
    squared: Tensor
    """[N] |error|^2."""
    grad_out: Tensor
    """[N, D] d loss / d x_hat, summed over nested reconstructions."""
    gradients: WeightGradients
    """W_enc, W_dec, and for each latent the sum over rows of d loss / d z."""
    log_threshold: Tensor | None
    """[M] gradient, where there is one."""
    codes: SparseCodes | None
    """Active latents of the rows; None of a dense pass."""
    active: Tensor
    """int64 scalar: active pairs."""
    fired: Tensor
    """The latents with an activation above `FIRING_THRESHOLD`: bool [M], or their numbers with repeats."""


def sparse_pass(codes: SparseCodes, given: PassInputs) -> MainPass:
    """Loss and gradients of codes [N, w]."""
    kernels, W_dec = given.kernels, given.weights.W_dec
    main = kernels.reconstruct(codes.values, codes.indices, W_dec, given.target, given.row_weight)
    gradients = kernels.weight_gradients(
        codes.values, main.value_grads, codes.indices, main.grad_out, given.inputs, len(W_dec), out=given.out
    )
    loss = given.row_weight @ main.squared
    return MainPass(
        loss=loss,
        sparsity=loss.new_zeros(()),
        error=main.error,
        squared=main.squared,
        grad_out=main.grad_out,
        gradients=gradients,
        log_threshold=None,
        codes=codes,
        active=codes.values.count_nonzero(),
        fired=_fired(codes),
    )


class Block(NamedTuple):
    """A part of the codes, and how much the reconstruction by all blocks up to it counts."""

    codes: SparseCodes
    """[N, w_b]"""
    weight: float
    """Factor of this reconstruction's squared error in the loss."""


def nested_pass(blocks: Sequence[Block], whole: int, codes: SparseCodes, given: PassInputs) -> MainPass:
    """Loss and gradients where block b's pairs take part in the reconstructions b, b + 1, ..., B - 1.

    whole: which reconstruction's error is reported, and goes to AuxK; codes: the code that belongs to it.
    """
    kernels, W_dec = given.kernels, given.weights.W_dec
    remaining, errors = given.target, []
    for block in blocks:
        remaining = remaining - kernels.decode(block.codes.values, block.codes.indices, W_dec)
        errors.append(remaining)
    squares = [error.square().sum(dim=1) for error in errors]
    loss = given.row_weight.new_zeros(())
    for block, squared in zip(blocks, squares, strict=True):
        loss = loss + block.weight * (given.row_weight @ squared)

    out = given.out or _fresh(given)
    gradients = [tensor.zero_() for tensor in out]
    grad_out = torch.zeros_like(given.target)
    for block, error in zip(reversed(blocks), reversed(errors), strict=True):
        grad_out = grad_out + error * (-2 * block.weight * given.row_weight).unsqueeze(1)
        values, indices = block.codes
        value_grads = kernels.activation_gradient(grad_out, indices, W_dec).masked_fill_(values <= 0, 0)
        part = kernels.weight_gradients(values, value_grads, indices, grad_out, given.inputs, len(W_dec))
        for total, one in zip(gradients, part, strict=True):
            total += one
    return MainPass(
        loss=loss,
        sparsity=loss.new_zeros(()),
        error=errors[whole],
        squared=squares[whole],
        grad_out=grad_out,
        gradients=WeightGradients(*gradients),
        log_threshold=None,
        codes=codes,
        active=codes.values.count_nonzero(),
        fired=_fired(codes),
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
    weights = given.weights
    sums = _DenseSums(given, kind, k, coefficient, bandwidth)
    for part, z in tiles(
        given.inputs, weights.W_enc, weights.b_enc, dense_dtype(given.product_dtype), given.tile_bytes
    ):
        sums.add(part, z)
    return sums.result()


class _DenseSums:
    """What a dense pass adds up over its tiles."""

    def __init__(self, given: PassInputs, kind: SparsityTerm, k: int, coefficient: float, bandwidth: float) -> None:
        weights, c = given.weights, given.row_weight
        n, m = len(given.inputs), len(weights.W_enc)
        self._given, self._kind, self._goal = given, kind, k
        self._coefficient, self._bandwidth = coefficient, bandwidth
        self._dtype, raw = dense_dtype(given.product_dtype), given.inputs.dtype
        self._inputs, self._decoder = given.inputs.to(self._dtype), weights.W_dec.to(self._dtype)
        self._threshold = None if weights.log_threshold is None else weights.log_threshold.exp()  # [M]
        self._count_weight = c if kind == "l0" else torch.full_like(c, 1 / n)  # [N]
        self.out = given.out or _fresh(given)
        for tensor in self.out:
            tensor.zero_()
        self.error, self.grad_out = torch.empty_like(given.target), torch.empty_like(given.target)
        # Sums over the pairs in the rectangle, of g, and of what an active pair adds to the sparsity term.
        self.by_value = torch.zeros(m, dtype=raw, device=c.device)
        self.by_count = torch.zeros_like(self.by_value)
        self.l1 = torch.zeros((), dtype=raw, device=c.device)
        self.l0 = torch.zeros_like(c)  # [N]
        self.fired = torch.zeros(m, dtype=torch.bool, device=c.device)

    def add(self, part: slice, z: Tensor) -> None:
        """Count the rows `part`, whose pre-activations are `z` [n, M]."""
        raw, c = self.error.dtype, self._given.row_weight[part]
        near = None
        if self._threshold is not None:
            near = (z - self._threshold).abs() < self._bandwidth / 2  # [n, M]
            h = z.masked_fill(z <= self._threshold, 0).clamp_(min=0)
        else:
            h = z.clamp(min=0)
        active = h > 0
        self.error[part] = self._given.target[part] - (h @ self._decoder).to(raw)
        self.grad_out[part] = self.error[part] * (-2 * c).unsqueeze(1)
        grad_out = self.grad_out[part].to(self._dtype)
        self.out.W_dec.add_(h.t() @ grad_out)
        g = (grad_out @ self._decoder.t()).to(raw)  # [n, M] d loss / d h
        if near is not None:
            self.by_value += (g * near).sum(dim=0)
            self.by_count += self._count_weight[part] @ near.to(raw)
        if self._kind == "l1":
            g += (self._coefficient * c).unsqueeze(1)
            self.l1 += c @ h.sum(dim=1, dtype=raw)
        g.masked_fill_(~active, 0)
        self.out.W_enc.add_(g.to(self._dtype).t() @ self._inputs[part])
        self.out.latent_sums.add_(g.sum(dim=0))
        self.l0[part] = active.sum(dim=1).to(raw)
        self.fired |= (h > FIRING_THRESHOLD).any(dim=0)

    def result(self) -> MainPass:
        """Loss and gradients of all rows."""
        threshold = self._threshold
        term, slope = self._term()
        gradient = None
        if threshold is not None:
            # d / d log threshold = threshold * d / d threshold
            gradient = -threshold / self._bandwidth * (threshold * self.by_value + slope * self.by_count)
        squared = self.error.square().sum(dim=1)
        return MainPass(
            loss=self._given.row_weight @ squared,
            sparsity=term,
            error=self.error,
            squared=squared,
            grad_out=self.grad_out,
            gradients=self.out,
            log_threshold=gradient,
            codes=None,
            active=self.l0.sum().long(),
            fired=self.fired,
        )

    def _term(self) -> tuple[Tensor, Tensor]:
        """The sparsity term, and its derivative by the rows' counts, weighted as `_count_weight` has them."""
        c, l0, coefficient = self._given.row_weight, self.l0, self._coefficient
        if self._kind == "target":
            excess = l0.mean() / self._goal - 1
            return coefficient * excess.square(), 2 * coefficient * excess / self._goal
        if self._kind == "l0":
            return coefficient * (c @ l0), torch.full_like(c.sum(), coefficient)
        return coefficient * self.l1, torch.zeros_like(self.l1)


def _fresh(given: PassInputs) -> WeightGradients:
    W_enc, W_dec = given.weights.W_enc, given.weights.W_dec
    return WeightGradients(torch.empty_like(W_enc), torch.empty_like(W_dec), W_enc.new_empty(len(W_enc)))


def _fired(codes: SparseCodes) -> Tensor:
    return codes.indices[codes.values > FIRING_THRESHOLD]
