"""The flags of `train compare`, as one frozen dataclass; the docstring under a field is its help.

Tested in tests/train/compare/test_measure.py.
"""

from dataclasses import dataclass
from pathlib import Path

from residscope.errors import UsageError
from residscope.options import require_at_least


@dataclass(frozen=True, kw_only=True)
class TrainCompareConfig:
    """Which autoencoders to compare, and on what."""

    store: Path
    """Store of activations to measure them on."""
    sae: tuple[str, ...]
    """Checkpoints, folders or hub ids, in any format that `residscope convert` reads. Checkpoints of single layers
    whose names differ only in layer=N (as --per-layer writes them) count as one set; a folder may hold such sets, or
    the runs of a --sweep."""
    out: Path = Path("comparison")
    """Folder for compare.parquet, compare.json and the figure."""
    pca: bool = True
    """Add the linear baselines: as many principal components as latents may be active, one set for all layers and one
    for each layer."""
    cross: bool = False
    """Measure each single-layer autoencoder on all layers of the store, which takes as many times as long."""
    tokens: int = 4096
    """Most held-out tokens to measure on."""
    fit_tokens: int = 8192
    """Most training tokens to fit the principal components on."""
    validation_fraction: float = 0.5
    """Share of the documents that count as held out if no checkpoint records which were."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, ...; auto: CUDA if there is one."""
    json: bool = False
    """Print the result as JSON on stdout instead of a table."""

    def __post_init__(self) -> None:
        require_at_least(2, tokens=self.tokens, fit_tokens=self.fit_tokens)
        if not 0 < self.validation_fraction < 1:
            raise UsageError(f"--validation-fraction should be in (0, 1), found {self.validation_fraction}")
