"""The linear baseline: k principal components of standardised vectors, alone or as an autoencoder like any other.

Fitted on vectors that are each standardised on their own, as an autoencoder's inputs are by default. As an autoencoder,
a component c has two latents, c and -c: whichever sign the coefficient has, one of the two pre-activations is positive,
so the k largest after ReLU are the k coefficients, and the decoder adds up the mean and the projection on the k
components. So the code that measures autoencoders also measures the baseline.

Shapes: N vectors, D d_model, k components.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from train.model import MLSAE
from train.model_config import SAEConfig


@dataclass(kw_only=True)
class PCASums:
    """Sums of standardised vectors, float64; they can be pickled, for tasks on other machines."""

    n: int
    """Vectors."""
    total: Tensor
    """[D] sum of vectors."""
    gram: Tensor
    """[D, D] sum of outer products."""

    @classmethod
    def zeros(cls, d_model: int, device: torch.device | str = "cpu") -> "PCASums":
        total = torch.zeros(d_model, dtype=torch.float64, device=device)
        return cls(n=0, total=total, gram=torch.outer(total, total))

    @classmethod
    def merged(cls, parts: Sequence["PCASums"]) -> "PCASums":
        """The sum of `parts`, added in their order."""
        whole = cls(n=0, total=torch.zeros_like(parts[0].total), gram=torch.zeros_like(parts[0].gram))
        for part in parts:
            whole.n += part.n
            whole.total += part.total
            whole.gram += part.gram
        return whole

    def add(self, x_std: Tensor, product_dtype: torch.dtype = torch.float64) -> None:
        """Add vectors [N, D]; the products of a batch are computed in `product_dtype`."""
        x = x_std.to(product_dtype)
        self.n += len(x)
        self.total += x_std.double().sum(dim=0)
        self.gram += (x.T @ x).double()

    def fit(self, k: int) -> "Components":
        """The mean and the first min(k, D) principal directions."""
        mean = self.total / self.n
        covariance = self.gram / self.n - torch.outer(mean, mean)
        _, vectors = torch.linalg.eigh(covariance)  # ascending
        return Components(mean, vectors.flip(1)[:, :k].T)


class Components(NamedTuple):
    """A fitted baseline, float64."""

    mean: Tensor
    """[D] mean of the standardised vectors."""
    directions: Tensor
    """[k, D] orthonormal, largest variance first."""

    def autoencoder(self) -> MLSAE:
        """An autoencoder on the CPU with the same reconstructions as these components."""
        k = len(self.directions)
        sae = MLSAE(SAEConfig(d_model=len(self.mean), n_latents=2 * k, k=k))
        rows = torch.cat([self.directions, -self.directions]).float()
        with torch.no_grad():
            sae.W_enc.copy_(rows)
            sae.W_dec.copy_(rows)
            sae.b_pre.copy_(self.mean)
        return sae
