"""What one task does: read some shards of a store, encode their tokens, and return a small sum.

A task is a pure function of paths and integers, so any process that sees the paths can run it, again if need be. Memory
is bounded by a tile of tokens and by sums that do not grow with the number of tokens. Sums of consecutive tasks add up
to those of all tokens, in any grouping to rounding. Not here: in which process a task runs (`analysis.jobs`) and what
the sums mean (`analysis.moments`, `analysis.quality`, `analysis.baselines.pca`).

Shapes: T tokens of a tile, L analysed layers, D d_model.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analysis import spilled_codes
from analysis.baselines import pca
from analysis.baselines.nulls import NULLS
from analysis.encoder import CodeTile, Encoder, load_encoder
from analysis.moments import LayerMoments
from analysis.quality import GroupQuality, LayerQuality, sum_in_order
from analysis.selection import Selection, Split, held_out_documents, select
from residscope.errors import IncompatibleError, Interrupted
from store.activations import ActivationStore
from store.care.verify import require_intact
from store.codes import KeptCodes
from train.kernels.interface import SparseCodes
from train.model import Standardized

ANALYSED, VALIDATION = 0, 1
"""Subsets of `Sums.quality`."""

TILE_BYTES = 32 * 2**20
"""Vectors read at once, as float32; at least one chunk of the store."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all tasks of an analysis share: a few words and numbers, from which a worker makes all else once."""

    store: str
    """Path of the store."""

    content_hash: str
    """What the store at that path must hold."""

    sae: str
    """Path of the checkpoint."""

    layers: tuple[int, ...]
    """Stored layers to analyse, as indices into the store's."""

    dtype: str
    """float32, float64 or bfloat16 (of the encoder's product alone)."""

    split: Split
    """Which documents."""

    max_tokens: int | None
    """At most so many tokens of the split."""

    validation: tuple[float, int, int] | None
    """Fraction, seed and number of documents of the checkpoint's validation split."""

    same_store: bool
    """Whether this is the store that the autoencoder was trained on."""

    baseline: bool
    """Whether to sum what the PCA baseline needs."""

    nulls: bool
    """Whether to sum the null models too."""

    seed: int
    """Of the null models."""

    save_latents: bool = False
    """Whether to keep the codes of every shard that is encoded."""

    spill: str | None = None
    """Folder for the analysed tokens' codes while the analysis lasts (`analysis.spilled_codes`); None for none."""


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What tasks return and a tree merges."""

    moments: LayerMoments
    quality: LayerQuality
    by_group: GroupQuality
    gram: pca.GramSums | None
    nulls: Mapping[str, LayerMoments]
    """By name of the null model (`analysis.baselines.nulls.NULLS`), in one document group; empty without them."""

    @staticmethod
    def merged(parts: "Sequence[Sums]") -> "Sums":
        """The sum of `parts`, added in their order."""
        grams = [part.gram for part in parts if part.gram is not None]
        return Sums(
            moments=LayerMoments.merged([part.moments for part in parts]),
            quality=LayerQuality.merged([part.quality for part in parts]),
            by_group=GroupQuality.merged([part.by_group for part in parts]),
            gram=pca.GramSums.merged(grams) if grams else None,
            nulls={name: LayerMoments.merged([part.nulls[name] for part in parts]) for name in parts[0].nulls},
        )


class Data(NamedTuple):
    """What a process keeps of a store between its tasks."""

    store: ActivationStore
    selection: Selection
    shift: NDArray[np.float64]
    """[L, D] mean of each analysed layer over the store's kept tokens."""

    kept: KeptCodes | None
    """Codes that an earlier analysis kept, or that this one does."""


def open_data(work: Work, encoder: Encoder) -> Data:
    """The open store, the selection and the kept codes; a second call in this process gives the same ones."""
    with _opening:
        return _open_data(work, encoder)


def open_codes(work: Work, store: ActivationStore, encoder: Encoder) -> KeptCodes | None:
    """The codes that are kept in the store; None where there are none and none are to be kept."""
    layers = [store.meta.layers[i] for i in work.layers]
    make = KeptCodes.create if work.save_latents else KeptCodes.open
    return make(store, {**encoder.origin, "layers": layers}, encoder.width)


_opening = threading.Lock()


@lru_cache(maxsize=4)
def _open_data(work: Work, encoder: Encoder) -> Data:
    store = ActivationStore.open(work.store)
    if store.content_hash != work.content_hash:
        raise IncompatibleError(
            f"{work.store} holds other data here than where the analysis was started: "
            f"content hash {store.content_hash}, expected {work.content_hash}; every worker must see the same store"
        )
    split: dict[str, Any] | None = None
    if work.validation:
        split = dict(zip(("fraction", "seed", "n_documents"), work.validation, strict=True))
    held_out = held_out_documents(store.tokens, split, same_store=work.same_store)
    selection = select(
        store.tokens, held_out, work.split, max_tokens=work.max_tokens, n_latents=encoder.config.n_latents
    )
    kept = open_codes(work, store, encoder)
    return Data(store, selection, store.statistics().mean[list(work.layers)], kept)


