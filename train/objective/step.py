"""One training step's forward and backward pass, by hand: the loss, and the gradient of every trained tensor.

Forward, in the standardised space of the dictionary (c_n is the row's weight in the loss, see
`train.objective.losses`), shown for TopK; the other variants choose latents differently, and some add a term
(`train.objective.passes`):

    z = (x - b_pre) W_enc^T + b_enc   the one dense product, by tiles of rows or screened; z is never kept
    v, i = ReLU(TopK_k(z))            x_hat = sum_k v_k W_dec[i_k] + b_pre      e = x - x_hat
    loss = sum_n c_n |e_n|^2 + aux_coef * AuxK

Backward, with G = d loss / d x_hat = -2 c e and g = <G, W_dec[i]> where v > 0:

    d W_dec[j] = sum of v G over the pairs of latent j        d W_enc[j] = sum of g (x - b_pre) over them
    d b_enc[j] = sum of g over them                           d b_pre    = sum_n G_n  -  sum_j d b_enc[j] W_enc[j]

The second term of d b_pre comes from the encoder's centring: it is there without a trained b_enc too, but absent
without centring. AuxK adds its own pairs to the same sums, so its latents train the encoder as the main ones do.

Shapes: N rows, D d_model, M n_latents, k active latents per row, A dead latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from train.kernels.interface import Kernels, WeightGradients
from train.objective.losses import DeadLatents, RowWeights, auxk
from train.objective.passes import PassInputs
from train.objective.variants import StepOptions
from train.objective.weights import Weights
from train.parallel.ranks import ALONE, Ranks


class StepResult(NamedTuple):
    """What a step computes before the optimiser moves anything."""

    gradients: Weights
    """d (loss + sparsity + aux_coef * auxk) / d weights."""
    squared_error: Tensor
    """[N] |x - x_hat|^2 in standardised space."""
    loss: Tensor
    """Scalar, the main loss: sum_n c_n |e_n|^2, summed over nested reconstructions if there are several."""
    auxk: Tensor
    """Scalar, AuxK before its coefficient; zero when no latent is dead."""
    active: Tensor
    """int64 scalar: active (row, latent) pairs."""
    sparsity: Tensor
    """Scalar, the sparsity term, coefficient included."""


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
    n: int | None = None,
    ranks: Ranks = ALONE,
) -> StepResult:
    """Loss and gradients of standardised rows `x` [N, D], weighted by `rows`.

    Counts firings in `dead`, and updates `weights.threshold` if the variant measures one; changes nothing else. out:
    memory for the weights' gradients, which the next call overwrites. n: rows of the batch on all `ranks`; the result
    is then this rank's part of every sum over rows.
    """
    n = len(x) if n is None else n
    centred = x - weights.b_pre
    inputs = centred if options.variant.config.apply_b_dec_to_input else x
    main = options.variant.train(
        PassInputs(
            inputs=inputs,
            target=centred,  # b_pre cancels in e
            row_weight=rows.total,
            weights=weights,
            product_dtype=options.product_dtype,
            tile_bytes=options.tile_bytes,
            kernels=kernels,
            out=WeightGradients.zeros_like(weights.W_enc) if out is None else out,
            n=n,
            ranks=ranks,
        ),
        options,
    )
    dead.count(n, main.fired, ranks)
    grads, aux_loss = main.gradients, main.loss.new_zeros(())
    coefficient = options.objective.aux_coef
    if coefficient > 0 and ranks.latents.any(len(latents := dead.dead_latents()) > 0):
        aux = auxk(
            inputs,
            main.error,
            rows,
            weights.W_enc.index_select(0, latents),
            weights.W_dec.index_select(0, latents),
            b_enc=None if weights.b_enc is None else weights.b_enc[latents],
            k=options.aux_k,
            product_dtype=options.product_dtype,
            tile_bytes=options.tile_bytes,
            kernels=kernels,
            ranks=ranks,
        )
        grads.W_enc.index_add_(0, latents, aux.W_enc, alpha=coefficient)
        grads.W_dec.index_add_(0, latents, aux.W_dec, alpha=coefficient)
        grads.latent_sums.index_add_(0, latents, aux.latent_sums, alpha=coefficient)
        aux_loss = aux.loss
    b_pre = main.grad_out.sum(dim=0)
    if options.variant.config.apply_b_dec_to_input:
        centring = grads.latent_sums @ weights.W_enc
        ranks.latents.sum_(centring)
        b_pre = b_pre - centring
    b_enc = None if weights.b_enc is None else grads.latent_sums
    gradients = Weights(grads.W_enc, grads.W_dec, b_pre, b_enc, main.log_threshold)
    return StepResult(gradients, main.squared, main.loss, aux_loss, main.active, main.sparsity)
