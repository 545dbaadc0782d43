"""Histograms of activations: each in its bin, whatever the grouping, and read back from the file."""

import ast
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from analysis.latents.histograms import EDGES, N_BINS, add_counts, no_counts, write_histograms


def test_each_activation_is_in_its_bin() -> None:
    rng = np.random.default_rng(0)
    values = (2 ** rng.uniform(-9, 9, (50, 3, 4))).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = 0
    indices = np.argsort(rng.random((50, 3, 7)), axis=-1)[..., :4]
    expected = no_counts(7, 3)
    for t, layer, i in np.argwhere(values > 0):
        place = np.clip(np.searchsorted(EDGES, values[t, layer, i], side="right") - 1, 0, N_BINS - 1)
        expected[indices[t, layer, i], layer, place] += 1
    counts = no_counts(7, 3)
    for part in (slice(0, 20), slice(20, 50)):
        add_counts(counts, values[part], indices[part])
    np.testing.assert_array_equal(counts, expected)
    assert counts.sum() == (values > 0).sum()


def test_edges_belong_to_the_bin_above() -> None:
    octaves = np.array(EDGES[::2], np.float64)
    counts = no_counts(1, 1)
    add_counts(counts, octaves[:-1].reshape(-1, 1, 1), np.zeros((len(octaves) - 1, 1, 1), np.int64))
    np.testing.assert_array_equal(counts[0, 0], [1, 0] * (N_BINS // 2))


def test_the_file_holds_what_fired(tmp_path: Path) -> None:
    counts = no_counts(3, 2)
    counts[1, 0, 5], counts[1, 1, 7], counts[2, 1, 0] = 4, 2, 1
    write_histograms(tmp_path / "h.parquet", counts, [3, 8])
    table = pq.read_table(tmp_path / "h.parquet")
    assert table["latent"].to_pylist() == [1, 1, 2]
    assert table["layer"].to_pylist() == [3, 8, 8]
    np.testing.assert_array_equal(np.array(table["counts"].to_pylist()), counts[[1, 1, 2], [0, 1, 1]])
    assert ast.literal_eval(table.schema.metadata[b"edges"].decode()) == list(EDGES)
