"""latent_logits.parquet: the tokens that each live latent writes and is nearest to, as text.

How: `analysis.latents.logits` and `analysis.latents.embedding_match` find token ids; here they become text and columns,
and medians for the summary. Not here: what the numbers mean.

Shapes: J live latents, n tokens at each end.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.latents.embedding_match import Nearest, embedding_rows, nearest_rows, random_directions
from analysis.latents.logits import LatentLogits, latent_logits
from analysis.model.token_text import TokenBytes
from harvest.lens.translators import TunedLens
from harvest.model.load import LoadedModel
from train.model import MLSAE

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


def find_latent_tokens(
    sae: MLSAE, latents: NDArray[np.int64], model: LoadedModel, lens: TunedLens | None, seed: int
) -> LatentTokens:
    """Of `latents` [J], one at least. Raises `IncompatibleError` if the model's embedding or unembedding is not to be
    found."""
    directions, random = sae.W_dec.detach()[latents], random_directions(model.d_model, seed)
    embedding = embedding_rows(model, lens)
    return LatentTokens(
        latents=latents,
        logits=latent_logits(directions, model),
        embedding=nearest_rows(directions, embedding),
        chance_unembedding=float(np.median(latent_logits(random, model).cosine)),
        chance_embedding=float(np.median(nearest_rows(random, embedding).cosine)),
    )


def summary_of(found: LatentTokens | None) -> dict[str, Any] | None:
    """The medians over live latents, for summary.json."""
    if found is None:
        return None
    return {
        "norm_folded": found.logits.norm_folded,
        "unembedding_cosine": float(np.median(found.logits.cosine)),
        "unembedding_chance": found.chance_unembedding,
        "embedding_cosine": float(np.median(found.embedding.cosine)),
        "embedding_chance": found.chance_embedding,
    }


def write_latent_tokens(path: Path, found: LatentTokens, tokenizer: Any) -> None:
    """Write latent_logits.parquet; whether the norm was folded is in the file's metadata."""
    token_bytes, logits = TokenBytes(tokenizer), found.logits

    def texts(ids: NDArray[np.int64]) -> list[str]:
        return [data.decode(errors="replace") for data in token_bytes.get(ids.ravel())]

    def lists(ids: NDArray[np.int64]) -> list[list[str]]:
        flat = texts(ids)
        return [flat[i : i + ids.shape[1]] for i in range(0, len(flat), ids.shape[1])]

    columns = [
        found.latents,
        lists(logits.promoted),
        logits.promoted_logits.tolist(),
        lists(logits.suppressed),
        logits.suppressed_logits.tolist(),
        texts(logits.nearest),
        logits.cosine,
        texts(found.embedding.row),
        found.embedding.cosine,
    ]
    table = pa.table(dict(zip(COLUMNS.names, columns, strict=True)), schema=COLUMNS)
    metadata = {"norm_folded": str(logits.norm_folded).lower()}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")
