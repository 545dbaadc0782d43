"""What a latent does to the output by the direct path: the tokens that its decoder row promotes and suppresses most,
and the token that it is nearest to.

    r_v = gain * (U_v - mean of U over the vocabulary)      what token v's logit reads of the residual stream
    logits_j[v] = r_v . d_j                                 (a constant over v changes no probability)
    unembedding_cosine_j = max over v of cos(d_j, r_v)

with d_j the latent's row of W_dec and U the unembedding. Where the final norm is a plain RMSNorm or LayerNorm its gain
is folded in (and for LayerNorm r_v is centred over d_model, as the norm centres what it reads); its division by the
vector's scale, its bias, what later blocks make of the direction, and a soft cap on the logits are left out. So the
order of tokens means something, and the size only within one latent. In a store that went through a tuned lens d_j is
in the last layer's basis, which is what the lens is for; without one this is the logit lens, and says little of early
layers.

How: a tile of latents at a time, so that memory does not grow with n_latents x vocabulary. Not here: causal effects of
steering a latent (`analysis.prompt.intervene`), embeddings and the file
(`analysis.latents.tokens`).

Shapes: J latents, D d_model, V vocabulary.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harvest.model.load import LoadedModel
from residscope.errors import IncompatibleError

N_TOKENS = 10
"""Tokens shown at each end."""

TILE_BYTES = 64 * 2**20
"""float32 logits held at once."""

_NORM_ERROR = 1e-3


class LatentLogits(NamedTuple):
    """The ends of each latent's logits, the most extreme first."""

    promoted: NDArray[np.int64]
    """[J, n] token ids."""
    promoted_logits: NDArray[np.float32]
    """[J, n] above the mean over the vocabulary."""
    suppressed: NDArray[np.int64]
    """[J, n]"""
    suppressed_logits: NDArray[np.float32]
    """[J, n]"""
    cosine: NDArray[np.float32]
    """[J] the highest cosine to what a token's logit reads."""
    nearest: NDArray[np.int64]
    """[J] that token's id."""
    norm_folded: bool
    """Whether the final norm's gain is in it."""


class NormGain(NamedTuple):
    """What a plain norm does to a direction."""

    gain: Tensor
    """[D]"""
    centred: bool
    """Whether the mean over d_model is taken out first (LayerNorm)."""


def norm_gain(norm: nn.Module, d_model: int) -> NormGain | None:
    """The gain of an RMSNorm or LayerNorm, however it keeps its weight; None where it is neither.

    A vector of mean 0 and mean square 1 comes out as gain * itself + bias. What is found is held against the norm of
    another vector.
    """
    norm = copy.deepcopy(norm).float().cpu()
    sign = torch.ones(d_model)
    sign[1::2] = -1
    if d_model % 2:
        sign[-3:] = torch.tensor([2.0, -1.0, -1.0])
    sign /= sign.square().mean().sqrt()
    probe = torch.randn(3, d_model, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.inference_mode():
        bias = norm(torch.zeros(1, d_model))[0]
        gain = (norm(sign[None])[0] - bias) / sign
        found = norm(probe) - bias
        for centred in (False, True):
            x = probe - probe.mean(dim=-1, keepdim=True) if centred else probe
            expected = gain * x / x.square().mean(dim=-1, keepdim=True).sqrt()
            if (found - expected).norm() <= _NORM_ERROR * found.norm():
                return NormGain(gain.clone(), centred)
    return None


def reading_directions(model: LoadedModel) -> tuple[Tensor, bool]:
    """r_v of each token of the tokenizer, float32 [V, D], and whether the final norm's gain is in it. Raises
    `IncompatibleError` if the model has no unembedding with a weight [V, D]."""
    weight = getattr(model.unembedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != model.d_model:
        raise IncompatibleError(
            f"{model.spec.name} ({model.architecture}): the unembedding should have a weight of {model.d_model} columns"
        )
    rows = weight[: len(model.tokenizer)].to(torch.float32, copy=True)  # rows beyond the tokenizer are padding
    rows -= rows.mean(dim=0)
    fold = norm_gain(model.final_norm, model.d_model)
    if fold is not None:
        rows *= fold.gain.to(rows.device)
        if fold.centred:
            rows -= rows.mean(dim=1, keepdim=True)
    return rows, fold is not None


@torch.inference_mode()
def latent_logits(directions: Tensor, model: LoadedModel, n: int = N_TOKENS) -> LatentLogits:
    """Of each of `directions` [J, D], rows of W_dec: the n most promoted and most suppressed tokens, and the nearest.
    Raises as `reading_directions` does."""
    reading, norm_folded = reading_directions(model)
    lengths = reading.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    n = min(n, len(reading))
    rows = max(1, TILE_BYTES // (4 * len(reading)))
    parts: list[list[Tensor]] = []
    for start in range(0, len(directions), rows):
        d = directions[start : start + rows].to(reading.device, torch.float32)
        logits = d @ reading.T  # [rows, V]
        high, low = logits.topk(n), logits.topk(n, largest=False)
        cosine, nearest = logits.div_(lengths).max(dim=1)
        cosine /= d.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        found = [high.indices, high.values, low.indices, low.values, cosine, nearest]
        parts.append([column.cpu() for column in found])
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    return LatentLogits(*columns, norm_folded=norm_folded)
