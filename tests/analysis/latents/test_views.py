"""Histograms: each activation in its bin, whatever the grouping. And the codes that an analysis keeps while it looks at
latents: whole, and gone where it fails."""

import ast
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from analysis.latents import views
from analysis.latents.views import EDGES, N_BINS, add_counts, write_histograms
from analysis.results.folder import EXAMPLES, HISTOGRAMS
from analysis.task import codes_again
from residscope.errors import ResidscopeError
from tests.support.small import make_small, run_small


def test_all_codes_are_seen_again_and_the_files_come_and_go_with_the_flag(tmp_path, monkeypatch):
    seen = []

    def watched(spec, needed):
        for tile in codes_again(spec, needed):
            seen.append(float(tile.values.sum()))
            yield tile

    def after_the_first_pass(found, *rest):
        totals.append(sum(seen))
        return original(found, *rest)

    totals, original = [], views.windows_of
    monkeypatch.setattr(views, "codes_again", watched)
    monkeypatch.setattr(views, "windows_of", after_the_first_pass)
    small, out = make_small(tmp_path), tmp_path / "out"
    run_small(small, out)
    assert totals == [pytest.approx(pd.read_parquet(out / "latents.parquet")["total"].sum())]
    assert (out / EXAMPLES).exists()
    assert run_small(small, out, examples=False)["examples"] is None
    assert not (out / EXAMPLES).exists()
    assert not (out / HISTOGRAMS).exists()


def test_codes_of_an_analysis_go_where_it_fails(tmp_path, monkeypatch):
    def fail(*_):
        assert list((out / ".partial" / "codes").glob("*.npz"))
        raise ResidscopeError("no")

    small, out = make_small(tmp_path), tmp_path / "out"
    monkeypatch.setattr(views, "write_found", fail)
    with pytest.raises(ResidscopeError, match="no"):
        run_small(small, out)
    assert not (out / ".partial" / "codes").exists()
    assert not (out / "summary.json").exists()


def test_each_activation_is_in_its_bin() -> None:
    rng = np.random.default_rng(0)
    values = (2 ** rng.uniform(-9, 9, (50, 3, 4))).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = 0
    indices = np.argsort(rng.random((50, 3, 7)), axis=-1)[..., :4]
    expected = np.zeros((7, 3, N_BINS), np.uint32)
    for t, layer, i in np.argwhere(values > 0):
        place = np.clip(np.searchsorted(EDGES, values[t, layer, i], side="right") - 1, 0, N_BINS - 1)
        expected[indices[t, layer, i], layer, place] += 1
    counts = np.zeros((7, 3, N_BINS), np.uint32)
    for part in (slice(0, 20), slice(20, 50)):
        add_counts(counts, values[part], indices[part])
    np.testing.assert_array_equal(counts, expected)
    assert counts.sum() == (values > 0).sum()


def test_edges_belong_to_the_bin_above() -> None:
    octaves = np.array(EDGES[::2], np.float64)
    counts = np.zeros((1, 1, N_BINS), np.uint32)
    add_counts(counts, octaves[:-1].reshape(-1, 1, 1), np.zeros((len(octaves) - 1, 1, 1), np.int64))
    np.testing.assert_array_equal(counts[0, 0], [1, 0] * (N_BINS // 2))


def test_the_file_holds_what_fired(tmp_path: Path) -> None:
    counts = np.zeros((3, 2, N_BINS), np.uint32)
    counts[1, 0, 5], counts[1, 1, 7], counts[2, 1, 0] = 4, 2, 1
    write_histograms(tmp_path / "h.parquet", counts, [3, 8])
    table = pq.read_table(tmp_path / "h.parquet")
    assert table["latent"].to_pylist() == [1, 1, 2]
    assert table["layer"].to_pylist() == [3, 8, 8]
    np.testing.assert_array_equal(np.array(table["counts"].to_pylist()), counts[[1, 1, 2], [0, 1, 1]])
    assert ast.literal_eval(table.schema.metadata[b"edges"].decode()) == list(EDGES)
