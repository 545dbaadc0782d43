"""Tiles of a store's tokens: their vectors, read a few chunks at a time, and their sparse codes.

Codes are encoded, or read from the store if an earlier analysis kept them there (`--save-latents`). During an analysis
they are also kept in a temporary folder, so that later steps need not encode again: one file per tile, named after its
first token; a task that is run again writes the same files. The folder is used only if it needs at most a quarter of
the free disk space.

Shapes: T tokens of a tile, L analysed layers, D d_model, k active latents a vector.
"""

import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.config import AnalyzeConfig
from analysis.encoder import Encoder
from residscope.errors import IncompatibleError, Interrupted
from store.activations import ActivationStore
from store.codes import KeptCodes
from train.kernels.interface import SparseCodes
from train.model import Standardized

TILE_BYTES = 32 * 2**20
"""Vectors read at once, as float32; at least one chunk of the store."""

BYTES_PER_CODE = {"float32": 8, "bfloat16": 8, "float64": 12}
"""A value and an int32 index, by the analysis's dtype; with bfloat16 products values are float32."""

SHARE_OF_DISK = 0.25
"""Share of the free disk space that the temporary codes of an analysis may use."""

STOPPING = threading.Event()
"""While set, tasks in threads of this process stop at their next tile, so that an interrupted run does not linger."""


class CodeTile(NamedTuple):
    """Sparse codes of some tokens of a store."""

    token: NDArray[np.int64]
    """[T] positions in the store, ascending."""
    values: NDArray[np.floating]
    """[T, L, k] >= 0."""
    indices: NDArray[np.int64]
    """[T, L, k]"""


def shards_with(store: ActivationStore, needed: NDArray[np.bool_]) -> dict[int, int]:
    """Shards with tokens that `needed` [tokens of the store] marks, ascending -> how many."""
    bounds = [store.meta.shard_bounds(shard) for shard in range(store.meta.n_shards)]
    counts = [int(needed[start:stop].sum()) for start, stop in bounds]
    return {shard: count for shard, count in enumerate(counts) if count}


def vector_tiles(
    store: ActivationStore, layers: tuple[int, ...], shards: Iterable[int], needed: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """The needed tokens of some shards, a tile at a time: their positions in the store [T] and their vectors float32
    [T, L, D]. Raises `IncompatibleError` if a value is not finite."""
    size = store.meta.chunk_tokens
    size *= max(1, TILE_BYTES // (size * len(layers) * store.meta.d_model * 4))
    for shard in shards:
        store.require_intact(shard)
        first, last = store.meta.shard_bounds(shard)
        for start in range(first, last, size):
            if STOPPING.is_set():
                raise Interrupted("the analysis was stopped")
            stop = min(start + size, last)
            token = start + np.flatnonzero(needed[start:stop])
            if not len(token):
                continue
            x = store.read(slice(start, stop), layers)
            x = x if len(token) == stop - start else x[token - start]
            if not (np.isfinite(x.min()) and np.isfinite(x.max())):  # any NaN makes both NaN
                t, i, d = (int(n) for n in np.argwhere(~np.isfinite(x))[0])
                raise IncompatibleError(
                    f"{store.path}, layer {store.meta.layers[layers[i]]}, token {token[t]} of the store, "
                    f"dimension {d}: the value {x[t, i, d]} is not finite: check the store with `residscope verify`, "
                    "or harvest again"
                )
            yield token, x


class Coder:
    """Codes of tiles: from the store if it has them, otherwise encoded, and kept there if `save`."""

    def __init__(
        self, encoder: Encoder, store: ActivationStore, layers: tuple[int, ...], kept: KeptCodes | None, save: bool
    ) -> None:
        self._encoder, self._store, self._layers, self._kept, self._save = encoder, store, layers, kept, save
        self._shard, self._codes = -1, None  # the shard of the last tile, and its kept codes

    def codes(self, token: NDArray[np.int64], vectors: Standardized) -> SparseCodes:
        """Codes of tokens [T] of one shard, given their standardised vectors."""
        if self._kept is not None:
            shard = int(token[0]) // self._store.meta.shard_tokens
            if shard != self._shard:
                self._shard, self._codes = shard, self._shard_codes(self._kept, shard)
            if self._codes is not None:
                rows = token - shard * self._store.meta.shard_tokens
                values, indices = (torch.from_numpy(part[rows]).flatten(0, 1) for part in self._codes)
                return SparseCodes(values, indices)
        return self._encoder.encode(vectors)

    def tiles(self, shards: Iterable[int], needed: NDArray[np.bool_]) -> Iterator[CodeTile]:
        """Codes of the tokens in these shards that `needed` [tokens of the store] marks, a tile at a time, in order."""
        for token, x in vector_tiles(self._store, self._layers, shards, needed):
            values, indices = self.codes(token, self._encoder.standardize(torch.from_numpy(x).view(-1, x.shape[-1])))
            shape = (len(token), len(self._layers), -1)
            yield CodeTile(token, values.view(shape).numpy(), indices.view(shape).numpy())

    def _shard_codes(self, kept: KeptCodes, shard: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
        codes = kept.read(shard)
        if codes is not None or not self._save:
            return codes
        start, stop = self._store.meta.shard_bounds(shard)
        encoding = Coder(self._encoder, self._store, self._layers, None, False)
        tiles = list(encoding.tiles([shard], self._store.tokens.keep))
        shape = (stop - start, len(self._layers), max(tile.values.shape[2] for tile in tiles))
        values, indices = np.zeros(shape, self._encoder.numpy_dtype), np.zeros(shape, np.int64)
        for tile in tiles:
            width = tile.values.shape[2]
            values[tile.token - start, :, :width] = tile.values
            indices[tile.token - start, :, :width] = tile.indices
        kept.write(shard, values, indices)
        return values, indices


def codes_folder(out: Path, config: AnalyzeConfig, n_tokens: int, n_layers: int, places: int) -> str | None:
    """A new folder in `out` for the codes of an analysis, `places` for each vector; None if they are not needed again,
    are kept in the store, or would take too much space."""
    size = n_tokens * n_layers * places * BYTES_PER_CODE[config.statistics.dtype]
    wanted = config.latents.examples and not config.latents.save_latents
    if not wanted or size > SHARE_OF_DISK * shutil.disk_usage(out).free:
        return None
    folder = out / "codes"
    folder.mkdir()
    return str(folder.resolve())


def write_codes(folder: str, tile: CodeTile) -> None:
    """Write a non-empty tile to the codes' folder."""
    path = Path(folder) / f"{int(tile.token[0]):015d}.npz"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, token=tile.token, values=tile.values, indices=tile.indices.astype(np.int32))
    partial.replace(path)


def read_codes(folder: str, needed: NDArray[np.bool_]) -> Iterator[CodeTile]:
    """The tiles in the codes' folder, in order, each cut to the tokens that `needed` [tokens of the store] marks."""
    for path in sorted(Path(folder).glob("*.npz")):
        with np.load(path) as kept:
            token = kept["token"]
            rows = needed[token]
            if rows.any():
                yield CodeTile(token[rows], kept["values"][rows], kept["indices"][rows].astype(np.int64))
