"""Write a tuned lens in the published format: `config.json`, and `params.pt` with "{i}.weight" [D, D] and "{i}.bias"
[D] of the translator of each block's input. Reading is in lens.py.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harvest.model.load import LoadedModel
from store.files import atomic_write


def write_lens(
    folder: Path, model: LoadedModel, weights: Tensor, biases: Tensor, *, extra: Mapping[str, dict[str, Any]]
) -> None:
    """Write a lens for `model`, weights [L, D, D] and biases [L, D], into a folder that is there; and beside it the
    JSON files of `extra`, by name."""
    parameters: dict[str, Tensor] = {}
    for i in range(len(weights)):
        parameters[f"{i}.weight"] = weights[i].cpu().clone()
        parameters[f"{i}.bias"] = biases[i].cpu().clone()
    packed = io.BytesIO()
    torch.save(parameters, packed)
    config = {
        "base_model_name_or_path": model.spec.name,
        "d_model": model.d_model,
        "num_hidden_layers": model.n_layers,
        "bias": True,
        "base_model_revision": model.spec.revision,
        "unembed_hash": unembed_hash(model.unembedding.weight),  # type: ignore[arg-type]
        "lens_type": "linear_tuned_lens",
    }
    atomic_write(folder / "params.pt", [packed.getvalue()])
    for name, content in ({"config.json": config} | dict(extra)).items():
        atomic_write(folder / name, [(json.dumps(content, indent=1) + "\n").encode()])


def unembed_hash(weight: Tensor) -> str:
    """What the package `tuned-lens` compares to see that a lens belongs to a model: SHA-256 of the matrix [V, D] as
    numpy prints it, with one decimal and most of it left out."""
    shown = np.array_str(weight.detach().float().cpu().numpy(), precision=1)
    return hashlib.sha256(shown.encode()).hexdigest()
