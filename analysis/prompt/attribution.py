"""How much each active latent contributes to one of the model's predictions, to first order.

With m the log probability of a token after position p (or the difference of two tokens' logits), g its gradient with
respect to the output of block l at position t, and a_j, s and d_j as in intervene.py,

    effect = a_j s (d_j . g)

is by how much m would fall if the latent were ablated there alone and m were linear: gradient attribution (Nanda 2023,
"attribution patching"; Marks et al. 2025, "Sparse feature circuits", section 3.1), here with zero as the baseline. One
forward and one backward pass give it for all latents, layers and positions. Effects of a latent at several layers do
not add up: what is removed after one block is missing after later blocks too. If the store was harvested through a
lens, d_j is mapped back by its inverse. The effect of what the autoencoder misses at a layer is e . g summed over the
kept positions, with e the reconstruction error: the error nodes of Marks et al.

Shapes: N positions, D d_model, V vocabulary, A activations that are not zero.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.model.continuation import changed
from analysis.model.downstream import with_residual
from analysis.prompt.intervene import PromptedModel
from analysis.prompt.view import Activations, Tokens
from residscope.errors import IncompatibleError, is_out_of_memory, said

ROWS = 8192
"""Activations processed at once."""


@torch.inference_mode(False)
@torch.enable_grad()
def attribute(
    prompted: PromptedModel,
    tokens: Tokens,
    layers: Sequence[int],
    found: Activations,
    position: int,
    token: int,
    against: int | None,
) -> tuple[NDArray[np.float64], dict[int, float]]:
    """The effect [A] of each of a text's activations `found` at `layers` on the prediction after `position`: on the log
    probability of `token` in nats, or on its logit minus that of `against`; and, by layer, of the reconstruction error.

    Raises `IncompatibleError` if the model has no backward pass.
    """
    model = prompted.model
    input_ids = torch.from_numpy(tokens.ids)[None].to(model.device)
    everywhere = torch.ones(input_ids.shape, dtype=torch.bool, device=model.device)
    streams: dict[int, Tensor] = {}  # [N, D]
    shifts: dict[int, Tensor] = {}  # zeros, whose gradient is that with respect to the stream
    last: list[Tensor] = []

    def shifted(x: Tensor, layer: int) -> Tensor:
        streams[layer], shifts[layer] = x.detach(), torch.zeros_like(x, requires_grad=True)
        last[:] = [x + shifts[layer]]
        return last[0]

    def look(output: Any, layer: int) -> Any:
        return with_residual(output, lambda x: shifted(x, layer), everywhere)

    with changed(model, sorted({*layers, model.n_layers - 1}), look):
        model.base(input_ids=input_ids, use_cache=False)
        logits = model.logits(last[0][position]).float()  # [V]
        measure = logits.log_softmax(dim=-1)[token] if against is None else logits[token] - logits[against]
        try:
            gradients = torch.autograd.grad(measure, [shifts[layer] for layer in layers])
        except RuntimeError as error:  # NotImplementedError is one
            if is_out_of_memory(error):
                raise
            raise IncompatibleError(f"{model.spec.name}: its backward pass failed ({said(error)})") from error
    effect, missed, kept = np.zeros(len(found.latent)), {}, np.flatnonzero(tokens.kept)
    for layer, gradient in zip(layers, gradients, strict=True):
        own, place = np.flatnonzero(found.layer == layer), torch.from_numpy(kept).to(model.device)
        x, along = _along(prompted, streams[layer][place], gradient[place], layer)
        for rows in np.split(own, range(ROWS, len(own), ROWS)):
            latent, of = found.latent[rows], np.searchsorted(kept, found.position[rows])
            dot = (prompted.sae.W_dec.detach()[latent] * along[of]).sum(dim=-1).double().cpu().numpy()
            effect[rows] = found.activation[rows] * dot
        missed[layer] = float((x.double() * along).sum() - effect[own].sum())
    return effect, missed


@torch.no_grad()
def _along(prompted: PromptedModel, x: Tensor, gradient: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """From a block's outputs [n, D] and the gradient there: the standardised outputs minus b_pre, and the gradient with
    respect to them."""
    y, g = prompted.seen(x, layer), gradient.float()
    if prompted.lens is not None:
        # The lens's inverse is affine: the gradient passes through its linear part.
        lens = prompted.lens
        g = torch.func.vjp(lambda vectors: lens.invert(vectors, layer), torch.zeros_like(g))[1](g)[0]
    y_std, _, std = prompted.sae.standardize(y, prompted.sae.rows_of_layer(layer, len(y)))
    return y_std - prompted.sae.b_pre, std * g
