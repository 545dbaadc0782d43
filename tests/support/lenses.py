"""Vectors that a lens can be fitted on."""

import torch
from torch import Tensor


def correlated(n: int, d_model: int, *, seed: int = 0, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Vectors x [n, D] with correlated components and an offset, and y [n, D]: one linear map of them for all seeds,
    with noise. float32."""
    fixed = torch.Generator().manual_seed(99)
    mix = torch.randn(d_model, d_model, generator=fixed)
    map_, offset = torch.randn(d_model, d_model, generator=fixed), torch.randn(d_model, generator=fixed)
    own = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_model, generator=own) @ mix + 3
    return x, x @ map_ + offset + noise * torch.randn(n, d_model, generator=own)
