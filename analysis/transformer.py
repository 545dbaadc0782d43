"""The transformer and the lens that a store was harvested with, loaded again for analyses that run the model.

How: the store's provenance names the model, its commit or the hash of its files, the format it ran in, and the lens;
what is loaded must be the same, else every number would speak of another model. Where a hash tells nothing (a local
copy of a hub model), `check_model` compares what the model gives with what the store holds. A model or lens that came
from a local folder is known to the store by name only, so that the caller must say where it lies. Not here: changing
the residual stream (`analysis.downstream`).
"""

from pathlib import Path

import numpy as np
import torch

from analysis.sequences import sequence_bounds
from harvest.lens import Indexing, TunedLens, load_lens
from harvest.models import LoadedModel, ModelSpec, load_model, resolve_model
from harvest.residual import ResidualRecorder
from store.activations import ActivationStore
from store.errors import IncompatibleError, ResidscopeError, UsageError


def model_of_store(
    store: ActivationStore,
    name: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """The model that `store` was harvested from, in the format that it ran in there unless `dtype` says otherwise.

    name: where the model is, if the store's own word for it is not enough (a folder, a GGUF file). Raises as
    `spec_of_store` does, and `ResidscopeError` where the weights cannot be loaded.
    """
    return load_of_store(store, spec_of_store(store, name), device=device, dtype=dtype)


def load_of_store(
    store: ActivationStore,
    spec: ModelSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """The weights of `spec`, which `spec_of_store` gave, in the format that they ran in when `store` was harvested."""
    wanted = getattr(torch, store.meta.provenance.get("compute_dtype", "float32")) if dtype is None else dtype
    return load_model(spec, dtype=wanted, device=device)


def spec_of_store(store: ActivationStore, name: str | None = None, *, offline: bool = False) -> ModelSpec:
    """Which model `store` was harvested from, found again; no weights are loaded yet.

    name: as in `model_of_store`. offline: a model of the hub is looked for in the local cache only. Raises `UsageError`
    where it is not found, `IncompatibleError` where it is another model or other weights.
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
    is_local = name is not None and Path(name).expanduser().exists()
    try:
        found = resolve_model(
            name or model, revision=None if is_local else revision, random_init=random_init, seed=seed
        )
    except UsageError as error:
        if name is not None:
            raise
        raise UsageError(f"{error}; {store.path} was harvested from {model!r}: say where that is") from None
    for what, expected, here in (
        ("commit", revision, found.revision),
        ("content hash", provenance.get("model_fingerprint"), found.fingerprint),
    ):
        if expected is not None and here is not None and expected != here:
            raise IncompatibleError(
                f"model {found.name}: its {what} should be {expected}, as {store.path} was harvested with, found {here}"
            )
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
            f"{error}; {store.path} went through lens {described.get('id')!r}: say where that is"
        ) from None
    if lens.fingerprint != described.get("hash"):
        raise IncompatibleError(
            f"lens {lens.name}: its hash should be {described.get('hash')}, as {store.path} was harvested with, found"
            f" {lens.fingerprint}"
        )
    return lens


_CHECKED_TOKENS = 32
_CHECKED_ERROR = 0.2
"""Rounding to bfloat16, in the store and in a forward pass on another device, stays well below."""
_LOGITS_ERROR = 0.01


def check_model(store: ActivationStore, model: LoadedModel, lens: TunedLens | None) -> None:
    """Run the store's first tokens and compare; `IncompatibleError` where at some layer half of the vectors are off by
    more than a fifth of their norm: then the model, its weights or the lens are not those of the store."""
    meta = store.meta
    if (model.n_layers, model.d_model) != (meta.n_model_layers, meta.d_model):
        raise IncompatibleError(
            f"model {model.spec.name} has {model.n_layers} layers and d_model {model.d_model}, {store.path} is of one"
            f" with {meta.n_model_layers} and {meta.d_model}"
        )
    n_tokens = min(_CHECKED_TOKENS, int(sequence_bounds(store.tokens.position)[1][0]))
    stored = torch.from_numpy(store.read(slice(0, n_tokens), None))  # [n, L, D]
    input_ids = torch.from_numpy(store.tokens.token_id[:n_tokens].astype(np.int64))[None]
    recorded = ResidualRecorder(model, meta.layers).record(input_ids)
    for i, layer in enumerate(meta.layers):
        found = recorded[i][0].float() if lens is None else lens.apply(recorded[i][0], layer)
        error = (found.cpu() - stored[:, i]).norm(dim=-1) / stored[:, i].norm(dim=-1)
        if not error.median().item() <= _CHECKED_ERROR:
            raise IncompatibleError(
                f"{model.spec.name} does not give what {store.path} holds: at layer {layer} half of the first"
                f" {n_tokens} vectors are off by {error.median().item():.0%} of their norm or more; give the model and"
                " the lens that the store was harvested with"
            )


@torch.inference_mode()
def check_logits(model: LoadedModel, input_ids: torch.Tensor) -> None:
    """`ResidscopeError` where `model.logits` of the last block's output are not the model's own logits, for the first
    of the token ids int64 [B, N]: an architecture with more after its blocks than a norm and an unembedding."""
    few = input_ids[:1, :_CHECKED_TOKENS]
    expected = model.causal_lm(input_ids=few.to(model.device), use_cache=False).logits.float()
    found = model.logits(ResidualRecorder(model, [model.n_layers - 1]).record(few)[0]).float()
    error = (found - expected).norm() / expected.norm()
    if not error.item() <= _LOGITS_ERROR:
        raise ResidscopeError(
            f"{model.spec.name} ({model.architecture}): final norm and unembedding of the last block's output do not"
            f" give the model's logits (relative error {error.item():.2g}); this architecture cannot be measured here"
        )
