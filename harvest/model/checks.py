"""Checks that a model is the one a store was harvested from, and that its logits can be computed from its blocks.

How: a store's provenance has the commit or the hash of its model, which `refuse_other_weights` compares; if there is
no hash to compare (a local copy of a hub model), `check_model` compares vectors. `check_logits` detects architectures
with more than a norm and an unembedding after their blocks. Also tested in tests/analysis/model/test_downstream.py.
"""

import numpy as np
import torch

from harvest.lens.translators import TunedLens
from harvest.model.load import LoadedModel
from harvest.model.names import ModelSpec
from harvest.residual import ResidualRecorder
from residscope.errors import IncompatibleError, ResidscopeError, is_out_of_memory, said
from store.activations import ActivationStore

_CHECKED_TOKENS = 32
_CHECKED_ERROR = 0.2
"""Differences from rounding to bfloat16, in the store and in a forward pass on another device, are well below this."""
_LOGITS_ERROR = 0.01


def refuse_other_weights(found: ModelSpec, store: ActivationStore) -> None:
    """`IncompatibleError` if a commit or a hash shows that `store` was harvested from other weights."""
    provenance = store.meta.provenance
    for what, expected, here in (
        ("commit", provenance.get("model_revision"), found.revision),
        ("content hash", provenance.get("model_fingerprint"), found.fingerprint),
        ("choice of random weights", bool(provenance.get("random_init", False)), found.random_init),
    ):
        # A hash without + is from before all files were hashed.
        same = here == expected or str(here).startswith(f"{expected}+")
        if expected is not None and here is not None and not same:
            raise IncompatibleError(
                f"model {found.name}: its {what} should be {expected}, as {store.path} was harvested with, found"
                f" {here}; give the model that the store was harvested from, or harvest this one into another store"
            )


def refuse_other_sizes(store: ActivationStore, model: LoadedModel) -> None:
    """`IncompatibleError` if `store` was harvested from a model with other sizes."""
    if (found := (model.n_layers, model.d_model)) != (expected := (store.meta.n_model_layers, store.meta.d_model)):
        what = f"as {store.path} was harvested with, found {found}; give the model that the store was harvested from"
        raise IncompatibleError(f"model {model.spec.name}: its layers and d_model should be {expected}, {what}")


def check_model(store: ActivationStore, model: LoadedModel, lens: TunedLens | None) -> None:
    """Run the store's first tokens and compare; `IncompatibleError` if at some layer half of the vectors are off by
    more than a fifth of their norm: then the model, its weights or the lens are not those of the store."""
    refuse_other_sizes(store, model)
    meta = store.meta
    # The whole sequence is run, since vectors may depend on its length (LongRoPE), but only the first are compared.
    later = np.flatnonzero(store.tokens.position[1:] == 0)  # Where the second sequence begins.
    length = int(later[0]) + 1 if len(later) else meta.n_tokens
    n_tokens = min(_CHECKED_TOKENS, length)
    stored = torch.from_numpy(store.read(slice(0, n_tokens), None))  # [n, L, D]
    input_ids = torch.from_numpy(store.tokens.token_id[:length].astype(np.int64))[None]

    def compare(i: int, residual: torch.Tensor) -> None:
        layer, first = meta.layers[i], residual[0, :n_tokens]
        found = first.float() if lens is None else lens.apply(first, layer)
        error = (found.cpu() - stored[:, i]).norm(dim=-1) / stored[:, i].norm(dim=-1)
        if not error.median().item() <= _CHECKED_ERROR:
            raise IncompatibleError(
                f"{model.spec.name} does not reproduce {store.path}: at layer {layer} half of the first {n_tokens}"
                f" vectors differ by {error.median().item():.0%} of their norm or more; give the model and the lens"
                " that the store was harvested with"
            )

    ResidualRecorder(model, meta.layers).stream(input_ids, compare)


def check_length(model: LoadedModel, input_ids: torch.Tensor) -> None:
    """`IncompatibleError` if the first block fails on a sequence of ids int64 [N]: not all configurations say how many
    positions the model has."""
    try:
        ResidualRecorder(model, [0]).stream(input_ids[None], lambda _, x: x.sum().item())  # waits for a GPU
    except ResidscopeError:
        raise
    except Exception as error:  # The model's own code may raise anything.
        if is_out_of_memory(error):
            raise
        what = f"it fails on a sequence of {len(input_ids)} tokens ({type(error).__name__}: {said(error)})"
        raise IncompatibleError(f"{model.spec.name} ({model.architecture}): {what}; try --context-length") from error


@torch.inference_mode()
def check_logits(model: LoadedModel, input_ids: torch.Tensor) -> None:
    """`IncompatibleError` if `model.logits` of the last block's output are not the model's own logits, for the first of
    the token ids int64 [B, N]: the architecture has more than a norm and an unembedding after its blocks."""
    few = input_ids[:1, :_CHECKED_TOKENS]
    expected = model.causal_lm(input_ids=few.to(model.device), use_cache=False).logits.float()
    found = model.logits(ResidualRecorder(model, [model.n_layers - 1]).record(few)[0]).float()
    error = (found - expected).norm() / expected.norm()
    if not error.item() <= _LOGITS_ERROR:
        raise IncompatibleError(
            f"{model.spec.name} ({model.architecture}): final norm and unembedding of the last block's output do not"
            f" give the model's logits (relative error {error.item():.2g}); this architecture cannot be measured here"
        )
