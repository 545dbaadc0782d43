"""The store and the autoencoder of an analysis: opened once in each process, and checked against each other.

The process that the user started calls `open_inputs`, and its threads share what that opened. A task in another process
gets only paths, hashes and options (`TaskSpec`): `open_data` opens the files again, and refuses any other hash.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.config import StatisticsOptions, TokenOptions
from analysis.encoder import Encoder, kept_places
from analysis.selection import Selection, held_out_documents, select
from analysis.tiles import Coder
from residscope.errors import IncompatibleError
from residscope.urls import as_path
from store.activations import ActivationStore
from store.codes import KeptCodes
from train.checkpoint import Checkpoint
from train.formats.files import read_checkpoint, read_sae
from train.model import MLSAE, sae_hash


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A store and an autoencoder that fits it."""

    store: ActivationStore
    checkpoint: Checkpoint
    layers: tuple[int, ...]
    """The stored layers that the autoencoder covers, as indices into the store's layers."""
    notes: Sequence[str]
    """Sentences for the user about the autoencoder's file, and about whether it fits the store."""

    @property
    def sae(self) -> MLSAE:
        return self.checkpoint.sae

    @property
    def layer_numbers(self) -> list[int]:
        """The model's block indices of `layers`."""
        return [self.store.meta.layers[i] for i in self.layers]

    @property
    def same_store(self) -> bool:
        """Whether the autoencoder was trained on this very store."""
        return self.checkpoint.store.get("content_hash") == self.store.content_hash

    @property
    def validation(self) -> Mapping[str, Any] | None:
        """The checkpoint's own split of documents: {fraction, seed, n_documents}; None if nothing was held out."""
        return self.checkpoint.store.get("validation")

    def select(self, options: TokenOptions) -> Selection:
        """The tokens that `options` choose; raises like `analysis.selection.select`."""
        held_out = held_out_documents(self.store.tokens, self.validation, same_store=self.same_store)
        return select(self.store.tokens, held_out, options, self.sae.config.n_latents)


def open_inputs(store_path: Path, sae_path: Path) -> Inputs:
    """Open both; raises `ResidscopeError` or a subclass if one is missing or damaged, or if they do not fit."""
    store = ActivationStore.open(store_path)
    checkpoint = read_checkpoint(sae_path)
    layers = layers_of_store(checkpoint, store, sae_path)
    notes = [*_doubts(checkpoint, store), *checkpoint.notes]
    return Inputs(store=store, checkpoint=checkpoint, layers=layers, notes=notes)


def layers_of_store(checkpoint: Checkpoint, store: ActivationStore, sae_path: Path) -> tuple[int, ...]:
    """The stored layers (indices into the store's layers) that the autoencoder covers, or `IncompatibleError`.

    The model, its weights (trained or drawn at random), lens and d_model must be those of the autoencoder's training;
    text and tokens may differ. Other layers in the store are left out. What the checkpoint does not record is not
    checked; `_doubts` warns where that matters.
    """
    meta, trained = store.meta, checkpoint.store
    checks: list[tuple[str, Any, Any]] = [("d_model", checkpoint.config.d_model, meta.d_model)]
    if trained.get("model") is not None:
        checks.append(("model", trained["model"], meta.provenance.get("model")))
    if trained.get("random_init") is not None:
        words = {True: "drawn at random", False: "those of the trained model"}
        expected, found = (words[bool(part.get("random_init"))] for part in (trained, meta.provenance))
        checks.append(("the weights", expected, found))
    if "lens" in trained:
        checks.append(("lens", trained["lens"], meta.lens))
    for name, expected, found in checks:
        if expected != found:
            raise IncompatibleError(
                f"{sae_path} does not fit {store.path}: {name} should be {expected or 'none'}, "
                f"as in the autoencoder's training, found {found or 'none'}: "
                "harvest a store of the same model and lens, or train on this one"
            )
    layers = tuple(trained.get("layers") or meta.layers)
    if missing := sorted(set(layers) - set(meta.layers)):
        raise IncompatibleError(
            f"{sae_path} does not fit {store.path}: the autoencoder was trained on layers {list(layers)}, but "
            f"the store does not have layers {missing}: harvest them too (`train compare` accepts the store as it is)"
        )
    return tuple(meta.layers.index(layer) for layer in layers)


