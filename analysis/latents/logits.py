"""A latent's direct effect on the output: the tokens that its decoder row promotes and suppresses most, and the token
that it is closest to.

    r_v = gain * (U_v - mean of U over the vocabulary)      the direction that token v's logit reads
    logits_j[v] = r_v . d_j                                 (a constant over v changes no probability)
    unembedding_cosine_j = max over v of cos(d_j, r_v)

with d_j the latent's row of W_dec and U the unembedding. If the final norm is a plain RMSNorm or LayerNorm, its gain is
folded in (and for LayerNorm r_v is centred over d_model, as the norm centres its input). Left out are the norm's
division by the vector's scale, its bias, the effect of later blocks, and a soft cap on the logits: so the order of
tokens is meaningful, but sizes can only be compared within one latent. If the store was harvested through a tuned lens,
d_j is in the last layer's basis, which is the purpose of the lens; otherwise this is the logit lens, which says little
about early layers.

Also the token whose embedding is closest to the row, to see whether the dictionary has latents for tokens themselves:

    embedding_cosine_j = max over tokens v of cos(d_j, E_v - mean of E over the vocabulary)

with E the input embedding, centred because its rows share a large mean that has nothing to do with the token. With a
lens, E_v - mean is first mapped by the linear part, I + W_0, of translator 0, which was trained on the input of
block 0. The highest of many cosines is far from 0 even for a random direction: `chance` is its median over those.

How: a tile of latents at a time, so that memory does not grow with n_latents x vocabulary.

Shapes: J latents, D d_model, V vocabulary, n tokens at each end.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from analysis.results.tables import write_table
from harvest.lens.translators import TunedLens
from harvest.model.load import LoadedModel
from harvest.model.tokenizer import Tokenizer
from residscope.errors import IncompatibleError
from train.model import MLSAE

N_TOKENS = 10
"""Tokens shown at each end."""

TILE_BYTES = 64 * 2**20
"""Bytes of the float32 logits or cosines held at once."""

_NORM_ERROR = 1e-3


class LatentLogits(NamedTuple):
    """The ends of each latent's logits, outermost first: ids, and logits above the vocabulary's mean, each [J, n]."""

    promoted: NDArray[np.int64]
    promoted_logits: NDArray[np.float32]
    suppressed: NDArray[np.int64]
    suppressed_logits: NDArray[np.float32]
    cosine: NDArray[np.float32]
    """[J] the highest cosine with the direction that a token's logit reads."""
    nearest: NDArray[np.int64]
    """[J] that token's id."""
    norm_folded: bool
    """Whether the final norm's gain is folded in."""


def norm_gain(norm: nn.Module, d_model: int) -> tuple[Tensor, bool] | None:
    """The gain [D] of an RMSNorm or LayerNorm, in whatever form it stores its weight, and whether it is a LayerNorm,
    which subtracts the mean over d_model first; None if it is neither.

    How: the norm maps a vector with mean 0 and mean square 1 to gain * vector + bias; checked on other vectors.
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
    """The rows of an embedding or unembedding for `model.token_ids`, float32 [V, D], minus their mean."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != model.d_model:
        wanted = f"a weight of {model.d_model} columns"
        raise IncompatibleError(f"{model.spec.name} ({model.architecture}): the {name} should have {wanted}")
    rows = weight[torch.from_numpy(model.token_ids).to(weight.device)].float()  # others are padding
    return rows.sub_(rows.mean(dim=0))


@torch.inference_mode()
def latent_logits(directions: Tensor, model: LoadedModel, n: int = N_TOKENS) -> LatentLogits:
    """For each of `directions` [J, D] (rows of W_dec), the n most promoted and most suppressed tokens, and the closest.
    Raises `IncompatibleError` if the model has no unembedding with a weight [V, D]."""
    reading = token_rows(model, model.unembedding, "unembedding")  # [V, D] r_v for each of the tokenizer's tokens
    if (fold := norm_gain(model.final_norm, model.d_model)) is not None:
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


N_RANDOM = 256
"""Random directions for the chance level."""

COLUMNS = pa.schema(
    [
        ("latent", pa.int64()),
        ("promoted", pa.list_(pa.string())),
        ("promoted_logits", pa.list_(pa.float32())),
        ("suppressed", pa.list_(pa.string())),
        ("suppressed_logits", pa.list_(pa.float32())),
        ("unembedding_token", pa.string()),
        ("unembedding_cosine", pa.float32()),
        ("embedding_token", pa.string()),
        ("embedding_cosine", pa.float32()),
    ]
)
"""latent_logits.parquet: one row for each live latent; tokens as text, the most extreme first."""


