"""What a latent does to the output by the direct path: the tokens that its decoder row promotes and suppresses most.

    logits_j = U (gain * d_j)     minus their mean over the vocabulary (a constant changes no probability)

with d_j the latent's row of W_dec and U the unembedding. Where the final norm is a plain RMSNorm or LayerNorm its gain
is folded in (and for LayerNorm d_j is centred first, as the norm does); its division by the vector's scale, its bias,
what later blocks make of the direction, and a soft cap on the logits are left out. So the order of tokens means
something, and the size only within one latent. In a store that went through a tuned lens d_j is in the last layer's
basis, which is what the lens is for; without one this is the logit lens, and says little of early layers.

How: a tile of latents at a time, so that memory does not grow with n_latents x vocabulary. Not here: causal effects of
steering a latent.

Shapes: J latents, D d_model, V vocabulary.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from analysis.token_text import TokenBytes
from harvest.models import LoadedModel
from store.errors import ResidscopeError

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


@torch.inference_mode()
def latent_logits(directions: Tensor, model: LoadedModel, n: int = N_TOKENS) -> LatentLogits:
    """The n most promoted and most suppressed tokens of each of `directions` [J, D], rows of W_dec. Raises
    `ResidscopeError` if the model has no unembedding with a weight [V, D]."""
    weight = getattr(model.unembedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != model.d_model:
        raise ResidscopeError(
            f"{model.spec.name} ({model.architecture}): the unembedding should have a weight of {model.d_model} columns"
        )
    unembedding = weight[: len(model.tokenizer)].float()  # rows beyond the tokenizer are padding
    fold = norm_gain(model.final_norm, model.d_model)
    centre = unembedding.mean(dim=0)
    rows = max(1, TILE_BYTES // (4 * len(unembedding)))
    parts: list[list[Tensor]] = []
    for start in range(0, len(directions), rows):
        d = directions[start : start + rows].to(model.device, torch.float32)
        if fold is not None:
            d = (d - d.mean(dim=-1, keepdim=True) if fold.centred else d) * fold.gain.to(model.device)
        logits = d @ unembedding.T - (d @ centre)[:, None]
        high, low = logits.topk(n), logits.topk(n, largest=False)
        parts.append([high.indices.cpu(), high.values.cpu(), low.indices.cpu(), low.values.cpu()])
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    return LatentLogits(*columns, norm_folded=fold is not None)


COLUMNS = pa.schema(
    [
        ("latent", pa.int64()),
        ("promoted", pa.list_(pa.string())),
        ("promoted_logits", pa.list_(pa.float32())),
        ("suppressed", pa.list_(pa.string())),
        ("suppressed_logits", pa.list_(pa.float32())),
    ]
)
"""latent_logits.parquet: one row for each live latent; tokens as text, the most extreme first."""


def write_latent_logits(path: Path, latents: NDArray[np.int64], found: LatentLogits, tokenizer: Any) -> None:
    """Write latent_logits.parquet of `latents` [J]; whether the norm was folded is in the file's metadata."""
    token_bytes = TokenBytes(tokenizer)

    def texts(ids: NDArray[np.int64]) -> list[list[str]]:
        flat = [data.decode(errors="replace") for data in token_bytes.get(ids.ravel())]
        return [flat[i : i + ids.shape[1]] for i in range(0, len(flat), ids.shape[1])]

    columns = [
        latents,
        texts(found.promoted),
        found.promoted_logits.tolist(),
        texts(found.suppressed),
        found.suppressed_logits.tolist(),
    ]
    table = pa.table(dict(zip(COLUMNS.names, columns, strict=True)), schema=COLUMNS)
    metadata = {"norm_folded": str(found.norm_folded).lower()}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")
