"""Lenses in the published format, and vectors that a lens can be fitted on."""

import json
from pathlib import Path
from typing import Any

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


def write_lens(folder: Path, *, n_layers: int = 4, d_model: int = 8, seed: int = 0, **config: Any) -> Path:
    """A random lens in the published format."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for i in range(n_layers):
        parameters[f"{i}.weight"] = torch.randn(d_model, d_model, generator=generator) / d_model
        parameters[f"{i}.bias"] = torch.randn(d_model, generator=generator)
    folder.mkdir(exist_ok=True)
    torch.save(parameters, folder / "params.pt")
    full = {
        "base_model_name_or_path": "owner/tiny",
        "d_model": d_model,
        "num_hidden_layers": n_layers,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": "0",
        "lens_type": "linear_tuned_lens",
    }
    (folder / "config.json").write_text(json.dumps(full | config))
    return folder
