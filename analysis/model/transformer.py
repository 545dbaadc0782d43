"""The transformer and the lens that a store was harvested with, loaded again for analyses that run the model.

How: the store's provenance names the model, its commit or the hash of its files, the format it ran in, and the lens;
what is loaded must be the same, else every number would speak of another model. Where a hash tells nothing (a local
copy of a hub model), `harvest.model.checks` compares what the model gives with what the store holds. A model or lens
that came from a local folder is known to the store by name only: the file with the harvest's options beside the store
says where it is, or the caller. Tested in test_downstream.py.
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
    """The weights of `spec` of `spec_of_store`, in the format of the harvest; `IncompatibleError` for other sizes."""
    dtype = getattr(torch, store.meta.provenance.get("compute_dtype", "float32"))
    model = load_model(spec, dtype=dtype, device=resolve_device(device))
    refuse_other_sizes(store, model)
    return model


def spec_of_store(store: ActivationStore, name: str | None = None, *, offline: bool = False) -> ModelSpec:
    """Which model `store` was harvested from, found again; no weights are loaded yet.

    name: where the model is, if the store's own word for it is not enough (a folder, a GGUF file). offline: a model of
    the hub is looked for in the local cache only. Raises `UsageError` where it is not found, `IncompatibleError` where
    it is another model or other weights.
    """
    provenance = store.meta.provenance
    model, revision = str(provenance.get("model")), provenance.get("model_revision")
    source: str | None = provenance.get("model_source")
    weights: dict[str, Any] = {
        "random_init": bool(provenance.get("random_init", False)),
        "seed": int(provenance.get("seed") or 0),
    }
    if name is None and source == "hub" and offline:
        if provenance.get("adapter"):  # Without its base, which only the hub can tell, it would be left out.
            raise UsageError(f"{model} has an adapter, which is not looked for unless it is asked for: give --model")
        return ModelSpec(name=model, source="hub", location=model, revision=revision, cached_only=True, **weights)
    if name is None and source != "hub":
        name = recorded_place(store.path, "model")
    is_local = Path(name or model).expanduser().exists()
    if name is None and source == "folder" and not is_local:
        # By the folder's name alone a model of the hub might be taken for it.
        raise UsageError(
            f"{store.path} was harvested from the folder {model!r}, which was not found (nor a folder in "
            f"{options_file(store.path).name} beside the store): give its path with --model"
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
    """The lens that `store`'s vectors went through, or None where they went through none.

    name: where the lens is, if it came from a local folder. Raises `UsageError` where it is not found,
    `IncompatibleError` where it is another lens.
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