class Nearest(NamedTuple):
    """The row or token closest to each direction, and the cosine, each [J]."""

    cosine: NDArray[np.float32]
    token: NDArray[np.int64]


class LatentTokens(NamedTuple):
    """The tokens of each live latent."""

    latents: NDArray[np.int64]
    """[J] ascending."""
    logits: LatentLogits
    embedding: Nearest
    chance_unembedding: float
    """Median over random directions of the highest cosine with the direction that a token's logit reads."""
    chance_embedding: float
    """The same for tokens' embeddings."""
    chance_99: float
    """The 99 % quantile in place of the median of `chance_unembedding`."""

    def summary(self) -> dict[str, Any]:
        """The medians over live latents, for summary.json."""
        return {
            "norm_folded": self.logits.norm_folded,
            "unembedding_cosine": float(np.median(self.logits.cosine)),
            "unembedding_chance": self.chance_unembedding,
            "unembedding_chance_99": self.chance_99,
            "above_chance": int((self.logits.cosine > self.chance_99).sum()),
            "embedding_cosine": float(np.median(self.embedding.cosine)),
            "embedding_chance": self.chance_embedding,
        }


def find_latent_tokens(
    sae: MLSAE, latents: NDArray[np.int64], model: LoadedModel, lens: TunedLens | None, seed: int
) -> LatentTokens:
    """The tokens of `latents` [J], which must not be empty. `IncompatibleError` if the model's embedding or unembedding
    is not found."""
    directions = sae.W_dec.detach()[latents]
    random = torch.randn(N_RANDOM, model.d_model, generator=torch.Generator().manual_seed(seed))
    embedding, by_chance = embedding_rows(model, lens), latent_logits(random, model).cosine
    nearest = nearest_rows(directions, embedding)
    return LatentTokens(
        latents=latents,
        logits=latent_logits(directions, model),
        embedding=nearest._replace(token=model.token_ids[nearest.token]),
        chance_unembedding=float(np.median(by_chance)),
        chance_99=float(np.quantile(by_chance, 0.99)),
        chance_embedding=float(np.median(nearest_rows(random, embedding).cosine)),
    )


def embedding_rows(model: LoadedModel, lens: TunedLens | None) -> Tensor:
    """The centred embedding of each of `model.token_ids`, float32 [V, D], mapped through the lens if there is one.
    Raises `IncompatibleError` if the model has no embedding with a weight [V, D]."""
    rows = token_rows(model, model.base.get_input_embeddings(), "embedding")
    return rows if lens is None else rows + rows @ lens.weights[0].to(rows.device).T


@torch.inference_mode()
def nearest_rows(directions: Tensor, rows: Tensor) -> Nearest:
    """The row of `rows` [V, D] with the highest cosine to each of `directions` [J, D]; that of a row of zeros is 0."""
    rows = normalize(rows, dim=1)
    step = max(1, TILE_BYTES // (4 * len(rows)))
    parts = [(normalize(part.to(rows), dim=1) @ rows.T).max(dim=1) for part in directions.split(step)]
    return Nearest(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def write_latent_tokens(path: Path, found: LatentTokens, tokenizer: Tokenizer) -> None:
    """Write latent_logits.parquet, with whether the norm was folded in its metadata."""
    logits = found.logits

    def lists(ids: NDArray[np.int64]) -> list[list[str]]:
        flat = tokenizer.text(ids.ravel())
        return [flat[i : i + ids.shape[1]] for i in range(0, len(flat), ids.shape[1])]

    columns = [
        found.latents,
        lists(logits.promoted),
        logits.promoted_logits.tolist(),
        lists(logits.suppressed),
        logits.suppressed_logits.tolist(),
        tokenizer.text(logits.nearest),
        logits.cosine,
        tokenizer.text(found.embedding.token),
        found.embedding.cosine,
    ]
    table = pa.table(dict(zip(COLUMNS.names, columns, strict=True)), schema=COLUMNS)
    metadata = {"norm_folded": str(logits.norm_folded).lower()}
    write_table(table.replace_schema_metadata(metadata), path)
