"""What `analyze` can be asked for. Light: the command line is made from this, and loads nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from store.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """An analysis of how an autoencoder's latents spread over the layers of a store."""

    store: Path
    """Folder of the activation store, as `harvest` wrote it."""

    sae: Path
    """Checkpoint of the autoencoder, as `train` wrote it."""

    out: Path | None = None
    """Folder for summary.json, latents.parquet, layers.parquet, figures and report.html; results that are in it are
    replaced. By default CHECKPOINT.analysis beside the checkpoint: ckpt.analysis for ckpt.pt."""

    split: Literal["all", "train", "validation"] = "all"
    """Which documents: every one, or the checkpoint's own training or validation documents."""

    max_tokens: int | None = None
    """Stop after so many kept tokens of the split, in store order. By default all of them."""

    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Number format of the encoder's product; float32 gives the same numbers on every machine, bfloat16 is several
    times faster where the hardware has it. Sums are float64 always."""

    pca: bool = True
    """Fit PCA with k components on the training documents and show its FVU on the validation documents beside the
    autoencoder's."""

    bootstrap: int = 1000
    """Bootstrap replicates over groups of documents for the 95 % intervals; 0 for none."""

    seed: int = 0
    """Seed of the bootstrap."""

    report: bool = True
    """Draw the figures and write report.html."""

    scheduler: str = "threads"
    """Where tasks run: `threads` of this process, `processes` of this machine (a Dask LocalCluster), or the address of
    a Dask scheduler (tcp://HOST:8786) whose workers see the same paths."""

    n_workers: int | None = None
    """Threads or processes that work at once. By default one per core; with a scheduler's address its workers count
    instead."""

    json: bool = False
    """Print summary.json on stdout, as one line, and the words on stderr."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "n_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} should be at least 1, found {value}")
        for name in ("bootstrap", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name} should not be negative, found {getattr(self, name)}")
        if self.scheduler not in ("threads", "processes") and ":" not in self.scheduler:
            raise UsageError(
                "--scheduler should be threads, processes or an address such as tcp://HOST:8786, "
                f"found {self.scheduler!r}"
            )

    @property
    def out_dir(self) -> Path:
        """Where results go."""
        return self.out if self.out is not None else self.sae.with_name(self.sae.stem + ".analysis")
