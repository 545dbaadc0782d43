"""What `analyze` wrote, read back for the report and the figures.

Numbers stay as they were written; null and NaN mean that a number is not defined.

Shapes: L layers, J live latents (those that fired at least once in the analysed tokens).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.results.summary import read_summary
from analysis.results.tables import read_table
from residscope.errors import ResidscopeError
from residscope.reading import read_json, reading

WEIGHTINGS = {"mass": "activation mass", "equal": "equal pairs (token, latent)", "latent": "equal latents"}
"""The three weightings of the decomposition, and what each of them counts."""

PARTS = {"within_token": "within a token", "between_tokens": "between tokens", "between_latents": "between latents"}
"""The three parts of the total variance, in the order in which they are stacked."""

MAX_PAIRS = 20
"""Pairs of latents that the report lists."""

SCALARS = (
    *("latent", "count", "n_tokens", "total", "mean", "layer_mean", "layer_var", "layer_std"),
    *("within_token", "between_tokens", "entropy", "n_layers_active"),
)
OPTIONAL_SCALARS = ("context_overlap", "context_chance")
"""Columns of latents.parquet that an analysis may lack."""

PROMPT_COLUMNS = ["prompt", "position", "layer", "latent", "activation"]

_AGAIN = "run `analyze` again"


@dataclass(frozen=True, kw_only=True)
class Results:
    """One run of `analyze`."""

    summary: dict[str, Any]
    """summary.json, unchanged."""
    layers: dict[str, np.ndarray]
    """Columns of layers.parquet, float64 [L] each; NaN where the file has null."""
    latents: dict[str, np.ndarray]
    """Scalar columns of latents.parquet (with any `OPTIONAL_SCALARS`), live latents [J] ascending; NaN for null."""
    counts: np.ndarray
    """Firings by latent and layer, int64 [J, L]."""
    probs: np.ndarray
    """P(layer | latent), the share of the latent's activation mass at each layer, float64 [J, L]; rows sum to 1."""
    kinds: np.ndarray = field(default_factory=lambda: np.empty(0, object))
    """Kind of each live latent's profile, [J]."""
    prompts: dict[str, Any] | None = None
    """prompt.json, which `analyze --prompt` adds; None without it."""
    prompt_rows: dict[str, np.ndarray] = field(default_factory=dict)
    """`PROMPT_COLUMNS` of prompt.parquet."""
    pairs: list[dict[str, Any]] = field(default_factory=list)
    """The first `MAX_PAIRS` near-parallel pairs of latents, as in redundancy.parquet."""
    folder: Path = Path()
    """Where the files are."""

    @property
    def layer_numbers(self) -> list[int]:
        """The model's block indices of the L columns, from 0."""
        return [int(layer) for layer in self.summary["layer_numbers"]]

    def get(self, *keys: str) -> Any:
        """The value at a path of keys in the summary, or None where the path ends early."""
        value: Any = self.summary
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, *keys: str) -> float | None:
        """The number at a path of keys, or None where it is missing or not finite."""
        return finite(self.get(*keys))

    def numbers(self, *keys: str) -> np.ndarray:
        """The list at a path of keys, float64 with NaN for null; where it is missing, L times NaN."""
        found = self.get(*keys)
        return np.array(found if isinstance(found, list) else [None] * len(self.layer_numbers), np.float64)

    def bounds(self, *keys: str) -> tuple[float, float] | None:
        """The 95 % interval of the number at a path of keys, from "ci95" beside it; None without one."""
        bounds = self.get(*keys[:-1], "ci95", keys[-1])
        return _interval(*bounds) if isinstance(bounds, list) and len(bounds) == 2 else None

    def layer_bounds(self, name: str, i: int) -> tuple[float, float] | None:
        """The 95 % interval of a column of layers.parquet at one row; None without one."""
        low, high = (self.layers.get(f"{name}_{end}") for end in ("low", "high"))
        return None if low is None or high is None else _interval(low[i], high[i])

    @property
    def reference_ratio(self) -> float | None:
        """Aggregate over token-level variance by the reference's formula, 1 / rel_var_t; None where not defined."""
        rel = self.number("variance", "mlsae_compat", "rel_var_t")
        return None if rel is None or rel <= 0 else 1 / rel


def load_results(out_dir: Path) -> Results:
    """Read what `analyze` wrote into `out_dir`; the files of redundant pairs, examples and prompts may be missing.

    Raises ResidscopeError for a missing file, IncompatibleError for another schema_version or a damaged table.
    """
    for name in ("summary.json", "layers.parquet", "latents.parquet"):
        if not (out_dir / name).is_file():
            raise ResidscopeError(f"{out_dir} has no {name}: the report is made from what `analyze --out` writes")
    summary = read_summary(out_dir / "summary.json")
    with reading(f"{out_dir}: a table cannot be read", _AGAIN):
        return _load_tables(out_dir, summary)


def _load_tables(out_dir: Path, summary: dict[str, Any]) -> Results:
    names = pq.read_schema(out_dir / "latents.parquet").names
    scalars = [*SCALARS, *(name for name in OPTIONAL_SCALARS if name in names)]
    latents = read_table(out_dir / "latents.parquet", columns=[*scalars, "profile", "counts", "probs"])
    latents = latents.filter(pc.field("count") > 0)
    layers = _columns(read_table(out_dir / "layers.parquet"))
    prompt, pairs = out_dir / "prompt.json", out_dir / "redundancy.parquet"
    has_prompts = prompt.is_file() and (out_dir / "prompt.parquet").is_file()

    def matrix(name: str) -> np.ndarray:
        lists: Any = latents[name].combine_chunks()
        return np.asarray(lists.flatten()).reshape(len(latents), len(summary["layer_numbers"]))

    return Results(
        summary=summary,
        layers={name: values.astype(np.float64) for name, values in layers.items()},
        latents=_columns(latents.select(scalars)),
        counts=matrix("counts"),
        probs=matrix("probs"),
        kinds=np.array(latents["profile"].to_pylist(), object),
        prompts=read_json(prompt) if has_prompts else None,
        prompt_rows=_columns(read_table(out_dir / "prompt.parquet", columns=PROMPT_COLUMNS)) if has_prompts else {},
        pairs=read_table(pairs).slice(0, MAX_PAIRS).to_pylist() if pairs.is_file() else [],
        folder=out_dir,
    )


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: np.asarray(table[name].to_numpy()) for name in table.column_names}


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return None
    return float(value) if math.isfinite(value) else None


def _interval(low: Any, high: Any) -> tuple[float, float] | None:
    ends = finite(low), finite(high)
    return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])
