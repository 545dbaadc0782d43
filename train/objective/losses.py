"""What is minimised and what is counted: row weights of the main loss, AuxK, dead latents, and FVU by layer.

Main loss = (1 / N) sum_n |e_n|^2 / denominator_{layer(n)}. With layers mixed in a batch its expectation is the mean
over layers of the FVU, so every layer counts alike. Denominators are fixed statistics of the training vectors, never of
the batch: a batch's own variance would make the loss of one row depend on its neighbours.

A row's error in raw space is its standardised error times its own scale, so the two loss spaces differ only in the
weights of the rows: c_n = w_n = 1 / (N denominator) in standardised space, c_n = w_n std_n^2 in raw space.

Shapes: N rows, D d_model, M n_latents, k active latents a row, L layers, A dead latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from train.kernels.interface import Kernels, SparseCodes
from train.kernels.products import int16_products, result_dtype, times

FIRING_THRESHOLD = 1e-3
"""An activation above this counts as firing (Gao et al. 2024's code, and the reference)."""


class RowWeights(NamedTuple):
    """How each row of a batch counts in the loss."""

    share: Tensor
    """[N] w_n = 1 / (N denominator of the row's layer)."""

    scale: Tensor
    """[N] what turns a standardised error into the loss's space: 1, or the row's own scale in raw space."""

    total: Tensor
    """[N] c_n = w_n scale_n^2, the weight of the squared standardised error."""


def row_weights(layer: Tensor, std: Tensor, denominators: Tensor, *, raw: bool) -> RowWeights:
    """The rows' weights: layer int64 [N] indexes denominators [L], E|x - mean_l|^2 in the loss's space; std [N, 1]."""
    share = denominators.to(std.dtype).reciprocal()[layer] / len(layer)
    scale = std.squeeze(1) if raw else torch.ones_like(share)
    return RowWeights(share, scale, share * scale.square())


class AuxOutput(NamedTuple):
    """AuxK's loss and its gradients on the dead latents alone."""

    loss: Tensor
    """Scalar: sum_n c_n |e_n - e_hat_n|^2 over the same sum of |e_n - mean of e|^2."""

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
) -> AuxOutput:
    """AuxK of Gao et al. 2024, appendix A.2: each row's k largest dead latents reconstruct what the rest missed.

    centred [N, D] the encoder's input; error [N, D] the detached x - x_hat, standardised; W_enc, W_dec [A, D] the dead
    latents' rows; b_enc [A] their bias; the rest as in `train.objective.step.StepOptions`. The choices, and where they
    come from:

    - the latents go through the same TopK and ReLU as the main ones (Gao et al.'s code), read off the same
      pre-activations: here a product over the dead rows alone, which gives the same numbers;
    - e_hat has no b_pre: the target is the error, from which b_pre has cancelled (their code adds it on both sides);
    - same space as the main loss: the row weights are the main loss's own;
    - normalised by the error's variance in that space, about its mean over the batch (docs/method.md); where that is
      zero the loss and its gradients are zero. An error that is no number stays one (their code's nan_to_num hides
      it), so that a divergence is seen.

    Dense over the dead rows, because k is much larger here than in the main loss: five products of N x A x D.
    """
    if int16_products(product_dtype) and kernels.name == "numba":
        from train.kernels.cpu.tiled_auxk import tiled_auxk  # here: loading numba takes half a second

        tiled = tiled_auxk(
            centred, error, rows.share, rows.scale, W_enc, W_dec, b_enc=b_enc, k=k, tile_bytes=tile_bytes
        )
        found = _AuxParts(tiled.variance, tiled.second_moment, rows.total @ tiled.squared, *tiled[3:])
    else:
        found = _product_by_product(centred, error, rows, W_enc, W_dec, b_enc, k, product_dtype, tile_bytes, kernels)
    rounding = torch.finfo(error.dtype).eps * found.second_moment  # a variance that is really 0
    scale = torch.where(found.variance > rounding, 1 / found.variance, 0).to(error.dtype)
    return AuxOutput(found.loss * scale, *(gradient.mul_(scale) for gradient in found[3:]))


class _AuxParts(NamedTuple):
    """AuxK before it is divided by the error's variance."""

    variance: Tensor
    """sum_n w_n |s_n - mean|^2 over the errors s_n in the loss's space, about their mean weighted by w_n."""

    second_moment: Tensor
    """sum_n w_n |s_n|^2."""

    loss: Tensor
    W_enc: Tensor
    W_dec: Tensor
    latent_sums: Tensor


