"""Autoencoders side by side on the same held-out tokens: one for all layers, sets of one for each layer, and PCA.

An autoencoder for several layers is measured on every layer of the store, one for a single layer on that layer (on
every layer with `cross`); the values of a set for a layer are those of its autoencoder for that layer. Documents count
as held out when no checkpoint was trained on them. FVU is that of `train.validation`.

Shapes: T tokens of the store, t tokens read, L layers of the store, D d_model.
"""

import itertools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from residscope.errors import IncompatibleError, UsageError
from residscope.names import stem
from residscope.urls import as_path, local_copy
from store.activations import ActivationStore
from store.care.outliers import few_tokens
from store.meta import StoreMeta
from store.shuffle import validation_documents
from train.checkpoint import Checkpoint
from train.compare.config import TrainCompareConfig
from train.compare.pca import PCASums
from train.data import VectorSource
from train.formats.files import read_checkpoint
from train.hardware import resolve_device
from train.model import MLSAE, standardize
from train.objective.statistics import require_finite
from train.validation import Validation, ValidationData, ValidationTarget

_LAYER = re.compile(r"\.?layer=\d+")

FOUND = 0.7
"""Cosine above which a latent counts as found in another autoencoder."""


@dataclass(kw_only=True)
class Entrant:
    """One line of the comparison: an autoencoder for all layers, or a set of one for each."""

    name: str
    """Its name in the output."""
    kind: str
    """"multi-layer", "per-layer" or "pca"."""
    members: dict[int | None, MLSAE] = field(default_factory=dict)
    """Autoencoders by the layer that they are measured for; None: all layers."""
    vectors: int | None = 0
    """Vectors trained on, by all members together; None if not recorded."""
    trained_on: frozenset[int] | None = None
    """Layers that a multi-layer autoencoder was trained on; None if not recorded or if `members` names them."""
    found: dict[int | None, Validation] = field(default_factory=dict)
    """Each member's measurement, on all layers of the store."""

    def n_latents(self) -> int:
        """Latents of all members together; for PCA, components."""
        total = sum(sae.config.n_latents for sae in self.members.values())
        return total // 2 if self.kind == "pca" else total

    def k(self) -> int:
        """Latents that may be active per vector; 0 if nothing limits them."""
        return max(sae.config.active for sae in self.members.values())

    def own_layers(self, layers: Sequence[int]) -> list[int]:
        """Those of `layers` that a member was trained on; all of them if that is not recorded."""
        if None not in self.members:
            return [layer for layer in layers if layer in self.members]
        return [layer for layer in layers if self.trained_on is None or layer in self.trained_on]

    def by_layer(self, layers: Sequence[int], name: str) -> list[float | None]:
        """`fvu_per_layer` or `l0_per_layer`, at each layer its own member's; None for a layer without one."""
        measured = [self.found.get(layer, self.found.get(None)) for layer in layers]
        return [None if each is None else getattr(each, name)[i] for i, each in enumerate(measured)]


