"""Figures of an analysis: titles that state its numbers, and files that are the same each time."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.report.data import Results, load_results
from analysis.report.figures import write_figures
from analysis.report.markup import percent, show
from analysis.report.page import headline
from analysis.report.sections.layers import layer_profile_title
from analysis.report.sections.reconstruction import reconstruction_title
from analysis.report.sections.variance import variance_title, why_no_ratio
from tests.support.results import write_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return load_results(write_results(tmp_path_factory.mktemp("results"), n_layers=6, n_latents=300))


def test_titles_state_the_numbers_of_the_summary(results: Results) -> None:
    mass = results.summary["variance"]["mass"]
    assert show(mass["aggregate_over_token"]) in headline(results)
    for part in ("within_token", "between_tokens", "between_latents"):
        assert percent(mass[part] / mass["total"]) in variance_title(results)
    assert percent(results.summary["reconstruction"]["fvu"]) in reconstruction_title(results)
    assert percent(results.summary["baseline"]["pca"]["fvu"]) in reconstruction_title(results)
    assert show(np.median(results.latents["layer_std"]), 2) in layer_profile_title(results)
    assert results.reference_ratio == pytest.approx(1 / results.summary["variance"]["mlsae_compat"]["rel_var_t"])


def test_a_missing_ratio_is_explained(tmp_path: Path) -> None:
    def one_layer_a_token(summary: dict[str, Any]) -> None:
        summary["variance"]["mass"] |= {"within_token": 0.0, "aggregate_over_token": None}
        summary["variance"]["equal"]["aggregate_over_token"] = float("nan")

    results = load_results(write_results(tmp_path, n_layers=3, n_latents=20, change=one_layer_a_token))
    assert "fires at one layer only" in headline(results)
    assert why_no_ratio(results, "equal") == "summary.json has no value for it"
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