def measure(work: Work, shards: Sequence[int]) -> Sums:
    """The sums over these shards' tokens."""
    encoder = load_encoder(Path(work.sae), work.dtype)
    store, selection, mean, kept = open_data(work, encoder)
    n_layers, d_model = mean.shape
    shift = mean.astype(encoder.numpy_dtype)
    groups = np.unique(np.concatenate([selection.group[slice(*store.meta.shard_bounds(s))] for s in shards]))
    present = groups[groups >= 0].tolist()
    layers, n_latents = [store.meta.layers[i] for i in work.layers], encoder.config.n_latents
    sums = Sums(
        moments=LayerMoments.zeros(layers, n_latents, present),
        quality=LayerQuality.zeros(2, n_layers, d_model),
        by_group=GroupQuality.zeros(n_layers, present),
        gram=pca.GramSums.zeros(d_model) if work.baseline else None,
        nulls={name: LayerMoments.zeros(layers, n_latents) for name in NULLS} if work.nulls else {},
    )
    needed = selection.needed if work.baseline else selection.analysed | selection.validation
    coder = _Coder(work, encoder, store, kept)
    for token, x in _checked_tiles(store, work.layers, shards, needed):
        vectors = encoder.standardize(torch.from_numpy(x).view(-1, d_model))
        if sums.gram is not None:
            _add_gram(sums.gram, vectors.x.view(-1, n_layers, d_model), selection.fit[token])
        member = np.stack([selection.analysed[token], selection.validation[token]])  # [2, T]
        rows = member.any(axis=0)
        if not rows.any():
            continue
        if not rows.all():
            chosen = torch.from_numpy(np.repeat(rows, n_layers))
            vectors = type(vectors)(*(part[chosen] for part in vectors))
            x, member, token = x[rows], member[:, rows], token[rows]
        codes = encoder.decode(coder.codes(token, vectors), vectors, n_layers)
        values, indices = codes.values.numpy(), codes.indices.numpy()
        per_token = sums.quality.add(x.astype(shift.dtype, copy=False), codes.x_hat.numpy(), values, shift, member)
        analysed = member[ANALYSED]
        values, indices, token = values[analysed], indices[analysed], token[analysed]
        if len(token) == 0:
            continue
        if work.spill:
            spilled_codes.write(work.spill, CodeTile(token, values, indices))
        sums.by_group.add(per_token[:, analysed], selection.group[token])
        try:
            sums.moments.add(values, indices, selection.group[token])
        except ValueError:
            where = tuple(int(i) for i in np.argwhere(~((values >= 0) & np.isfinite(values)))[0])
            raise IncompatibleError(
                f"{work.sae} on {work.store}: the activation is {values[where]} at layer {layers[where[1]]}, token "
                f"{token[where[0]]} of the store: it should be finite and at least 0; look at the store with "
                "`residscope verify`, and at the autoencoder's weights"
            ) from None
        for name, null in sums.nulls.items():
            null.add(values, indices, rows=NULLS[name](work.seed, token, n_layers, store.meta.chunk_tokens))
    return sums


def code_tiles(work: Work, shards: Sequence[int], needed: NDArray[np.bool_]) -> Iterator[CodeTile]:
    """Codes of the tokens `needed` [tokens of the store] that lie in these shards, a tile at a time, in order."""
    encoder = load_encoder(Path(work.sae), work.dtype)
    store, _, _, kept = open_data(work, encoder)
    coder = _Coder(work, encoder, store, kept)
    for token, x in tiles(store, work.layers, shards, needed):
        values, indices = coder.codes(token, encoder.standardize(torch.from_numpy(x).view(-1, x.shape[-1])))
        shape = (len(token), len(work.layers), -1)
        yield CodeTile(token, values.view(shape).numpy(), indices.view(shape).numpy())


