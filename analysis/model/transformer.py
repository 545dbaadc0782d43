"""The transformer and the lens that a store was harvested with, loaded again for analyses that run the model.

How: the store's provenance names the model, its commit or the hash of its files, the format it ran in, and the lens;
what is loaded must be the same, else every number would speak of another model. Where a hash tells nothing (a local
copy of a hub model), `harvest.model.checks` compares what the model gives with what the store holds. A model or lens
that came from a local folder is known to the store by name only: where it lies says the file with the harvest's options
beside the store, or the caller. Tested in tests/analysis/model/test_downstream.py.
"""

from pathlib import Path

import torch

from harvest.lens.translators import Indexing, TunedLens, load_lens
from harvest.model.checks import refuse_other_weights
from harvest.model.load import LoadedModel, load_model
from harvest.model.names import ModelSpec, resolve_model
from harvest.options_file import options_file, recorded_place
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from store.activations import ActivationStore


def load_of_store(
    store: ActivationStore,
    spec: ModelSpec,
    *,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """The weights of `spec`, which `spec_of_store` gave, in the format that they ran in when `store` was harvested."""
    dtype = getattr(torch, store.meta.provenance.get("compute_dtype", "float32"))
    return load_model(spec, dtype=dtype, device=device)


def spec_of_store(store: ActivationStore, name: str | None = None, *, offline: bool = False) -> ModelSpec:
    """Which model `store` was harvested from, found again; no weights are loaded yet.

    name: where the model is, if the store's own word for it is not enough (a folder, a GGUF file). offline: a model of
    the hub is looked for in the local cache only. Raises `UsageError` where it is not found, `IncompatibleError` where
    it is another model or other weights.
    """
    provenance = store.meta.provenance
    model, revision = str(provenance.get("model")), provenance.get("model_revision")
    random_init, seed = bool(provenance.get("random_init", False)), int(provenance.get("seed") or 0)
    if offline and name is None and provenance.get("model_source") == "hub":
        return ModelSpec(
            name=model,
            source="hub",
            location=model,
            revision=revision,
            cached_only=True,
            random_init=random_init,
            seed=seed,
        )
    if name is None and provenance.get("model_source") != "hub":
        name = recorded_place(store.path, "model")
    is_local = Path(name or model).expanduser().exists()
    if provenance.get("model_source") == "folder" and name is None and not is_local:
        # By the folder's name alone a model of the hub might be taken for it.
        raise UsageError(
            f"{store.path} was harvested from a folder {model!r}, and {options_file(store.path).name} beside it names"
            " none that is there: say where that is with --model"
        )
    try:
        found = resolve_model(
            name or model, revision=None if is_local else revision, random_init=random_init, seed=seed
        )
    except UsageError as error:
        if name is not None:
            raise
        raise UsageError(
            f"{error}; {store.path} was harvested from {model!r}: say where that is with --model"
        ) from None
    refuse_other_weights(found, store)
    return found


def lens_of_store(store: ActivationStore, name: str | None = None) -> TunedLens | None:
    """The lens that `store`'s vectors went through, or None where they went through none.

    name: where the lens is, if it came from a local folder. Raises `UsageError` where it is not found,
    `IncompatibleError` where it is another lens.
    """
    described = store.meta.lens
    if described is None:
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
        raise UsageError(
            f"{error}; {store.path} went through lens {described.get('id')!r}: say where that is with --lens"
        ) from None
    if lens.fingerprint != described.get("hash"):
        raise IncompatibleError(
            f"lens {lens.name}: its hash should be {described.get('hash')}, as {store.path} was harvested with, found"
            f" {lens.fingerprint}"
        )
    return lens
