"""The baseline: principal components in place of the autoencoder, fitted and evaluated as it is.

Fitted on the training documents' vectors of all layers together, each standardised on its own as the autoencoder's
inputs are; k components and the mean reconstruct a vector, its own mean and scale map it back, and FVU is taken in raw
space. So the autoencoder has k active latents out of n_latents, and PCA the same k directions for all vectors. The sums
add over tokens; the eigenvectors of one d_model x d_model matrix are all that is solved. Tested in
tests/analysis/test_quality.py.

Shapes: T tokens, L layers, D d_model, k components.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.quality import sum_fields


@dataclass(frozen=True, kw_only=True)
class PcaSums:
    """Additive sums of standardised vectors, float64."""

    n: NDArray[np.int64]
    """[] vectors."""
    total: NDArray[np.float64]
    """[D] sum of vectors."""
    gram: NDArray[np.float64]
    """[D, D] sum of outer products."""

    @classmethod
    def zeros(cls, d_model: int) -> "PcaSums":
        """No vectors yet."""
        return cls(n=np.zeros((), np.int64), total=np.zeros(d_model), gram=np.zeros((d_model, d_model)))

    def add(self, vectors: Tensor, chosen: NDArray[np.bool_]) -> None:
        """Add the tokens `chosen` [T] of vectors [T, L, D], in place; the product in their type, the sum in float64."""
        if not chosen.any():
            return
        part = vectors if chosen.all() else vectors[torch.from_numpy(chosen)]
        rows = part.reshape(-1, part.shape[-1])
        self.n[...] += len(rows)
        self.total[...] += rows.sum(dim=0, dtype=torch.float64).numpy()
        self.gram[...] += (rows.T @ rows).double().numpy()

    @staticmethod
    def merged(parts: Sequence["PcaSums"]) -> "PcaSums":
        """The sum of `parts`, added in their order."""
        return sum_fields(parts)


class Components(NamedTuple):
    """A fitted baseline."""

    mean: NDArray[np.float64]
    """[D] mean of the standardised vectors."""
    directions: NDArray[np.float64]
    """[k, D] orthonormal, largest variance first."""


def fit(sums: PcaSums, k: int) -> Components:
    """The mean and the first min(k, D) principal directions."""
    n = int(sums.n)
    mean = sums.total / n
    covariance = sums.gram / n - np.outer(mean, mean)
    _, vectors = np.linalg.eigh(covariance)  # ascending
    return Components(mean, np.ascontiguousarray(vectors[:, ::-1][:, :k].T))