class Match(NamedTuple):
    """How well the latents of one autoencoder that fired on the measured tokens are found in another."""

    run: str
    other: str
    mmcs: float
    """Mean over the latents of `run` of the highest cosine between its decoder row and one of `other`."""
    found: float
    """Share of them whose highest cosine is above `FOUND`."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    entrants: list[Entrant]
    """In the order given, the baselines last."""
    layers: tuple[int, ...]
    """The model's numbers of the store's layers."""
    tokens: int
    """Held-out tokens measured on."""
    store: dict[str, Any]
    """The data: path and content_hash."""
    matches: list[Match]
    """Each autoencoder for several layers against each other one."""


def compare(config: TrainCompareConfig) -> Comparison:
    """Measure everything; raises `ResidscopeError` for what the user can fix."""
    device = resolve_device(config.device)
    with ActivationStore.open(config.store) as store:
        checkpoints = [found for source in config.sae for found in _read(source)]
        for name, checkpoint in checkpoints:
            if checkpoint.config.d_model != store.meta.d_model:
                reason = f"{store.path} has {store.meta.d_model}: give a store of the model that it was trained on"
                raise IncompatibleError(f"{name} has d_model {checkpoint.config.d_model}, {reason}")
        entrants = _entrants(checkpoints)
        for entrant in entrants:
            if not entrant.own_layers(store.meta.layers):
                known = sorted(entrant.trained_on or {layer for layer in entrant.members if layer is not None})
                raise IncompatibleError(
                    f"{entrant.name} was trained on layers {' '.join(map(str, known))}, {store.path} has "
                    f"{' '.join(map(str, store.meta.layers))}: harvest the layers that it was trained on"
                )
        held_out, trained = _split(store, [checkpoint for _, checkpoint in checkpoints], config.validation_fraction)
        used = {layer for entrant in entrants for layer in entrant.own_layers(store.meta.layers)}
        if few := few_tokens(store, held_out, layers=[i for i, layer in enumerate(store.meta.layers) if layer in used]):
            _say(f"warning: {few.words}")
        positions = list(range(store.meta.n_layers))
        source = VectorSource(positions, store.meta.stored_dtype, device)
        if config.pca:
            budgets = sorted({entrant.k() for entrant in entrants} - {0})  # 0: no limit or not known
            training = ValidationData(store, trained, positions, seed=0)
            entrants += _baselines(training, source, store.meta, budgets, config.fit_tokens)
        data = ValidationData(store, held_out, positions, seed=0)
        members = [(entrant, layer, sae) for entrant in entrants for layer, sae in entrant.members.items()]
        own = [_only_position(*member, store.meta.layers, config.cross) for member in members]
        saes = [sae.to(device) for *_, sae in members]
        targets = [ValidationTarget(sae, torch.float32, position) for sae, position in zip(saes, own, strict=True)]
        fired = list[torch.Tensor]()
        measured = data.evaluate(targets, source, tokens=config.tokens, fired=fired)
        for (entrant, layer, _), position, found in zip(members, own, measured, strict=True):
            entrant.found[layer] = found if position is None else _at(found, position, len(positions))
        pairs = zip(members, fired, strict=True)
        several = [(entrant.name, sae.W_dec[on]) for (entrant, _, sae), on in pairs if entrant.kind == "multi-layer"]
        return Comparison(
            entrants=entrants,
            layers=store.meta.layers,
            tokens=next(iter(entrants[0].found.values())).tokens,
            store={"path": store.path.name, "content_hash": store.content_hash},
            matches=_matches(several),
        )


def _matches(runs: Sequence[tuple[str, torch.Tensor]]) -> list[Match]:
    """Matches of every pair of autoencoders, given their names and decoder rows [J, D]."""
    found = dict[tuple[str, str], Match]()
    for (name, rows), (other, others) in itertools.combinations([run for run in runs if len(run[1])], 2):
        rows, others = (torch.nn.functional.normalize(x.detach().float(), dim=1) for x in (rows, others))
        there, back = [], others.new_full((len(others),), -1.0)
        for part in rows.split(1024):
            cosines = part @ others.T
            there.append(cosines.amax(dim=1))
            back = torch.maximum(back, cosines.amax(dim=0))
        for run, target, best in ((name, other, torch.cat(there)), (other, name, back)):
            found[run, target] = Match(run, target, best.mean().item(), (best > FOUND).double().mean().item())
    return [found[pair] for pair in itertools.permutations((name for name, _ in runs), 2) if pair in found]


def _say(text: str) -> None:
    print(f"train compare: {text}", file=sys.stderr)


def _read(source: str) -> list[tuple[str, Checkpoint]]:
    """The checkpoint `source`, or those of a sweep or of single layers in the folder `source`, with their names."""
    path = local_copy(as_path(source))
    inside = sorted(path.glob("*=*.pt")) if path.is_dir() else []
    if inside:
        return [(f"{path.name}/{file.stem}", read_checkpoint(file)) for file in inside]
    checkpoint = read_checkpoint(path if path.exists() else source)
    for note in checkpoint.notes:
        _say(f"note: {note}")
    return [(stem(path) if path.is_file() else source, checkpoint)]


def _entrants(checkpoints: Sequence[tuple[str, Checkpoint]]) -> list[Entrant]:
    """The entrants; single-layer checkpoints whose names differ only in the layer form one."""
    entrants: dict[str, Entrant] = {}
    for name, checkpoint in checkpoints:
        layers = checkpoint.store.get("layers") or []
        single = len(layers) == 1
        shown = _LAYER.sub("", name) if single else name
        if shown in entrants and (entrants[shown].kind == "per-layer") != single:
            shown += " (per layer)" if single else " (all layers)"
        entrant = entrants.setdefault(shown, Entrant(name=shown, kind="per-layer" if single else "multi-layer"))
        layer = layers[0] if single else None
        if layer in entrant.members or None in entrant.members:
            raise UsageError(f"--sae: two autoencoders are called {shown}: give each once, under different names")
        entrant.members[layer] = checkpoint.sae
        entrant.trained_on = frozenset(layers) if len(layers) > 1 else None
        vectors = checkpoint.trainer.get("metrics", {}).get("vectors")
        entrant.vectors = None if vectors is None or entrant.vectors is None else entrant.vectors + vectors
    return list(entrants.values())


def _only_position(entrant: Entrant, layer: int | None, sae: MLSAE, layers: Sequence[int], cross: bool) -> int | None:
    """None: the autoencoder is measured on every layer of the store; else the position of its own layer."""
    known, name = sae.config.layers, entrant.name  # empty unless it standardises by layer
    if known == tuple(layers) or (not known and (cross or layer not in layers)):
        return None
    if layer is None or layer not in layers:
        what = f"the store has {' '.join(map(str, layers))}: use a store with the same layers"
        raise UsageError(f"{name} standardises by layer and was trained on layers {' '.join(map(str, known))}, {what}")
    return list(layers).index(layer)


def _at(found: Validation, position: int, n_layers: int) -> Validation:
    """The measurement of one layer, spread to `n_layers` with NaN for the others."""
    fvu, l0 = [math.nan] * n_layers, [math.nan] * n_layers
    fvu[position], l0[position] = found.fvu_per_layer[0], found.l0_per_layer[0]
    return found._replace(fvu_per_layer=fvu, l0_per_layer=l0)


def _split(store: ActivationStore, checkpoints: Sequence[Checkpoint], fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Two masks, bool [T]: kept tokens that no checkpoint was trained on, and those that all were."""
    tokens = store.tokens
    n_documents = int(tokens.document.max()) + 1
    known: list[np.ndarray] = []
    for checkpoint in checkpoints:
        split: Mapping[str, Any] | None = checkpoint.store.get("validation")
        if split and checkpoint.store.get("content_hash") == store.content_hash:
            known.append(validation_documents(n_documents, float(split["fraction"]), int(split["seed"])))
    if len(known) < len(checkpoints):
        other = len(checkpoints) - len(known)
        _say(
            f"note: {other} of {len(checkpoints)} autoencoders do not record that they were trained on this store: its "
            "held-out documents may be in their training text"
        )
    if not known:
        known = [validation_documents(n_documents, fraction, 0)]
    held_out = np.logical_and.reduce(known)[tokens.document] & tokens.keep
    trained = ~np.logical_or.reduce(known)[tokens.document] & tokens.keep
    if np.count_nonzero(held_out) < 2:
        raise UsageError(
            f"{store.path}: no document with at least two tokens was held out from all of these checkpoints: train "
            "them with the same --validation-fraction (above 0) and --validation-seed"
        )
    return held_out, trained


def _baselines(
    training: ValidationData, source: VectorSource, meta: StoreMeta, budgets: Sequence[int], tokens: int
) -> list[Entrant]:
    """For each k in `budgets`: k principal components for all layers together, and k for each layer."""
    if not training or not budgets:
        return []
    pooled, *single = (PCASums.zeros(meta.d_model, source.device) for _ in range(1 + meta.n_layers))
    for x in map(source.to_float32, training.read(tokens)):  # [t, L, D]
        require_finite(x.flatten(0, 1), torch.arange(meta.n_layers, device=x.device).repeat(len(x)), meta.layers)
        standardized = standardize(x.flatten(0, 1)).x
        pooled.add(standardized)
        for position, sums in enumerate(single):
            sums.add(standardized.view(x.shape)[:, position])
    found = []
    for k in budgets:
        each = {layer: sums.fit(k).autoencoder() for layer, sums in zip(meta.layers, single, strict=True)}
        found.append(Entrant(name=f"PCA {k}", kind="pca", members={None: pooled.fit(k).autoencoder()}, vectors=None))
        found.append(Entrant(name=f"PCA {k} per layer", kind="pca", members={**each}, vectors=None))
    return found
