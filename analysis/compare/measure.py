"""`analyze --compare A B C`: any number of analyses side by side.

Variances of models of different depth are made comparable by dividing them by the variance of a layer drawn uniformly
from the analysed ones: (n_layers^2 - 1) / 12 if these are consecutive. 1 is a uniform spread, whatever the depth. Runs
of one kind (model, trained or not, lens, layers) are grouped, kinds in the order in which they were given, and sorted
within a kind by expansion factor and k, so that a sweep reads as one table.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.baselines.nulls import NULLS
from analysis.compare.figure import write_comparison
from analysis.compare.words import compare_words
from analysis.config import CompareConfig
from analysis.moments import VARIANCE_NAMES, WEIGHTINGS
from analysis.persistence import PAIR_WEIGHTINGS, PERSISTENCE_NAMES
from analysis.results.summary import SCHEMA_VERSION, read_summary
from residscope.destinations import comparison, refuse_comparison_of
from residscope.errors import IncompatibleError, UsageError
from residscope.reading import reading
from store.folder import refuse_inside_store

PARTS = VARIANCE_NAMES[:5]
"""The numbers that are variances, and so are divided by that of a uniformly drawn layer."""

KIND = ("model", "random_init", "lens", "layers")
"""What runs of one kind share; they differ in expansion factor and k."""

QUALITY = {
    **dict.fromkeys(("fvu", "l0"), "reconstruction"),
    **dict.fromkeys(("delta_ce", "kl", "loss_recovered_mean"), "downstream"),
}
"""Means over layers, each with its interval, and the part of the summary that has them."""

_AGAIN = "run `analyze` again"


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare runs, write the files to `config.out`, print the table, and return compare.json's content.

    Raises `UsageError` for a path that does not exist, `IncompatibleError` for one that is not a complete analysis.
    """
    refuse_inside_store(config.out)
    refuse_comparison_of("train compare", config.out, "store")
    summaries = [_load(path) for path in config.compare]
    runs = in_order(list(map(_checked_run, config.compare, run_names(config.compare), summaries)))
    result = {"schema_version": SCHEMA_VERSION, "runs": runs}
    damaged = "--compare: a number in one of these summary.json is damaged"
    with comparison(config.out) as folder, reading(damaged, _AGAIN):
        content, words = json.dumps(result, indent=2, allow_nan=False), compare_words(runs)
        pd.DataFrame(_rows(runs)).to_parquet(folder / "compare.parquet", index=False)
        written = ["compare.json", "compare.parquet", *write_comparison(runs, folder)]
        (folder / "compare.json").write_text(content, encoding="utf-8")
    if config.json:
        print(json.dumps(result, allow_nan=False))
    else:
        print(words)
        print(f"Written to {config.out}: {', '.join(sorted(written))}.")
    return result


def _load(path: Path) -> dict[str, Any]:
    file = path / "summary.json" if path.is_dir() else path
    if not path.exists():
        raise UsageError(f"--compare {path}: there is no such file or folder")
    if not file.is_file():
        way_out = "give folders that `analyze` wrote, or their summary.json"
        raise IncompatibleError(f"--compare {path}: no summary.json there: {way_out}")
    return read_summary(file)


def run_names(paths: Sequence[Path]) -> list[str]:
    """Names of runs: the last parts of each path, as many as are needed to make all names different."""
    folders = [path.parent if path.name == "summary.json" else path for path in paths]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) or str(folder) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}: {folder.name}" for i, folder in enumerate(folders)]