def _doubts(checkpoint: Checkpoint, store: ActivationStore) -> list[str]:
    """Warnings for the user where the checkpoint records too little to tell whether it fits the store."""
    trained = checkpoint.store
    same_store = trained.get("content_hash") == store.content_hash
    if same_store or trained.get("random_init") is not None or not store.meta.provenance.get("random_init"):
        return []
    return [
        "This store is of a model with random weights (--random-init), but the checkpoint does not record whether the "
        "autoencoder was trained on such a model: if not, these numbers say nothing about either model."
    ]


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What all tasks of an analysis share: small values, from which each worker opens and computes the rest once."""

    store: str
    """Path of the store."""
    content_hash: str
    """The store's, checked by every process."""
    sae: str
    """Path of the checkpoint."""
    sae_hash: str
    """The autoencoder's, checked by every process."""
    layers: tuple[int, ...]
    """As in `Inputs`."""
    tokens: TokenOptions
    statistics: StatisticsOptions
    validation: tuple[tuple[str, Any], ...]
    """(name, value) of the fraction and seed of the checkpoint's validation split; empty if nothing is held out."""
    pca: bool
    """Whether to sum what the PCA baseline needs: it is wanted, and there are tokens to fit it on."""
    few: tuple[int, ...] = ()
    """Positions in the store of the few tokens that carry much of a layer's variance (`store.care.outliers`)."""
    save_latents: bool = False
    codes_folder: str | None = None
    """Temporary folder for the analysed tokens' codes during the analysis (`analysis.tiles`); None for none."""


class TaskData(NamedTuple):
    """What a process keeps of a store and an autoencoder between its tasks."""

    encoder: Encoder
    store: ActivationStore
    selection: Selection
    shift: NDArray[np.float64]
    """[L, D] mean of each analysed layer over the store's kept tokens."""
    kept: KeptCodes | None
    """Codes in the store, from an earlier analysis or to be kept by this one; None for none."""

    def coder(self, spec: TaskSpec) -> Coder:
        return Coder(self.encoder, self.store, spec.layers, self.kept, spec.save_latents)


def open_data(spec: TaskSpec) -> TaskData:
    """What a task needs, opened once per process; `IncompatibleError` if the store or autoencoder has changed."""
    with _opening:
        return _open_data(spec)


@contextmanager
def opened_here(spec: TaskSpec, inputs: Inputs, selection: Selection) -> Iterator[None]:
    """Within the block, tasks in this process use these inputs, which are open already, and this selection."""
    _opened_here[spec] = inputs.store, inputs.sae, selection
    try:
        yield
    finally:
        del _opened_here[spec]


_opening = threading.Lock()
_opened_here: dict[TaskSpec, tuple[ActivationStore, MLSAE, Selection]] = {}


@lru_cache(maxsize=2)
def _open_data(spec: TaskSpec) -> TaskData:
    store, sae, selection = _opened_here.get(spec) or _open_again(spec)
    encoder = Encoder(sae, spec.statistics.dtype, spec.statistics.device)
    make = KeptCodes.create if spec.save_latents else KeptCodes.open
    origin = {**encoder.origin, "layers": [store.meta.layers[i] for i in spec.layers]}
    kept = make(store, origin, kept_places(encoder.config))
    return TaskData(encoder, store, selection, store.statistics().mean[list(spec.layers)], kept)


def _open_again(spec: TaskSpec) -> tuple[ActivationStore, MLSAE, Selection]:
    store = ActivationStore.open(spec.store, content_hash=spec.content_hash)
    sae, _ = read_sae(as_path(spec.sae))
    if (found := sae_hash(sae)) != spec.sae_hash:
        raise IncompatibleError(
            f"{spec.sae} is not the autoencoder that was opened first: its hash should be {spec.sae_hash}, found "
            f"{found}; do not write to it during the analysis, or use --scheduler threads, which opens it only once"
        )
    held_out = held_out_documents(store.tokens, dict(spec.validation), same_store=True)  # checked by the first process
    return store, sae, select(store.tokens, held_out, spec.tokens, sae.config.n_latents)
