"""One training step's forward and backward pass, by hand: the loss, and the gradients of W_enc, W_dec and b_pre.

Forward, in the standardised space where the dictionary lives (c_n is the row's weight in the loss, see `train.losses`):

    z = (x - b_pre) W_enc^T      the one dense product, a tile of rows at a time; z is never kept
    v, i = ReLU(TopK_k(z))       x_hat = sum_k v_k W_dec[i_k] + b_pre      e = x - x_hat
    loss = sum_n c_n |e_n|^2 + aux_coef * AuxK

Backward, with G = d loss / d x_hat = -2 c e and g = <G, W_dec[i]> where v > 0:

    d W_dec[j] = sum of v G over the pairs of latent j        d W_enc[j] = sum of g (x - b_pre) over them
    d b_pre    = sum_n G_n  -  sum_j (sum of g over the pairs of latent j) W_enc[j]

The second term of d b_pre comes through the encoder's centring. AuxK adds its own pairs to the same sums: its latents
are read off the same pre-activations, so they train the encoder as the main ones do.

Not here: which implementation of the sparse parts is used (`train.kernels`), the optimiser (`train.optimizer`).

Shapes: N rows, D d_model, M n_latents, k active latents a row, A dead latents.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from train.kernels import Kernels, SparseCodes, WeightGradients
from train.losses import DeadLatents, RowWeights, auxk
from train.sae import encode_tiled


class Weights(NamedTuple):
    """The three parameters, or one gradient for each."""

    W_enc: Tensor
    """[M, D]"""

    W_dec: Tensor
    """[M, D]"""

    b_pre: Tensor
    """[D]"""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What stays the same from step to step."""

    k: int
    """Latents that may be active on a row."""

    aux_k: int
    """Dead latents that AuxK may use on a row."""

    aux_coef: float
    """Weight of AuxK beside the main loss; 0 turns it off."""

    product_dtype: torch.dtype
    """Type of the encoder's product (and of AuxK's): the weights' own, or bfloat16 where the hardware is fast at it."""

    tile_bytes: int
    """Pre-activations held at once."""


class StepResult(NamedTuple):
    """What a step computed before the optimiser moves anything."""

    gradients: Weights
    """d (loss + aux_coef * auxk) / d weights."""

    codes: SparseCodes
    """Active latents of the rows."""

    squared_error: Tensor
    """[N] |x - x_hat|^2 in standardised space."""

    loss: Tensor
    """Scalar, the main loss: sum_n c_n |e_n|^2."""

    auxk: Tensor
    """Scalar, AuxK before its coefficient; zero when no latent is dead."""


@torch.no_grad()
def training_step(
    weights: Weights,
    x: Tensor,
    rows: RowWeights,
    dead: DeadLatents,
    options: StepOptions,
    kernels: Kernels,
    *,
    out: WeightGradients | None = None,
) -> StepResult:
    """Loss and gradients of standardised rows `x` [N, D] that count as `rows` says; counts firings in `dead`.

    `out` is memory for the weights' gradients, which the next call with it writes over.
    """
    centred = x - weights.b_pre
    codes = encode_tiled(
        centred,
        weights.W_enc,
        options.k,
        product_dtype=options.product_dtype,
        tile_bytes=options.tile_bytes,
        kernels=kernels,
    )
    dead.update(codes)
    main = kernels.reconstruct(codes.values, codes.indices, weights.W_dec, centred, rows.total)  # b_pre cancels in e
    loss = rows.total @ main.squared
    n_latents = len(weights.W_enc)
    grads = kernels.weight_gradients(
        codes.values, main.value_grads, codes.indices, main.grad_out, centred, n_latents, out=out
    )

    aux_loss = loss.new_zeros(())
    latents = dead.dead_latents() if options.aux_coef > 0 else None
    if latents is not None and len(latents) > 0:
        aux = auxk(
            centred,
            main.error,
            rows,
            weights.W_enc[latents],
            weights.W_dec[latents],
            k=options.aux_k,
            product_dtype=options.product_dtype,
            tile_bytes=options.tile_bytes,
            kernels=kernels,
        )
        aux_loss = aux.loss
        grads.W_enc.index_add_(0, latents, aux.W_enc, alpha=options.aux_coef)
        grads.W_dec.index_add_(0, latents, aux.W_dec, alpha=options.aux_coef)
        grads.latent_sums.index_add_(0, latents, aux.latent_sums, alpha=options.aux_coef)

    b_pre = main.grad_out.sum(dim=0) - grads.latent_sums @ weights.W_enc
    return StepResult(Weights(grads.W_enc, grads.W_dec, b_pre), codes, main.squared, loss, aux_loss)