def in_order(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs sorted by kind (in order of first appearance), then by expansion factor, k, and the order given."""
    kinds = [[run[name] for name in KIND] for run in runs]

    def place(run: dict[str, Any]) -> tuple[float, ...]:
        return kinds.index([run[name] for name in KIND]), run["expansion_factor"] or 0, run["k"] or 0

    return sorted(runs, key=place)


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("provenance", "split", "latents", "variance"), (dict,)),
    **dict.fromkeys(("n_tokens", "n_layers", "n_latents"), (int,)),
    **dict.fromkeys(("reconstruction", "persistence", "nulls", "downstream"), (dict, type(None))),
    "layer_numbers": (list,),
    "validation_fvu": (int, float, type(None)),
}
"""Types of the entries that are read from a summary."""


def _checked_run(path: Path, name: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Like `_run`; raises `IncompatibleError` if the summary is not as `analyze` writes it."""
    with reading(f"--compare {path}: its summary.json is damaged or was not written by `analyze`", _AGAIN):
        for key, kinds in _KINDS.items():
            if not isinstance(summary.get(key), kinds):
                raise TypeError(f"{key} is {summary.get(key)!r:.40}")
        if not summary["layer_numbers"]:
            raise ValueError("layer_numbers is empty")
        run = _run(name, summary)
        _rows([run])  # fails if a number of the table is missing
        return run


def _run(name: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    store, sae = summary["provenance"]["store"], summary["provenance"]["sae"]
    lens, uniform = store.get("lens"), float(np.var(summary["layer_numbers"]))
    rel_var_t = summary["variance"]["mlsae_compat"]["rel_var_t"]
    persistence, nulls = summary.get("persistence"), summary.get("nulls")
    quality = {}
    for column, part in QUALITY.items():
        quality |= _with_ends({column: None, "ci95": {}} | (summary.get(part) or {}), [column])
    together = ((summary.get("downstream") or {}).get("together") or {}).get("groups") or [{}]
    quality |= {f"{name}_all_layers": together[0].get(name) for name in ("delta_ce", "kl")}
    return {
        "run": name,
        "model": store.get("model"),
        "random_init": store.get("random_init"),
        "lens": None if lens is None else str(lens.get("id", "yes")) if isinstance(lens, dict) else str(lens),
        "n_layers": summary["n_layers"],
        "layers": summary["layer_numbers"],
        "n_latents": summary["n_latents"],
        "activation": sae.get("activation"),
        "k": sae.get("k"),
        "expansion_factor": sae.get("expansion_factor"),
        "n_tokens": summary["n_tokens"],
        "trained_on": summary["split"]["trained_on"],
        "trained_tokens": sae.get("trained_tokens"),
        "settled": ((summary.get("convergence") or {}).get("last_quarter") or {}).get("settled"),
        "live_latents": summary["latents"]["active"],
        **quality,
        "validation_fvu": summary["validation_fvu"],
        "uniform_variance": uniform,
        "reference_ratio": 1 / rel_var_t if rel_var_t else None,
        "variance": {weighting: summary["variance"][weighting] for weighting in WEIGHTINGS},
        "normalised": {w: _normalised(summary["variance"][w], uniform) for w in WEIGHTINGS},
        "persistence": {w: persistence[w] for w in PAIR_WEIGHTINGS} if persistence else None,
        "null_ratio": {null: nulls[null]["ratio"] for null in NULLS} if nulls else None,
    }


def _normalised(variance: Mapping[str, Any], uniform: float) -> dict[str, Any]:
    """Variances divided by that of a uniformly drawn layer; None if there is only one layer."""
    if not uniform:
        return {**dict.fromkeys(PARTS), "ci95": {}}
    intervals = {name: variance["ci95"].get(name) for name in PARTS}
    return {
        **{name: variance[name] / uniform for name in PARTS},
        "ci95": {name: [bound / uniform for bound in bounds] for name, bounds in intervals.items() if bounds},
    }


def _rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each run and weighting; *_low and *_high are the ends of 95 % intervals."""
    rows = []
    for run in runs:
        for weighting in WEIGHTINGS:
            row = {name: value for name, value in run.items() if not isinstance(value, dict)} | {"weighting": weighting}
            row |= _with_ends(run["variance"][weighting], VARIANCE_NAMES)
            row |= _with_ends(run["normalised"][weighting], PARTS, "_normalised")
            if run["persistence"] and weighting in run["persistence"]:
                row |= _with_ends(run["persistence"][weighting], PERSISTENCE_NAMES)
            for null, ratio in (run["null_ratio"] or {}).items():
                row[f"within_token_over_{null}"] = ratio["variance"][weighting]["within_token"]
            rows.append(row)
    return rows


def _with_ends(numbers: Mapping[str, Any], names: Sequence[str], suffix: str = "") -> dict[str, Any]:
    columns = {}
    for name in names:
        low, high = numbers["ci95"].get(name) or (None, None)
        columns |= {name + suffix: numbers[name], f"{name}{suffix}_low": low, f"{name}{suffix}_high": high}
    return columns
