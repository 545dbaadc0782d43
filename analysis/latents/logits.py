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

How: a tile of latents at a time, so that memory does not grow with n_latents x vocabulary.

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
"""float32 logits or cosines held at once."""

_NORM_ERROR = 1e-3


class LatentLogits(NamedTuple):
    """The ends of each latent's logits, outermost first: ids, and logits above the vocabulary's mean, each [J, n]."""

    promoted: NDArray[np.int64]
    promoted_logits: NDArray[np.float32]
    suppressed: NDArray[np.int64]
    suppressed_logits: NDArray[np.float32]
    cosine: NDArray[np.float32]
    """[J] the highest cosine to what a token's logit reads."""
    nearest: NDArray[np.int64]
    """[J] that token's id."""
    norm_folded: bool
    """Whether the final norm's gain is in it."""


def norm_gain(norm: nn.Module, d_model: int) -> tuple[Tensor, bool] | None:
    """The gain [D] of an RMSNorm or LayerNorm, however it keeps its weight, and whether it is a LayerNorm, which takes
    out the mean over d_model first; None where it is neither.

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
                return gain.clone(), centred
    return None


def token_rows(model: LoadedModel, module: nn.Module, name: str) -> Tensor:
    """The rows of an embedding or unembedding that are `model.token_ids`, float32 [V, D], less their mean."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != model.d_model:
        raise IncompatibleError(
            f"{model.spec.name} ({model.architecture}): the {name} should have a weight of {model.d_model} columns"
        )
    rows = weight[torch.from_numpy(model.token_ids).to(weight.device)].float()  # others are padding
    return rows.sub_(rows.mean(dim=0))


@torch.inference_mode()
def latent_logits(directions: Tensor, model: LoadedModel, n: int = N_TOKENS) -> LatentLogits:
    """Of each of `directions` [J, D], rows of W_dec: the n most promoted and most suppressed tokens, and the nearest.
    Raises `IncompatibleError` if the model has no unembedding with a weight [V, D]."""
    reading = token_rows(model, model.unembedding, "unembedding")  # r_v of each token of the tokenizer, [V, D]
    fold = norm_gain(model.final_norm, model.d_model)
    if fold is not None:
        gain, centred = fold
        reading *= gain.to(reading.device)
        if centred:
            reading -= reading.mean(dim=1, keepdim=True)
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
    high, highest, low, lowest, cosine, nearest = (torch.cat(c).numpy() for c in zip(*parts, strict=True))
    ids = model.token_ids
    return LatentLogits(ids[high], highest, ids[low], lowest, cosine, ids[nearest], norm_folded=fold is not None)
