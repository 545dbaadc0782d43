"""The tokens of each live latent: those that it writes, those that it is nearest to, and latent_logits.parquet.

What a latent writes, and the token whose logit it is nearest to, come from `analysis.latents.logits`. Here also the
token whose embedding the latent's decoder row is nearest to, which says whether the dictionary holds tokens themselves:

    embedding_cosine_j = max over tokens v of cos(d_j, E_v - mean of E over the vocabulary)

with d_j the latent's row of W_dec and E the input embedding, centred because its rows share a large mean that says
nothing of a token. In a store that went through a tuned lens d_j is in the last layer's basis; the embedding is the
input of block 0, which the lens's translator 0 was trained on, so E_v - mean is taken through its linear part, I + W_0.

The highest of many cosines is far from 0 even for a direction that knows nothing: `chance` is its median over random
directions.

Shapes: J latents, D d_model, V vocabulary, n tokens at each end.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from analysis.latents.logits import TILE_BYTES, LatentLogits, latent_logits, token_rows
from harvest.lens.translators import TunedLens
from harvest.model.load import LoadedModel
from harvest.model.tokenizer import Tokenizer
from train.model import MLSAE

N_RANDOM = 256
"""Random directions that the chance level is the median of."""

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
"""One row for each live latent; tokens as text, the most extreme first."""


class Nearest(NamedTuple):
    """The row or token that each direction is nearest to, and the cosine, each [J]."""

    cosine: NDArray[np.float32]
    token: NDArray[np.int64]


class LatentTokens(NamedTuple):
    """Of each live latent."""

    latents: NDArray[np.int64]
    """[J] ascending."""
    logits: LatentLogits
    embedding: Nearest
    chance_unembedding: float
    """Median over random directions of the highest cosine to what a token's logit reads."""
    chance_embedding: float
    """The same to a token's embedding."""

    def summary(self) -> dict[str, Any]:
        """The medians over live latents, for summary.json."""
        return {
            "norm_folded": self.logits.norm_folded,
            "unembedding_cosine": float(np.median(self.logits.cosine)),
            "unembedding_chance": self.chance_unembedding,
            "embedding_cosine": float(np.median(self.embedding.cosine)),
            "embedding_chance": self.chance_embedding,
        }


def find_latent_tokens(
    sae: MLSAE, latents: NDArray[np.int64], model: LoadedModel, lens: TunedLens | None, seed: int
) -> LatentTokens:
    """Of `latents` [J], one at least. `IncompatibleError` if the model's embedding or unembedding is not found."""
    directions = sae.W_dec.detach()[latents]
    random = torch.randn(N_RANDOM, model.d_model, generator=torch.Generator().manual_seed(seed))
    embedding = embedding_rows(model, lens)
    nearest = nearest_rows(directions, embedding)
    return LatentTokens(
        latents=latents,
        logits=latent_logits(directions, model),
        embedding=nearest._replace(token=model.token_ids[nearest.token]),
        chance_unembedding=float(np.median(latent_logits(random, model).cosine)),
        chance_embedding=float(np.median(nearest_rows(random, embedding).cosine)),
    )


def embedding_rows(model: LoadedModel, lens: TunedLens | None) -> Tensor:
    """The centred embedding of each of `model.token_ids`, float32 [V, D], through the lens where there is one. Raises
    `IncompatibleError` if the model has no embedding with a weight [V, D]."""
    rows = token_rows(model, model.base.get_input_embeddings(), "embedding")
    return rows if lens is None else rows + rows @ lens.weights[0].to(rows.device).T


@torch.inference_mode()
def nearest_rows(directions: Tensor, rows: Tensor) -> Nearest:
    """The row of `rows` [V, D] of the highest cosine to each of `directions` [J, D]; of a row of zeros it is 0."""
    rows = normalize(rows, dim=1)
    step = max(1, TILE_BYTES // (4 * len(rows)))
    parts = [
        (normalize(directions[start : start + step].to(rows), dim=1) @ rows.T).max(dim=1)
        for start in range(0, len(directions), step)
    ]
    return Nearest(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def write_latent_tokens(path: Path, found: LatentTokens, tokenizer: Tokenizer) -> None:
    """Write latent_logits.parquet; whether the norm was folded is in the file's metadata."""
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
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")