def _product_by_product(
    centred: Tensor,
    error: Tensor,
    rows: RowWeights,
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor | None,
    k: int,
    product_dtype: torch.dtype,
    tile_bytes: int,
    kernels: Kernels,
) -> _AuxParts:
    """AuxK of as many rows as fit `tile_bytes` at a time."""
    scaled = error * rows.scale.unsqueeze(1)  # [N, D] the error in the loss's space
    mean = rows.share @ scaled / rows.share.sum()
    variance, second_moment = rows.share @ _squared(scaled - mean), rows.share @ _squared(scaled)

    n_dead = len(W_enc)
    encode, decode, decode_back = (times(w, product_dtype) for w in (W_enc, W_dec.t(), W_dec))
    bias = None if b_enc is None else b_enc.to(result_dtype(product_dtype))
    loss = error.new_zeros(())
    gradients = torch.zeros_like(W_enc), torch.zeros_like(W_dec), W_enc.new_zeros(n_dead)
    tile_rows = max(1, min(len(centred), tile_bytes // (n_dead * centred.element_size())))
    # One memory for all tiles: fresh memory costs page faults.
    z_dtype = result_dtype(product_dtype)
    z_memory, grad_memory = (centred.new_empty(tile_rows, n_dead, dtype=z_dtype) for _ in range(2))
    decoded_memory = centred.new_empty(tile_rows, centred.shape[1], dtype=z_dtype)
    for start in range(0, len(centred), tile_rows):
        part = slice(start, start + tile_rows)
        inputs = centred[part]
        n = len(inputs)
        z = encode(inputs, z_memory[:n])
        active = kernels.keep_largest(z if bias is None else z.add_(bias), k)  # [n, A]
        missed = error[part] - decode(active, decoded_memory[:n])  # [n, D]
        loss += rows.total[part] @ _squared(missed)
        grad_out = missed * (-2 * rows.total[part]).unsqueeze(1)  # d loss / d e_hat
        grad_z = decode_back(grad_out, grad_memory[:n])  # [n, A]
        torch.ops.aten.threshold_backward.grad_input(grad_z, active, 0, grad_input=grad_z)  # zero where TopK cut
        gradients[0].add_(times(inputs.t(), product_dtype)(grad_z.t()))
        gradients[1].add_(times(grad_out.t(), product_dtype)(active.t()))
        gradients[2].add_(grad_z.sum(dim=0))
    return _AuxParts(variance, second_moment, loss, *gradients)


def _squared(rows: Tensor) -> Tensor:
    """|row|^2: [n, D] -> [n], without a temporary."""
    return torch.linalg.vector_norm(rows, dim=1).square_()


class DeadLatents:
    """For each latent, the number of training vectors since it last fired.

    Counts vectors and not calls, so that splitting a batch changes nothing; in int64, because float32 stops at 2^24.
    Only `train.objective.step` updates it: validation never does.
    """

    def __init__(self, n_latents: int, threshold: int, device: torch.device | str = "cpu") -> None:
        """`threshold`: silent vectors (tokens times layers) from which on a latent is dead."""
        self.threshold = threshold
        self.silent = torch.zeros(n_latents, dtype=torch.int64, device=device)
        """[M] vectors since each latent last fired."""

    def update(self, codes: SparseCodes) -> None:
        """Count the rows of one batch."""
        self.count(len(codes.values), codes.indices[codes.values > FIRING_THRESHOLD])

    def count(self, n: int, fired: Tensor) -> None:
        """Count `n` rows; fired: bool [M], or the numbers of the latents above `FIRING_THRESHOLD`, repeats allowed."""
        self.silent += n
        self.silent[fired] = 0

    def dead_latents(self) -> Tensor:
        """int64 [A], ascending: the latents that have been silent for at least `threshold` vectors."""
        return (self.silent >= self.threshold).nonzero().squeeze(1)

    def fraction(self) -> float:
        """Share of the latents that are dead."""
        return (self.silent >= self.threshold).double().mean().item()


def dead_threshold(run_tokens: int, n_layers: int, dead_tokens: int | None) -> int:
    """Silent vectors that make a latent dead: `dead_tokens`, else 10 million or a tenth of the run's tokens if less.

    A token gives one vector a layer, hence times `n_layers`; at least one vector.
    """
    tokens = min(10_000_000, run_tokens // 10) if dead_tokens is None else dead_tokens
    return max(1, tokens * n_layers)
