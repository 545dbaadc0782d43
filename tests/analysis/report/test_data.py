"""Files of an analysis read back, and what is wrong with them in one line."""

from pathlib import Path

import numpy as np
import pytest

from analysis.report.data import load_results
from residscope.errors import IncompatibleError, ResidscopeError
from tests.support.results import write_results


def test_only_live_latents_are_kept(tmp_path: Path) -> None:
    results = load_results(write_results(tmp_path, n_layers=6, n_latents=300))
    assert len(results.probs) == results.summary["latents"]["active"] < results.summary["n_latents"]
    np.testing.assert_array_equal(results.counts.sum(1), results.latents["count"])
    np.testing.assert_allclose(results.probs.sum(1), 1)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ResidscopeError, match=r"has no summary\.json"):
        load_results(tmp_path)
    write_results(tmp_path, n_layers=2, n_latents=4, change=lambda summary: summary.update(schema_version=9))
    with pytest.raises(IncompatibleError, match="schema_version is 9"):
        load_results(tmp_path)
    write_results(tmp_path, n_layers=2, n_latents=4)
    (tmp_path / "latents.parquet").write_bytes(b"PAR1")
    with pytest.raises(IncompatibleError, match="a table cannot be read"):
        load_results(tmp_path)
