"""The sparse codes of an analysis, left in files while it lasts, so that its parts need not encode again.

One file for each tile of tokens, named by the tile's first token; a task that is run again writes the same
files. They are read a tile at a time. Kept where they take no more than a quarter of the free disk, else parts encode
anew. Not here: what is made of codes.

Shapes: T tokens, L layers, k active latents a vector.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.config import AnalyzeConfig
from analysis.encoder import CodeTile

BYTES_PER_CODE = {"float32": 8, "bfloat16": 8, "float64": 12}
"""A value and an int32 index, by the analysis's dtype; with bfloat16 products values are float32."""

SHARE_OF_DISK = 0.25
"""Of the free space, that may be used."""


def folder_for(out: Path, config: AnalyzeConfig, n_tokens: int, n_layers: int, places: int) -> str | None:
    """A new folder in `out` to keep codes in, `places` for each vector; None if no part needs them, if the store keeps
    them, or if they take too much space."""
    size = n_tokens * n_layers * places * BYTES_PER_CODE[config.dtype]
    if config.save_latents or not config.examples or size > SHARE_OF_DISK * shutil.disk_usage(out).free:
        return None
    folder = out / "codes"
    folder.mkdir()
    return str(folder.resolve())


def write(folder: str, tile: CodeTile) -> None:
    """Keep a tile that is not empty."""
    path = Path(folder) / f"{int(tile.token[0]):015d}.npz"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, token=tile.token, values=tile.values, indices=tile.indices.astype(np.int32))
    partial.replace(path)


def read(folder: str, needed: NDArray[np.bool_]) -> Iterator[CodeTile]:
    """The kept tiles in order, of each the tokens `needed` [tokens of the store]."""
    for path in sorted(Path(folder).glob("*.npz")):
        with np.load(path) as kept:
            token = kept["token"]
            rows = needed[token]
            if rows.all():
                yield CodeTile(token, kept["values"], kept["indices"].astype(np.int64))
            elif rows.any():
                yield CodeTile(token[rows], kept["values"][rows], kept["indices"][rows].astype(np.int64))


@contextmanager
def lasting(folder: str | None) -> Iterator[None]:
    """Remove what was kept at the end of the block, also where the analysis fails: it may be a quarter of the disk."""
    try:
        yield
    finally:
        if folder:
            # A task that is being stopped may still add a file.
            shutil.rmtree(folder, ignore_errors=True)
