"""Figures and the numbers behind them: binning, words, and files that are the same each time."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.report.data import (
    EN_DASH,
    Results,
    headline,
    heat_map,
    layer_profile_title,
    load_results,
    percent,
    reconstruction_title,
    show,
    variance_title,
    why_no_ratio,
)
from analysis.report.figures import write_figures
from residscope.errors import IncompatibleError, ResidscopeError
from tests.support.results import write_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return load_results(write_results(tmp_path_factory.mktemp("results"), n_layers=6, n_latents=300))


def _profiles(probs: np.ndarray) -> Results:
    """Results that hold these profiles, [J, L], and nothing else."""
    layers = np.arange(probs.shape[1])
    latents = {"layer_mean": probs @ layers, "layer_std": np.sqrt(probs @ layers**2 - (probs @ layers) ** 2)}
    summary = {"layer_numbers": layers.tolist()}
    return Results(summary=summary, layers={}, latents=latents, counts=probs.astype(np.int64), probs=probs)


def test_heat_map_sorts_by_mean_layer_and_keeps_every_latent_when_it_fits() -> None:
    probs = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]])
    heat = heat_map(_profiles(probs))
    np.testing.assert_array_equal(heat.share, probs[[1, 3, 2, 0]].T)
    assert (heat.n_latents, heat.per_bin) == (4, 1.0)


@given(n_latents=st.integers(1, 60), max_bins=st.integers(1, 20), seed=st.integers(0, 99))
def test_heat_map_bins_are_means_of_neighbours(n_latents: int, max_bins: int, seed: int) -> None:
    probs = np.random.default_rng(seed).dirichlet(np.ones(4), n_latents)
    heat = heat_map(_profiles(probs), max_bins)
    order = np.argsort(probs @ np.arange(4), kind="stable")
    n_bins = min(max_bins, n_latents)
    edges = [i * n_latents // n_bins for i in range(n_bins + 1)]
    naive = [probs[order[a:b]].mean(0) for a, b in pairwise(edges)]
    np.testing.assert_allclose(heat.share, np.array(naive).T)
    np.testing.assert_allclose(heat.share.sum(0), 1)
    assert np.diff(edges).max() - np.diff(edges).min() <= 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2.1655, "2.17"),
        (0.000123, "0.000123"),
        (9.999, "10.0"),
        (31744, "31,744"),
        (-3.2, "\N{MINUS SIGN}3.20"),
        (0, "0"),
        (1.5e-5, "1.50\N{MULTIPLICATION SIGN}10^\N{MINUS SIGN}5"),
        (2.5e7, "2.50\N{MULTIPLICATION SIGN}10^7"),
        (None, EN_DASH),
        (float("nan"), EN_DASH),
        (float("inf"), EN_DASH),
        ("3", EN_DASH),
    ],
)
def test_numbers_are_shown_with_three_digits_and_never_as_nan(value: Any, shown: str) -> None:
    assert show(value) == shown


def test_percentages() -> None:
    assert [percent(x).replace("\N{NO-BREAK SPACE}", " ") for x in (0.2731, 0.0312, 0.0004, 0, 1, None)] == [
        *("27 %", "3.1 %", "0.040 %", "0 %", "100 %"),
        EN_DASH,
    ]


def test_titles_state_the_numbers_of_the_summary(results: Results) -> None:
    mass = results.summary["variance"]["mass"]
    assert show(mass["aggregate_over_token"]) in headline(results)
    for part in ("within_token", "between_tokens", "between_latents"):
        assert percent(mass[part] / mass["total"]) in variance_title(results)
    assert percent(results.summary["reconstruction"]["fvu"]) in reconstruction_title(results)
    assert percent(results.summary["baseline"]["pca"]["fvu"]) in reconstruction_title(results)
    assert show(np.median(results.latents["layer_std"]), 2) in layer_profile_title(results)
    assert results.reference_ratio == pytest.approx(1 / results.summary["variance"]["mlsae_compat"]["rel_var_t"])


def test_only_live_latents_are_kept(results: Results) -> None:
    assert len(results.probs) == results.summary["latents"]["active"] < results.summary["n_latents"]
    np.testing.assert_array_equal(results.counts.sum(1), results.latents["count"])
    np.testing.assert_allclose(results.probs.sum(1), 1)


def test_a_missing_ratio_is_explained(tmp_path: Path) -> None:
    def one_layer_a_token(summary: dict[str, Any]) -> None:
        summary["variance"]["mass"] |= {"within_token": 0.0, "aggregate_over_token": None}
        summary["variance"]["equal"]["aggregate_over_token"] = float("nan")

    results = load_results(write_results(tmp_path, n_layers=3, n_latents=20, change=one_layer_a_token))
    assert "fires at one layer only" in headline(results)
    assert why_no_ratio(results, "equal") == "summary.json holds no value for it"
    assert why_no_ratio(results, "latent") == ""


def test_figures_are_written_and_the_same_each_time(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    written = write_figures(results, first)
    drawn = ("layer_profile", "variance", "reconstruction", "downstream")
    names = [f"{name}.{suffix}" for name in drawn for suffix in ("png", "svg")]
    assert [path.name for path in written] == names
    write_figures(results, second)
    for path in written:
        assert path.read_bytes() == (second / path.name).read_bytes()
        assert path.stat().st_size < 500_000
    assert "lower is better" in (first / "reconstruction.svg").read_text()
    assert "P(layer | latent)" in (first / "layer_profile.svg").read_text()


def _bare(summary: dict[str, Any]) -> None:
    """No intervals, no baseline, no held-out text, no reference, no model."""
    summary["downstream"] = None
    summary["uncertainty"] = summary["validation"] = summary["validation_fvu"] = summary["baseline"] = None
    summary["variance"]["mlsae_compat"]["rel_var_t"] = None


@pytest.mark.parametrize(("n_layers", "dead"), [(1, 0.2), (4, 1.0), (4, 0.0)])
def test_figures_of_degenerate_results(tmp_path: Path, n_layers: int, dead: float) -> None:
    pytest.importorskip("matplotlib")
    folder = write_results(tmp_path, n_layers=n_layers, n_latents=8, dead_fraction=dead, ci=False, change=_bare)
    written = {path.stem for path in write_figures(load_results(folder), tmp_path)}
    assert written == {"variance", "reconstruction"} | ({"layer_profile"} if dead < 1 else set())


def test_without_matplotlib_nothing_is_written(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_figures(results, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ResidscopeError, match=r"holds no summary\.json"):
        load_results(tmp_path)
    write_results(tmp_path, n_layers=2, n_latents=4, change=lambda summary: summary.update(schema_version=9))
    with pytest.raises(IncompatibleError, match="schema_version is 9"):
        load_results(tmp_path)
    write_results(tmp_path, n_layers=2, n_latents=4)
    (tmp_path / "latents.parquet").write_bytes(b"PAR1")
    with pytest.raises(IncompatibleError, match="a table there is damaged"):
        load_results(tmp_path)
