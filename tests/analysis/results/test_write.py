"""docs/outputs.md lists every key and column that is written, and docs/method.md has every number's name."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.cli import main
from analysis.results.folder import FIGURES
from tests.support.small import LAYERS, make_small
from tests.support.small import run_small as run

DOCS = Path(__file__).parents[3] / "docs"
OF_THE_DATA = ("versions", "lens", "ci95")
"""Objects whose keys are names of packages and the like, or those beside them."""


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    run(make_small(root), root / "out")
    return root / "out"


def keys(value: Any) -> set[str]:
    """All keys of nested objects."""
    if isinstance(value, dict):
        return {key for name, item in value.items() for key in {name} | (set() if name in OF_THE_DATA else keys(item))}
    return {key for item in value for key in keys(item)} if isinstance(value, list) else set()


def listed(name: str) -> set[str]:
    text = (DOCS / "outputs.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {name}", 1)[1].split("\n## ")[0]
    return set("".join(c if c.isalnum() or c == "_" else " " for c in section).split())


def test_every_key_of_the_summary_is_listed(out):
    missing = keys(json.loads((out / "summary.json").read_text())) - listed("summary.json") - listed("layers.parquet")
    assert not missing


@pytest.mark.parametrize(
    "name", ["latents.parquet", "layers.parquet", "redundancy.parquet", "examples.parquet", "histograms.parquet"]
)
def test_every_column_is_listed(out, name):
    assert not set(pd.read_parquet(out / name).columns) - listed(name)


def test_the_columns_of_the_references_dists_data_sets_are_there_under_their_names(out):
    scalars = ["latent", "count", "total", "mean", "layer_mean", "layer_var", "layer_std"]
    names = [*scalars, "counts", "totals", "means", "probs"]
    table = pd.read_parquet(out / "latents.parquet", columns=names)
    assert table.columns.tolist() == names
    assert ", ".join(names) in (DOCS / "outputs.md").read_text(encoding="utf-8")
    live = table[table["count"] > 0]
    counts, totals = np.stack(live["counts"].tolist()), np.stack(live["totals"].tolist())
    layers = np.array(LAYERS)  # the model's numbers, from 0
    probs = totals / totals.sum(axis=1, keepdims=True)
    variance = probs @ layers**2 - (probs @ layers) ** 2
    expected = {
        "count": counts.sum(axis=1),
        "total": totals.sum(axis=1),
        "mean": totals.sum(axis=1) / counts.sum(axis=1),
        "layer_mean": probs @ layers,
        "layer_var": variance,
        "layer_std": np.maximum(variance, 0) ** 0.5,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(live[name], values, rtol=1e-9, atol=1e-6 if name == "layer_std" else 1e-10)
    np.testing.assert_allclose(np.stack(live["probs"].tolist()), probs)
    np.testing.assert_allclose(np.stack(live["means"].tolist()), totals / np.maximum(counts, 1))


def test_every_key_of_a_comparison_is_listed(out, tmp_path, capsys):
    assert main(["--compare", str(out), "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    (run_,) = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert not set(run_) - listed("`analyze --compare")


SIZES = {
    "schema_version",
    "seed",
    "chunk_tokens",
    "seconds",
    "n_layers",
    "n_latents",
    "n_documents",
    "layer_numbers",
} | {
    *("n_tokens", "n_validation_tokens", "n_train_vectors", "n_validation_vectors", "n_vectors", "n_groups"),
    *("n_replicates", "k", "rows", "per_layer", "tokens_around", "n", "latents", "layer", "latent", "rank", "token"),
    *("document", "latent_a", "latent_b"),
}
"""Numbers that are settings, sizes and names: listed in docs/outputs.md, with no formula to give."""


def numbers(value: Any, name: str = "") -> set[str]:
    """Names of all numbers in nested objects but for provenance and intervals."""
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if key not in ("provenance", "ci95")]
        return {number for key, item in items for number in numbers(item, key)}
    if isinstance(value, list):
        return {number for item in value for number in numbers(item, name)}
    return {name} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def with_formula() -> set[str]:
    """All words between backticks in docs/method.md."""
    spans = re.findall(r"`([^`\n]+)`", (DOCS / "method.md").read_text(encoding="utf-8"))
    return {word for span in spans for word in re.findall(r"\w+", span)}


def test_every_number_has_a_formula(out):
    summary = json.loads((out / "summary.json").read_text())
    found = {re.sub("_(low|high)$", "", name) for name in numbers(summary)}
    assert {"fvu", "within_token", "contiguity_multi", "mmcs", "rel_var_t", "overlap_by_distance", "bimodal"} <= (
        found | set(summary["profiles"])
    )
    wanted = "give its formula in docs/method.md, with its name in backticks"
    assert not sorted(found - SIZES - with_formula()), wanted
    assert not sorted({*summary["profiles"], *summary["nulls"]} - SIZES - with_formula()), wanted


@pytest.mark.parametrize("name", ["latents.parquet", "layers.parquet", "redundancy.parquet"])
def test_every_column_has_a_formula(out, name):
    columns = set(pd.read_parquet(out / name).columns)
    bounds = {column for column in columns if column.endswith(("_low", "_high"))}
    assert {column.rpartition("_")[0] for column in bounds} <= columns
    of_a_pair = {"layer_mean_a", "layer_mean_b", "redundant"}  # layer_mean of its two latents; a word, not a number
    assert sorted(columns - bounds - of_a_pair - SIZES - with_formula()) == []


def test_every_figure_has_its_line():
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    assert [name for name in (*FIGURES, "compare") if f"`{name}.png`" not in text] == []
