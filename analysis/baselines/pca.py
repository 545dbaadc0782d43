"""The baseline: principal components in place of the autoencoder, fitted and evaluated as it is.

Fitted on the training documents' vectors of all layers together, each standardised on its own as the autoencoder's
inputs are; k components and the mean reconstruct a vector, its own mean and scale map it back, and FVU is taken in raw
space. So the autoencoder has k active latents out of n_latents, and PCA the same k directions for all vectors. The sums
add over tokens; the eigenvectors of one d_model x d_model matrix are all that is solved.

Shapes: N vectors, D d_model, k components.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.quality import sum_in_order


@dataclass(frozen=True, kw_only=True)
class GramSums:
    """Additive sums of standardised vectors, float64."""

    n: NDArray[np.int64]
    """[] vectors."""

    total: NDArray[np.float64]
    """[D] sum of vectors."""

    gram: NDArray[np.float64]
    """[D, D] sum of outer products."""

    @classmethod
    def zeros(cls, d_model: int) -> "GramSums":
        """No vectors yet."""
        return cls(n=np.zeros((), np.int64), total=np.zeros(d_model), gram=np.zeros((d_model, d_model)))

    def add(self, n: int, total: NDArray[np.floating], gram: NDArray[np.floating]) -> None:
        """Add a tile's number of vectors, their sum [D] and their Gram matrix [D, D], in place."""
        self.n[...] += n
        self.total[...] += total
        self.gram[...] += gram

    @staticmethod
    def merged(parts: Sequence["GramSums"]) -> "GramSums":
        """The sum of `parts`, added in their order."""
        return GramSums(**{f.name: sum_in_order([getattr(part, f.name) for part in parts]) for f in fields(GramSums)})


class Components(NamedTuple):
    """A fitted baseline."""

    mean: NDArray[np.float64]
    """[D] mean of the standardised vectors."""

    directions: NDArray[np.float64]
    """[k, D] orthonormal, largest variance first."""


def fit(sums: GramSums, k: int) -> Components:
    """The mean and the first min(k, D) principal directions."""
    n = int(sums.n)
    mean = sums.total / n
    covariance = sums.gram / n - np.outer(mean, mean)
    _, vectors = np.linalg.eigh(covariance)  # ascending
    return Components(mean, np.ascontiguousarray(vectors[:, ::-1][:, :k].T))
