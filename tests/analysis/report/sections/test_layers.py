"""The heat map: binning, and the cells of its picture."""

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.report.charts import VIRIDIS
from analysis.report.data import Results
from analysis.report.sections.layers import HeatMap, heat_map, heat_png


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


def test_heat_png_holds_the_cells_in_viridis() -> None:
    share = np.array([[0.0, 0.25], [1.0, 0.5]])
    png = heat_png(HeatMap(share, 2, 1.0, 1.0))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    image = pytest.importorskip("matplotlib.image")
    pixels = np.round(image.imread(io.BytesIO(png)) * 255).astype(int)
    assert pixels.shape[:2] == (240, 480)
    first, last = ([*bytes.fromhex(VIRIDIS[i])] for i in (0, -1))
    assert pixels[239, 0, :3].tolist() == first
    assert pixels[0, 239, :3].tolist() == last
    assert pixels[239, 240, :3].tolist() == [*bytes.fromhex(VIRIDIS[8])]  # the square root of 0.25 is the middle
