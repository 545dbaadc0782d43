"""Which token's embedding a latent's decoder row is nearest to: does the dictionary hold the tokens themselves?

    embedding_cosine_j = max over tokens v of cos(d_j, E_v - mean of E over the vocabulary)

with d_j the latent's row of W_dec and E the input embedding, centred because its rows share a large mean that says
nothing of a token. In a store that went through a tuned lens d_j is in the last layer's basis; the embedding is the
input of block 0, which the lens's translator 0 was trained on, so E_v - mean is taken through its linear part, I + W_0.

The highest of many cosines is far from 0 even for a direction that knows nothing: `chance` is its median over random
directions. Not here: the unembedding (`analysis.latents.logits`).

Shapes: J latents, D d_model, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from harvest.lens.translators import TunedLens
from harvest.model.load import LoadedModel
from residscope.errors import IncompatibleError

TILE_BYTES = 64 * 2**20
"""Cosines held at once, float32."""

N_RANDOM = 256
"""Random directions that the chance level is the median of."""


class Nearest(NamedTuple):
    """The row that each direction is nearest to."""

    cosine: NDArray[np.float32]
    """[J]"""

    row: NDArray[np.int64]
    """[J]"""


def embedding_rows(model: LoadedModel, lens: TunedLens | None) -> Tensor:
    """The centred embedding of each token of the tokenizer, float32 [V, D], through the lens where there is one. Raises
    `IncompatibleError` if the model has no embedding with a weight [V, D]."""
    weight = getattr(model.base.get_input_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != model.d_model:
        raise IncompatibleError(
            f"{model.spec.name} ({model.architecture}): the embedding should have a weight of {model.d_model} columns"
        )
    rows = weight[: len(model.tokenizer)].to(torch.float32, copy=True)
    rows -= rows.mean(dim=0)
    return rows if lens is None else rows + rows @ lens.weights[0].to(rows.device).T


@torch.inference_mode()
def nearest_rows(directions: Tensor, rows: Tensor) -> Nearest:
    """The row of `rows` [V, D] with the highest cosine to each of `directions` [J, D]; a row of zeros has cosine 0 to
    all."""
    rows = normalize(rows, dim=1)
    step = max(1, TILE_BYTES // (4 * len(rows)))
    parts = [
        (normalize(directions[start : start + step].to(rows), dim=1) @ rows.T).max(dim=1)
        for start in range(0, len(directions), step)
    ]
    return Nearest(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def random_directions(d_model: int, seed: int) -> Tensor:
    """`N_RANDOM` directions [N_RANDOM, D], drawn evenly from all."""
    return torch.randn(N_RANDOM, d_model, generator=torch.Generator().manual_seed(seed))
