"""The transformer and the lens that a store was harvested with, loaded again for analyses that run the model.

How: the store's provenance names the model, its commit or the hash of its files, the format it ran in, and the lens;
what is loaded must be the same, otherwise every number would be of another model. If there is no hash to compare (a
local copy of a hub model), `harvest.model.checks` compares the model's activations with the store's. The store knows a
local model or lens by its folder's name only: its path is in the file with the harvest's options next to the store, or
given by the caller. Tested in test_downstream.py.
"""

from pathlib import Path
from typing import Any

import torch

from harvest.lens.translators import Indexing, TunedLens, load_lens
from harvest.model.checks import refuse_other_sizes, refuse_other_weights
from harvest.model.load import LoadedModel, load_model
from harvest.model.names import ModelSpec, resolve_model
from harvest.options_file import options_file, recorded_place
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from store.activations import ActivationStore
from train.hardware import resolve_device


def load_of_store(store: ActivationStore, spec: ModelSpec, *, device: str = "auto") -> LoadedModel:
    """Load the model `spec` (from `spec_of_store`) in the harvest's dtype; `IncompatibleError` if its sizes differ."""
    dtype = getattr(torch, store.meta.provenance.get("compute_dtype", "float32"))
    model = load_model(spec, dtype=dtype, device=resolve_device(device))
    refuse_other_sizes(store, model)
    return model


def spec_of_store(store: ActivationStore, name: str | None = None, *, offline: bool = False) -> ModelSpec:
    """Find the model that `store` was harvested from, without loading its weights.

    name: where the model is (a folder or GGUF file), if its name in the store is not enough. offline: look for a hub
    model in the local cache only. Raises `UsageError` if it is not found, `IncompatibleError` if it is another model or
    has other weights.
    """
    provenance = store.meta.provenance
    model, revision = str(provenance.get("model")), provenance.get("model_revision")
    source: str | None = provenance.get("model_source")
    weights: dict[str, Any] = {
        "random_init": bool(provenance.get("random_init", False)),
        "seed": int(provenance.get("seed") or 0),
    }
    if name is None and source == "hub" and offline:
        if provenance.get("adapter"):  # Its base model is known only to the hub; without it the adapter would be lost.
            raise UsageError(f"{model} has an adapter, which is only loaded on request: give --model")
        return ModelSpec(name=model, source="hub", location=model, revision=revision, cached_only=True, **weights)
    if name is None and source != "hub":
        name = recorded_place(store.path, "model")
    is_local = Path(name or model).expanduser().exists()
    if name is None and source == "folder" and not is_local:
        # A hub model may have the folder's name.
        raise UsageError(
            f"{store.path} was harvested from the folder {model!r}, which was not found, neither here nor through "
            f"{options_file(store.path).name} next to the store: give its path with --model"
        )
    try:
        found = resolve_model(name or model, revision=None if is_local else revision, **weights)
    except UsageError as error:
        if name is not None:
            raise
        raise UsageError(f"{error}; {store.path} was harvested from {model!r}: give its path with --model") from None
    refuse_other_weights(found, store)
    return found


def lens_of_store(store: ActivationStore, name: str | None = None) -> TunedLens | None:
    """The lens that was applied to `store`'s vectors, or None.

    name: where the lens is, if it came from a local folder. Raises `UsageError` if it is not found, `IncompatibleError`
    if it is another lens.
    """
    if (described := store.meta.lens) is None:
        return None
    indexing: Indexing = described.get("indexing", "tuned-lens")
    name = name or recorded_place(store.path, "lens")
    try:
        lens = load_lens(
            name or str(described.get("id")),
            model_id=str(store.meta.provenance.get("model")),
            n_layers=store.meta.n_model_layers,
            d_model=store.meta.d_model,
            indexing=indexing,
        )
    except IncompatibleError:
        raise
    except ResidscopeError as error:
        if name is not None:
            raise
        lens_id = described.get("id")
        raise UsageError(f"{error}; {store.path} went through lens {lens_id!r}: give its path with --lens") from None
    if lens.fingerprint != described.get("hash"):
        wanted = f"be {described.get('hash')}, as {store.path} was harvested with"
        raise IncompatibleError(f"lens {lens.name}: its hash should {wanted}, found {lens.fingerprint}")
    return lens
