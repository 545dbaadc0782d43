"""A finished analysis of a tiny random model, opened again."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from analysis.cli import main
from analysis.live.opened import Analysis
from tests.support.harvested import Harvested, make_checkpoint, make_harvested
from train.model import MLSAE

TEXT = "mary and john"


class Live(NamedTuple):
    made: Harvested
    sae: MLSAE
    checkpoint: Path
    folder: Path

    def analyze(self, *words: str) -> dict[str, Any]:
        """What the command prints with --json."""
        store = ["--store", str(self.made.store.path), "--sae", str(self.checkpoint), "--out", str(self.folder)]
        options = ["--no-intervals", "--no-nulls", "--no-redundancy", "--no-pca", "--downstream-tokens", "0"]
        said = StringIO()
        with redirect_stdout(said):
            status = main([*store, "--model", str(self.made.model_folder), *options, "--no-report", *words, "--json"])
        assert status == 0
        return json.loads(said.getvalue())

    def open(self) -> Analysis:
        return Analysis.open(self.folder, model=str(self.made.model_folder))


def make_live(root: Path, **options: Any) -> Live:
    """Harvest, make an autoencoder, and analyze, in `root`. options: of `make_harvested`."""
    made = make_harvested(root, "llama", **options)
    live = Live(made, make_checkpoint(root / "ckpt.pt", made.store), root / "ckpt.pt", root / "ckpt.analysis")
    live.analyze()
    return live
