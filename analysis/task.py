"""What one task does: read some shards of a store, encode their tokens, and return a small sum.

A task is a pure function of paths and integers (`analysis.inputs.TaskSpec`), so any process that sees the paths can run
it, and run it again. Memory is bounded by a tile of tokens and by sums that do not grow with the number of tokens.

Shapes: T tokens of a tile, L analysed layers, D d_model. Tested in tests/analysis/test_run.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.baselines.nulls import NULLS
from analysis.inputs import TaskData, TaskSpec, open_data
from analysis.moments import LayerMoments
from analysis.quality import LayerQuality, QualityResult
from analysis.tiles import CodeTile, read_codes, shards_with, vector_tiles, write_codes
from residscope.errors import IncompatibleError
from train.compare.pca import Components, PCASums

ANALYSED, VALIDATION, WITHOUT_FEW = 0, 1, 2
"""Subsets in `Sums.quality`. The last one, the analysed tokens without `TaskSpec.few`, exists only if there are any."""


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What each task returns; a tree of tasks merges them."""

    moments: LayerMoments
    quality: LayerQuality
    pca: PCASums | None
    nulls: Mapping[str, LayerMoments]
    """Null model (`analysis.baselines.nulls.NULLS`) -> its moments, in one document group; empty without nulls."""

    @property
    def analysed(self) -> QualityResult:
        """How well the analysed tokens are reconstructed."""
        return self.quality.result(ANALYSED)

    @staticmethod
    def merged(parts: "Sequence[Sums]") -> "Sums":
        """The sum of `parts`, added in their order."""
        pcas = [part.pca for part in parts if part.pca is not None]
        return Sums(
            moments=LayerMoments.merged([part.moments for part in parts]),
            quality=LayerQuality.merged([part.quality for part in parts]),
            pca=PCASums.merged(pcas) if pcas else None,
            nulls={name: LayerMoments.merged([part.nulls[name] for part in parts]) for name in parts[0].nulls},
        )


def measure(spec: TaskSpec, shards: Sequence[int]) -> Sums:
    """The sums over these shards' tokens."""
    data = open_data(spec)
    store, selection, encoder = data.store, data.selection, data.encoder
    n_layers, d_model = data.shift.shape
    shift = data.shift.astype(encoder.numpy_dtype)
    sums = _no_sums(spec, data, shards)
    coder = data.coder(spec)
    needed = selection.needed(spec.pca)
    for shard in shards:
        for token, x in vector_tiles(store, spec.layers, [shard], needed):
            vectors = encoder.standardize(torch.from_numpy(x).view(-1, d_model))
            if sums.pca is not None:
                chosen = torch.from_numpy(np.repeat(selection.fit[token], n_layers))
                sums.pca.add(vectors.x if chosen.all() else vectors.x[chosen], vectors.x.dtype)
            analysed = selection.analysed[token]
            without_few = [analysed & ~np.isin(token, spec.few)] if spec.few else []
            member = np.stack([analysed, selection.validation[token], *without_few])  # [2 or 3, T]
            rows = member.any(axis=0)
            if not rows.any():
                continue
            if not rows.all():
                chosen = torch.from_numpy(np.repeat(rows, n_layers))
                vectors = vectors._make(part[chosen] for part in vectors)
                x, member, token = x[rows], member[:, rows], token[rows]
            codes = coder.codes(token, vectors)
            parts = (*codes, encoder.decode(codes, vectors))
            values, indices, x_hat = (part.view(len(token), n_layers, -1).numpy() for part in parts)
            per_token = sums.quality.add(x.astype(shift.dtype, copy=False), x_hat, values, shift, member)
            analysed = member[ANALYSED]
            if analysed.any():
                tile = CodeTile(token[analysed], values[analysed], indices[analysed])
                _add_codes(spec, data, sums, tile, per_token[:, analysed])
    return sums


def _no_sums(spec: TaskSpec, data: TaskData, shards: Sequence[int]) -> Sums:
    """Empty sums, with room for the document groups of these shards."""
    n_layers, d_model = data.shift.shape
    token_ranges = [slice(*data.store.meta.shard_bounds(shard)) for shard in shards]
    groups = np.unique(np.concatenate([data.selection.group[tokens] for tokens in token_ranges]))
    present = groups[groups >= 0].tolist()
    layers, n_latents = [data.store.meta.layers[i] for i in spec.layers], data.encoder.config.n_latents
    return Sums(
        moments=LayerMoments.zeros(layers, n_latents, present),
        quality=LayerQuality.zeros(2 + bool(spec.few), n_layers, d_model),
        pca=PCASums.zeros(d_model) if spec.pca else None,
        nulls={name: LayerMoments.zeros(layers, n_latents) for name in NULLS} if spec.statistics.nulls else {},
    )


def _add_codes(spec: TaskSpec, data: TaskData, sums: Sums, tile: CodeTile, per_token: NDArray[np.float64]) -> None:
    """Add the codes of analysed tokens; per_token [3, T, L]: what `LayerQuality.add` returned for them."""
    token, values, indices = tile
    valid = (values >= 0) & (values < np.inf)
    if not valid.all():
        where = tuple(np.argwhere(~valid)[0])
        raise IncompatibleError(
            f"{spec.sae} on {spec.store}: the activation is {values[where]} at layer {sums.moments.layers[where[1]]}, "
            f"token {token[where[0]]} of the store: it should be finite and at least 0; check the store with "
            "`residscope verify`, and the autoencoder's weights"
        )
    if spec.codes_folder:
        write_codes(spec.codes_folder, tile)
    sums.moments.add(values, indices, data.selection.group[token].astype(np.int64), errors=per_token)
    for name, null in sums.nulls.items():
        rows = NULLS[name](spec.statistics.seed, token, values.shape[1], data.store.meta.chunk_tokens)
        null.add(values, indices, rows=rows)


def codes_again(spec: TaskSpec, needed: NDArray[np.bool_]) -> Iterator[CodeTile]:
    """After `measure`, the codes of those analysed tokens that `needed` [tokens of the store] marks, a tile at a time,
    in order: read from its temporary folder or from the store, or else encoded again."""
    if spec.codes_folder:
        yield from read_codes(spec.codes_folder, needed)
        return
    data = open_data(spec)
    yield from data.coder(spec).tiles(shards_with(data.store, needed), needed)


def pca_error(spec: TaskSpec, components: Components, shards: Sequence[int]) -> NDArray[np.float64]:
    """[L] summed squared error of the PCA baseline, in raw space, on these shards' validation tokens: standardised
    vectors are projected on k components about their mean, and mapped back by their own mean and scale."""
    data = open_data(spec)
    n_layers, d_model = data.shift.shape
    mean, directions = (part.to(data.encoder.dtype) for part in components)  # [D], [k, D]
    errors = np.zeros(n_layers)
    for _, x in vector_tiles(data.store, spec.layers, shards, data.selection.validation):
        raw = torch.from_numpy(x).view(-1, d_model)
        standardized, own_mean, scale = data.encoder.standardize(raw)
        x_hat = ((standardized - mean) @ directions.T @ directions + mean) * scale + own_mean
        errors += (raw - x_hat).double().square().sum(dim=-1).view(-1, n_layers).sum(dim=0).numpy()
    return errors
