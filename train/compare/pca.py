"""The linear baseline: k principal components, as an autoencoder like any other.

Fitted on vectors standardised each by itself, as an autoencoder's inputs are by default. A component c has two
latents, c and -c: one of the two pre-activations is positive, whichever sign the coefficient has, so that the k
largest after ReLU are the k coefficients, and the decoder adds them up to the mean plus the projection on k
components. So the baseline is measured by the very code that measures autoencoders, and can be saved and analysed as
one.

Shapes: N vectors, D d_model, k components.
"""

import torch
from torch import Tensor

from train.model import MLSAE, SAEConfig


class GramSums:
    """Sums of standardised vectors, in float64; add any number of batches, then fit for any k."""

    def __init__(self, d_model: int, device: torch.device | str = "cpu") -> None:
        self._n = 0
        self._total = torch.zeros(d_model, dtype=torch.float64, device=device)
        self._gram = torch.zeros(d_model, d_model, dtype=torch.float64, device=device)

    def add(self, x_std: Tensor) -> None:
        """Count vectors [N, D]."""
        x = x_std.double()
        self._n += len(x)
        self._total += x.sum(dim=0)
        self._gram += x.T @ x

    def fit(self, k: int) -> MLSAE:
        """The mean and the first min(k, D) principal directions, as an autoencoder on the CPU."""
        mean = self._total / self._n
        covariance = self._gram / self._n - torch.outer(mean, mean)
        _, vectors = torch.linalg.eigh(covariance)  # ascending
        directions = vectors.flip(1)[:, :k].T  # [k, D]
        sae = MLSAE(SAEConfig(d_model=len(mean), n_latents=2 * len(directions), k=len(directions)))
        rows = torch.cat([directions, -directions]).float()
        with torch.no_grad():
            sae.W_enc.copy_(rows)
            sae.W_dec.copy_(rows)
            sae.b_pre.copy_(mean)
        return sae
