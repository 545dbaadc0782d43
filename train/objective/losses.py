"""The row weights of the main loss, AuxK, and the count of dead latents.

Main loss = (1 / N) sum_n |e_n|^2 / denominator_{layer(n)}. With layers mixed in a batch its expectation is the mean
over layers of the FVU. Denominators are fixed statistics of the training vectors: a batch's own variance would make the
loss of one row depend on its neighbours.

A row's error in raw space is its standardised error times its own scale, so the two loss spaces differ only in the
weights of the rows: c_n = w_n = 1 / (N denominator) in standardised space, c_n = w_n std_n^2 in raw space.

Shapes: N rows, D d_model, M n_latents, k active latents a row, L layers, A dead latents.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.hardware import dense_dtype
from train.kernels.interface import Kernels
from train.parallel.ranks import ALONE, Ranks
from train.parallel.selection import keep_largest

FIRING_THRESHOLD = 1e-3
"""An activation above this counts as firing (as in Gao et al. 2024's code and the reference implementation)."""

_ROW_MULTIPLE = {"cpu": 1, "cuda": 64}
"""AuxK pads its weights to a multiple of these rows: an odd number makes products on a GPU 3 to 5 times as long."""


class RowWeights(NamedTuple):
    """How each row of a batch counts in the loss."""

    share: Tensor
    """[N] w_n = 1 / (N denominator of the row's layer)."""
    scale: Tensor
    """[N] the factor that takes a standardised error to the loss's space: 1, or in raw space the row's own scale."""
    total: Tensor
    """[N] c_n = w_n scale_n^2, the weight of the squared standardised error."""


def row_weights(layer: Tensor, std: Tensor, denominators: Tensor, *, raw: bool, n: int | None = None) -> RowWeights:
    """The rows' weights: layer int64 [N] indexes denominators [L], E|x - mean_l|^2 in the loss's space; std [N, 1]; n:
    rows of the whole batch, if some are on other ranks."""
    share = denominators.to(std.dtype).reciprocal()[layer] / (len(layer) if n is None else n)
    scale = std.squeeze(1) if raw else torch.ones_like(share)
    return RowWeights(share, scale, share * scale.square())


class AuxOutput(NamedTuple):
    """AuxK's loss, and its gradients for the dead latents only."""

    loss: Tensor
    """Scalar: sum_n c_n |e_n - e_hat_n|^2 over the variance of the errors in the loss's space (`_inverse_variance`)."""
    W_enc: Tensor
    """[A, D]"""
    W_dec: Tensor
    """[A, D]"""
    latent_sums: Tensor
    """[A] sum of d loss / d z over rows, for the centring's gradient of b_pre."""


def auxk(
    centred: Tensor,
    error: Tensor,
    rows: RowWeights,
    W_enc: Tensor,
    W_dec: Tensor,
    *,
    b_enc: Tensor | None = None,
    k: int,
    product_dtype: torch.dtype,
    tile_bytes: int,
    kernels: Kernels,
    ranks: Ranks = ALONE,
) -> AuxOutput:
    """AuxK of Gao et al. 2024, appendix A.2: each row's k largest dead latents reconstruct what the rest missed.

    centred [N, D] the encoder's input; error [N, D] the detached x - x_hat, standardised; W_enc, W_dec [A, D] the dead
    latents' rows; b_enc [A] their bias; the rest as in `train.objective.variants.StepOptions`. The latents go through
    the same TopK and ReLU as the main ones; e_hat has no b_pre, which cancels from the error; space and row weights are
    the main loss's; normalised by the error's variance (docs/method.md). A NaN error stays NaN (Gao et al.'s nan_to_num
    hides it), so that a divergence shows.

    Dense over the dead latents, because k is much larger here than in the main loss: five products of N x A x D, on as
    many rows at a time as fit `tile_bytes`. With several ranks, each returns its rows' part of every sum.
    """
    dtype, n_dead = dense_dtype(product_dtype), len(W_enc)
    unused = -n_dead % _ROW_MULTIPLE[error.device.type]  # rows of zeros, whose activations are never positive
    if unused:
        W_enc, W_dec = (F.pad(weight, (0, 0, 0, unused)) for weight in (W_enc, W_dec))
        b_enc = None if b_enc is None else F.pad(b_enc, (0, unused))
    encoder, decoder = W_enc.to(dtype), W_dec.to(dtype)
    bias = None if b_enc is None else b_enc.to(dtype)
    sums = AuxOutput(error.new_zeros(()), torch.zeros_like(W_enc), torch.zeros_like(W_dec), W_enc.new_zeros(len(W_enc)))
    latents = torch.tensor(len(W_enc))
    ranks.latents.sum_(latents)
    tile_rows = max(1, min(len(centred), tile_bytes // (int(latents) * centred.element_size())))
    # All tiles use the same memory: fresh memory costs page faults.
    z_memory, grad_memory = (centred.new_empty(tile_rows, len(W_enc), dtype=dtype) for _ in range(2))
    decoded_memory = centred.new_empty(tile_rows, centred.shape[1], dtype=dtype)
    for start in range(0, len(centred), tile_rows):
        part = slice(start, start + tile_rows)
        inputs = centred[part].to(dtype)
        n = len(inputs)
        z = torch.mm(inputs, encoder.t(), out=z_memory[:n])
        active = keep_largest(z if bias is None else z.add_(bias), k, kernels, ranks.latents)  # [n, A]
        decoded = torch.mm(active, decoder, out=decoded_memory[:n])
        ranks.latents.sum_(decoded)
        missed = error[part] - decoded  # [n, D]
        sums.loss.add_(rows.total[part] @ _squared(missed))
        grad_out = (missed * (-2 * rows.total[part]).unsqueeze(1)).to(dtype)  # d loss / d e_hat
        grad_z = torch.mm(grad_out, decoder.t(), out=grad_memory[:n])  # [n, A]
        torch.ops.aten.threshold_backward.grad_input(grad_z, active, 0, grad_input=grad_z)  # zero where TopK cut
        sums.W_enc.add_(grad_z.t() @ inputs)
        sums.W_dec.add_(active.t() @ grad_out)
        sums.latent_sums.add_(grad_z.sum(dim=0))
    scale = _inverse_variance(error, rows, ranks.rows)
    return AuxOutput(sums.loss.mul_(scale), *(total[:n_dead].mul_(scale) for total in sums[1:]))


def _inverse_variance(error: Tensor, rows: RowWeights, ranks: Ranks) -> Tensor:
    """The inverse of AuxK's denominator, a constant for its gradient: 1 / sum_n w_n |s_n - mean|^2, s_n the errors in
    the loss's space, about their mean weighted by w_n; 0 where that is zero up to rounding."""
    scaled = error * rows.scale.unsqueeze(1)  # [N, D]
    total, share = rows.share @ scaled, rows.share.sum()
    ranks.sum_(total, share)
    mean = total / share
    variance, second_moment = rows.share @ _squared(scaled - mean), rows.share @ _squared(scaled)
    ranks.sum_(variance, second_moment)
    rounding = torch.finfo(error.dtype).eps * second_moment
    return torch.where(variance > rounding, 1 / variance, 0).to(error.dtype)


def _squared(rows: Tensor) -> Tensor:
    """|row|^2: [n, D] -> [n], without a temporary."""
    return torch.linalg.vector_norm(rows, dim=1).square_()


class DeadLatents:
    """For each latent, the number of training vectors since it last fired; int64, because float32 stops at 2^24."""

    def __init__(self, n_latents: int, threshold: int, device: torch.device | str = "cpu") -> None:
        """`threshold`: number of silent vectors (tokens times layers) after which a latent is dead."""
        self.threshold = threshold
        self.silent = torch.zeros(n_latents, dtype=torch.int64, device=device)
        """[M] vectors since each latent last fired."""

    def count(self, n: int, fired: Tensor, ranks: Ranks = ALONE) -> None:
        """Count `n` rows of all ranks; fired: bool [M], or the indices of the latents that fired in this rank's."""
        self.silent += n
        if ranks.size > 1:
            everywhere = torch.zeros_like(self.silent, dtype=torch.bool)
            everywhere[fired] = True
            ranks.rows.any_(fired := everywhere)
        self.silent[fired] = 0

    def dead_latents(self) -> Tensor:
        """int64 [A], ascending: the latents that have been silent for at least `threshold` vectors."""
        return (self.silent >= self.threshold).nonzero().squeeze(1)

    def fraction(self, latents: Ranks = ALONE) -> float:
        """Share of dead latents, over all ranks."""
        latents.sum_(dead := (self.silent >= self.threshold).double().mean())
        return dead.item() / latents.size


def dead_threshold(run_tokens: int, n_layers: int, dead_tokens: int | None) -> int:
    """Silent vectors that make a latent dead: `dead_tokens`, else 10 million or a tenth of the run's tokens if less,
    times the number of layers."""
    tokens = min(10_000_000, run_tokens // 10) if dead_tokens is None else dead_tokens
    return max(1, tokens * n_layers)