class _Coder:
    """Codes of tiles: kept ones where they are there, else encoded, and then kept if that was asked for."""

    def __init__(self, work: Work, encoder: Encoder, store: ActivationStore, kept: KeptCodes | None) -> None:
        self._work, self._encoder, self._store, self._kept = work, encoder, store, kept
        self._shard, self._codes = -1, None  # the shard of the last tile, and its kept codes

    def codes(self, token: NDArray[np.int64], vectors: Standardized) -> SparseCodes:
        """Codes of the tokens [T], whose standardised vectors are given, all of one shard."""
        if self._kept is not None:
            shard = int(token[0]) // self._store.meta.shard_tokens
            if shard != self._shard:
                self._shard, self._codes = shard, self._of_shard(self._kept, shard)
            if self._codes is not None:
                rows = token - shard * self._store.meta.shard_tokens
                values, indices = (torch.from_numpy(part[rows]).flatten(0, 1) for part in self._codes)
                return SparseCodes(values, indices)
        return self._encoder.encode(vectors)

    def _of_shard(self, kept: KeptCodes, shard: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
        found = kept.read(shard)
        if found is None and self._work.save_latents:
            start, stop = self._store.meta.shard_bounds(shard)
            parts = []
            for token, x in tiles(self._store, self._work.layers, [shard], self._store.tokens.keep):
                codes = self._encoder.encode(self._encoder.standardize(torch.from_numpy(x).view(-1, x.shape[-1])))
                parts.append((token, codes))
            width = max(codes.values.shape[1] for _, codes in parts)
            shape = (stop - start, len(self._work.layers), width)
            values, indices = np.zeros(shape, self._encoder.numpy_dtype), np.zeros(shape, np.int64)
            for token, codes in parts:
                own = (len(token), shape[1], -1)
                values[token - start, :, : codes.values.shape[1]] = codes.values.view(own).numpy()
                indices[token - start, :, : codes.values.shape[1]] = codes.indices.view(own).numpy()
            kept.write(shard, values, indices)
            found = values, indices
        return found


def pca_error(work: Work, components: pca.Components, shards: Sequence[int]) -> NDArray[np.float64]:
    """[L] summed squared error, in raw space, of the baseline's reconstructions of the validation tokens in these
    shards."""
    encoder = load_encoder(Path(work.sae), work.dtype)
    store, selection, means, _ = open_data(work, encoder)
    n_layers, d_model = means.shape
    mean = torch.from_numpy(components.mean).to(encoder.dtype)
    directions = torch.from_numpy(components.directions).to(encoder.dtype)  # [k, D]
    errors = np.zeros(n_layers)
    for _, x in tiles(store, work.layers, shards, selection.validation):
        standardized, own_mean, scale = encoder.standardize(torch.from_numpy(x).view(-1, d_model))
        x_hat = ((standardized - mean) @ directions.T @ directions + mean) * scale + own_mean
        error = (torch.from_numpy(x).view(-1, d_model) - x_hat).double().square().sum(dim=-1)
        errors += error.view(-1, n_layers).sum(dim=0).numpy()
    return errors


def add_errors(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The sum of `pca_error`'s results, in order."""
    return sum_in_order(parts)


_stopping = threading.Event()


def stop_tasks() -> None:
    """Make the tasks that run in threads of this process end at their next tile, so that an interrupted run does not
    linger."""
    _stopping.set()


def keep_going() -> None:
    """Undo `stop_tasks`."""
    _stopping.clear()


def tiles(
    store: ActivationStore, layers: tuple[int, ...], shards: Sequence[int], needed: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """The needed tokens of some shards, a tile at a time: their positions in the store [T] and their vectors float32
    [T, L, D]. `IncompatibleError` where a number is not finite."""
    size = store.meta.chunk_tokens
    size *= max(1, TILE_BYTES // (size * len(layers) * store.meta.d_model * 4))
    for shard in shards:
        first, last = store.meta.shard_bounds(shard)
        for start in range(first, last, size):
            if _stopping.is_set():
                raise Interrupted("the analysis was stopped")
            stop = min(start + size, last)
            token = start + np.flatnonzero(needed[start:stop])
            if len(token):
                x = store.read(slice(start, stop), layers)
                x = x if len(token) == stop - start else x[token - start]
                if not (np.isfinite(x.min()) and np.isfinite(x.max())):  # a NaN is both
                    _refuse_not_finite(store, layers, token, x)
                yield token, x


def _checked_tiles(
    store: ActivationStore, layers: tuple[int, ...], shards: Sequence[int], needed: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """As `tiles`, of shards that are found to be those of the manifest when their turn comes."""
    for shard in shards:
        require_intact(store, shard)
        yield from tiles(store, layers, [shard], needed)


def _refuse_not_finite(
    store: ActivationStore, layers: tuple[int, ...], token: NDArray[np.int64], x: NDArray[np.float32]
) -> None:
    where = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
    raise IncompatibleError(
        f"{store.path}, layer {store.meta.layers[layers[where[1]]]}, token {token[where[0]]} of the store, dimension "
        f"{where[2]}: the value {x[where]} is no finite number, which `harvest` never writes: look with `residscope "
        "verify`, or harvest anew"
    )


def _add_gram(gram: pca.GramSums, vectors: torch.Tensor, chosen: NDArray[np.bool_]) -> None:
    """Add the tokens `chosen` [T] of standardised vectors [T, L, D]; the product in their type, the sum in float64."""
    if not chosen.any():
        return
    part = vectors if chosen.all() else vectors[torch.from_numpy(chosen)]
    rows = part.reshape(-1, part.shape[-1])
    gram.add(len(rows), rows.sum(dim=0, dtype=torch.float64).numpy(), (rows.T @ rows).double().numpy())
