"""A small store and a random autoencoder that fits it, written to a folder, and analyses of them."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.config import AnalyzeConfig
from analysis.run import analyze
from residscope.options import from_flat
from store.activations import ActivationStore
from tests.support.stores import make_store, random_activations
from train.checkpoint import save_checkpoint
from train.model import MLSAE, SAEConfig

LAYERS = (2, 3, 5, 8)
"""Layers of the small store, of a model with ten."""

VALIDATION = {"fraction": 0.2, "seed": 5}


class Small(NamedTuple):
    """Where the small store and checkpoint are, and what is in them."""

    store: Path
    sae: Path
    x: NDArray[np.float32]
    """[T, L, D] as stored."""

    keep: NDArray[np.bool_]
    document: NDArray[np.int32]
    weights: MLSAE


def make_small(
    folder: Path,
    *,
    n_tokens: int = 300,
    d_model: int = 12,
    n_latents: int = 24,
    k: int = 3,
    n_documents: int = 30,
    trained_on: dict[str, Any] | None = None,
    **changes: Any,
) -> Small:
    """float32 store of several shards; one token in seven is not kept. `trained_on` changes what the checkpoint
    records; `changes` are fields of the store's meta."""
    rng = np.random.default_rng(3)
    x = random_activations(n_tokens, len(LAYERS), d_model)
    document = np.sort(rng.integers(0, n_documents, n_tokens)).astype(np.int32)
    document[[0, -1]] = 0, n_documents - 1
    keep = rng.random(n_tokens) > 1 / 7
    store = make_store(
        folder / "acts.zarr",
        x,
        document=document,
        keep=keep,
        **{
            "layers": LAYERS,
            "n_model_layers": 10,
            "stored_dtype": "float32",
            "chunk_tokens": 16,
            "shard_tokens": 48,
            **changes,
        },
    )
    sae = MLSAE(SAEConfig(d_model=d_model, n_latents=n_latents, k=k))
    sae.initialize(1, torch.from_numpy(rng.normal(size=d_model).astype(np.float32)) * 0.1)
    save_small(folder / "ckpt.pt", sae, store, trained_on or {})
    return Small(store.path, folder / "ckpt.pt", x, keep, document, sae)


def save_small(path: Path, sae: MLSAE, store: ActivationStore, changes: dict[str, Any]) -> None:
    """A checkpoint of `sae` that says it was trained on `store`."""
    trained_on = {
        "content_hash": store.content_hash,
        "path": store.path.name,
        "d_model": store.meta.d_model,
        "layers": list(store.meta.layers),
        "model": store.meta.provenance["model"],
        "lens": store.meta.lens,
        "validation": {**VALIDATION, "n_documents": int(store.tokens.document.max()) + 1},
        **changes,
    }
    save_checkpoint(path, sae, store=trained_on, trainer={})


def analyze_config(**flags: Any) -> AnalyzeConfig:
    """A configuration from its flags' values."""
    return from_flat(AnalyzeConfig, flags)


def run_small(small: Small, out: Path, **flags: Any) -> dict[str, Any]:
    """summary.json of an analysis in float64, without a report unless it is asked for."""
    given = {"dtype": "float64", "report": False, **flags}
    return analyze(analyze_config(store=small.store, sae=small.sae, out=out, **given))
