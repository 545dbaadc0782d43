"""Made-up sparse codes, their sums, and the same codes as dense matrices."""

import numpy as np
import torch
from torch import Tensor

from analysis.moments import LayerMoments


def random_codes(rng, n_tokens, n_layers, k, n_latents, silent=0.3):
    """Codes [T, L, k] with distinct latents in a vector, some of them silent (value 0, as ReLU leaves them)."""
    indices = np.argsort(rng.random((n_tokens, n_layers, n_latents)), axis=-1)[..., :k]
    values = rng.gamma(1.0, 3.0, (n_tokens, n_layers, k)) * (rng.random((n_tokens, n_layers, k)) > silent)
    return values, indices


def moments_of(values, indices, n_latents, layers=None, group=None):
    layers = range(values.shape[1]) if layers is None else layers
    moments = LayerMoments.zeros(list(layers), n_latents, [0] if group is None else group.tolist())
    moments.add(values, indices, group)
    return moments


def planted(profiles, n_latents):
    """Codes in which latent j of token t has the profile profiles[t, j] [T, M, L]: k = M, every latent in every
    vector."""
    profiles = np.asarray(profiles, np.float64)
    values = np.moveaxis(profiles, 1, 2)
    return values, np.broadcast_to(np.arange(n_latents), values.shape).copy()


def dense(values: Tensor, indices: Tensor, m: int) -> Tensor:
    """Codes [N, k] of m latents as [N, M]; a latent that is named twice in a row counts twice."""
    return values.new_zeros(len(values), m).scatter_add(1, indices, values)


def exact_draws(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """64ths from -2 to 2. Products of a few dozen are exact, so that equal rows give equal pre-activations whatever a
    product's shape, library or processor; those of other numbers may differ in the last bit, and tie on one machine
    only."""
    return torch.randint(-128, 129, shape, generator=generator).to(dtype) / 64
