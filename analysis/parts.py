"""Optional parts of an analysis: what is made from the sums, or from another look at the codes, for one key of
summary.json.

A part is a module with a `Part`, listed in `PARTS` of `analysis.run`. It runs after the sums, in the analysing process,
with all that is known by then; it may run its own sum over shards in the same pool (`analysis.jobs`), read the codes of
tokens (`Context.codes`), and write files into the folder that becomes the output. Not here: any part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import spilled_codes
from analysis.config import AnalyzeConfig
from analysis.encoder import CodeTile
from analysis.jobs import Pool
from analysis.latents.redundancy import Redundancy
from analysis.moments import LatentTable, LayerMoments
from analysis.selection import Selection
from analysis.task import Work, code_tiles
from store.activations import ActivationStore
from train.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a part can work with."""

    config: AnalyzeConfig
    store: ActivationStore
    checkpoint: Checkpoint
    work: Work
    """What tasks are given: paths, `layers` as indices into the store's, dtype."""

    selection: Selection
    pool: Pool
    moments: LayerMoments
    table: LatentTable
    redundancy: Redundancy | None
    folder: Path
    """Where the part's files go; they are moved to the output folder when the whole analysis is done."""

    columns: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """[M] each: what parts add to latents.parquet, by name of the column; NaN becomes null."""

    def codes(self, needed: NDArray[np.bool_]) -> Iterator[CodeTile]:
        """Codes of the tokens `needed` [tokens of the store], a tile at a time, in order: as the sums' pass
        left them (`analysis.spilled_codes`), as the store keeps them (`--save-latents`), or encoded anew."""
        if self.work.spill and not (needed & ~self.selection.analysed).any():
            yield from spilled_codes.read(self.work.spill, needed)
            return
        bounds = (self.store.meta.shard_bounds(shard) for shard in range(self.store.meta.n_shards))
        shards = [shard for shard, (start, stop) in enumerate(bounds) if needed[start:stop].any()]
        yield from code_tiles(self.work, shards, needed)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One optional part."""

    name: str
    """Its key in summary.json; null there where the part was not wanted."""

    files: tuple[str, ...]
    """Names of the files that it may write; an earlier analysis's are removed."""

    wanted: Callable[[AnalyzeConfig], bool]

    make: Callable[[Context], Any]
    """Writes its files and returns the value for summary.json: plain JSON values, None for what is not defined."""
