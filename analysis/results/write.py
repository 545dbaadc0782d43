"""Writes an analysis: its tables, summary.json and options; prints its findings.

The tables' columns and types are set here and described in docs/outputs.md; what is not defined is null, never NaN.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.config import AnalyzeConfig
from analysis.latents.redundancy import MAX_OVERLAP, N_NEIGHBOURS, Redundancy
from analysis.latents.table import LatentTable
from analysis.model.downstream_numbers import COLUMNS as DOWNSTREAM_COLUMNS
from analysis.moments import LayerMoments
from analysis.results import folder as files
from analysis.results.summary import Findings, build
from analysis.results.tables import write_table
from analysis.results.words import words
from residscope.options import to_flat, to_toml

_INTEGERS = ("layer", "n_vectors", "active_latents")
LAYER_COLUMNS = pa.schema(
    (name, pa.int64() if name in _INTEGERS else pa.float64())
    for name in (
        *("layer", "fvu", "mse", "l0", "mean_norm", "cosine_to_next", "n_vectors", "active_latents", "mass_share"),
        *("validation_fvu", "pca_fvu", "fvu_without_few", "fvu_low", "fvu_high", *DOWNSTREAM_COLUMNS),
    )
)


def write_latents(
    path: Path, moments: LayerMoments, table: LatentTable, redundancy: Redundancy | None, extra: Mapping[str, pa.Array]
) -> None:
    """One row for each latent, including dead ones; lists have one entry per layer. extra: more columns, each [M]."""
    none = (moments.n_latents, N_NEIGHBOURS)
    neighbours = redundancy.neighbours if redundancy else np.full(none, -1)
    cosines = redundancy.neighbour_cosines if redundancy else np.full(none, np.nan)
    scalars = ("mean", "layer_mean", "layer_var", "layer_std", "within_token", "between_tokens", "entropy")
    found = table._asdict() | {"latent": np.arange(moments.n_latents), "layer_std": np.sqrt(table.layer_var)}
    found |= {"count": table.n_fired, "counts": moments.counts, "totals": moments.totals}
    columns = {
        **{name: pa.array(found[name]) for name in ("latent", "count", "n_tokens", "total")},
        **{name: pa.array(found[name], from_pandas=True) for name in scalars},  # NaN as null
        "n_layers_active": pa.array(table.n_layers_active),
        **{name: pa.array(values, from_pandas=True) for name, values in table.persistence._asdict().items()},
        "profile": pa.array(table.kinds, pa.string()),
        "nearest": pa.array(neighbours[:, 0], mask=neighbours[:, 0] < 0),
        "nearest_cosine": pa.array(cosines[:, 0], from_pandas=True),
        "neighbours": _known(neighbours, neighbours >= 0),
        "neighbour_cosines": _known(cosines, neighbours >= 0),
        **extra,
        **{name: _lists(found[name]) for name in ("counts", "totals", "means", "probs")},
    }
    write_table(pa.table(columns), path)


def write_layers(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_table(pa.Table.from_pylist(list(rows), schema=LAYER_COLUMNS), path)


def write_redundancy(path: Path, redundancy: Redundancy, table: LatentTable) -> None:
    """One row for each near-parallel pair that was kept, in the order of `find_redundancy`."""
    pairs = redundancy.pairs
    columns = {
        "latent_a": pa.array(pairs.a),
        "latent_b": pa.array(pairs.b),
        "cosine": pa.array(pairs.cosine),
        "overlap": pa.array(pairs.overlap),
        "redundant": pa.array(pairs.overlap < MAX_OVERLAP),
        "layer_mean_a": pa.array(table.layer_mean[pairs.a]),
        "layer_mean_b": pa.array(table.layer_mean[pairs.b]),
    }
    write_table(pa.table(columns), path)


def _lists(values: NDArray[Any]) -> pa.Array:
    """[M, L] as M lists of L."""
    rows = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return rows.cast(pa.list_(rows.type.value_type))


def _known(values: NDArray[Any], known: NDArray[np.bool_]) -> pa.Array:
    """[M, n] as M lists, each with only its known values."""
    offsets = np.concatenate([[0], np.cumsum(known.sum(axis=1))])
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values[known]))


def write_results(found: Findings, folder: Path) -> dict[str, Any]:
    """Write all files except the report's into `folder`; returns summary.json's content."""
    summary = build(found)
    columns = found.views.columns if found.views else {}
    write_latents(folder / files.LATENTS, found.sums.moments, found.table, found.redundancy, columns)
    if found.redundancy:
        write_redundancy(folder / files.REDUNDANCY, found.redundancy, found.table)
    write_layers(folder / files.LAYERS, summary["layers"])
    (folder / files.SUMMARY).write_text(json.dumps(summary, indent=2, allow_nan=False), encoding="utf-8")
    (folder / files.CONFIG).write_text(to_toml(to_flat(found.config)), encoding="utf-8")
    return summary


def tell(config: AnalyzeConfig, summary: dict[str, Any]) -> None:
    """Print the findings; with --json, print them on stderr and summary.json on stdout."""
    say = partial(print, file=sys.stderr) if config.output.json else print
    say(words(summary))
    written = sorted(path.name for path in config.out_dir.iterdir() if path.name in files.FILES)
    say(f"Written to {config.out_dir}: {', '.join(written)}.")
    if config.output.json:
        print(json.dumps(summary, allow_nan=False))
