"""Kinds of layer profiles, and redundancy, on planted dictionaries and against whole matrices."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.latents import redundancy
from analysis.latents.redundancy import MAX_OVERLAP, find_redundancy
from analysis.latents.table import KINDS, profile_kinds
from tests.support.small import make_small
from tests.support.small import run_small as run


def kinds(profiles: list[list[float]]) -> list[str | None]:
    rows = np.array(profiles, np.float64)
    total = rows.sum(axis=1, keepdims=True)
    probs = np.divide(rows, total, out=np.zeros_like(rows), where=total > 0)
    entropy = -(probs * np.log2(np.where(probs > 0, probs, 1))).sum(axis=1)
    return list(profile_kinds(probs, np.where(total[:, 0] > 0, entropy, np.nan)))


@pytest.mark.parametrize(
    ("profile", "kind"),
    [
        ([1, 1, 0, 0, 0, 0, 0, 0, 0], "early"),
        ([0, 0, 0, 1, 2, 1, 0, 0, 0], "middle"),
        ([0, 0, 0, 0, 0, 0, 0, 3, 1], "late"),
        ([1, 1, 1, 1, 1, 1, 1, 1, 1], "persistent"),
        ([1, 1, 1, 1, 1, 1, 0, 0, 0], "persistent"),  # six of nine layers: exactly two thirds
        ([1, 1, 1, 1, 1, 0, 0, 0, 0], "early"),
        ([2, 1, 0, 0, 0, 0, 0, 0, 2], "bimodal"),
        ([2, 1, 0, 0, 0, 0, 0, 0, 0.9], "early"),  # under a quarter of the mass is at the end
        ([0, 0, 0, 4, 1, 4, 0, 0, 0], "middle"),  # a valley, but its sides are two layers apart
        ([0, 4, 3, 2.5, 2.1, 2.5, 3, 4, 0], "persistent"),  # a valley that is not deep
        ([0, 0, 0, 0, 0, 0, 0, 0, 0], None),
        ([0, 0, 0, 0, 0, 0, 0, 0, 5], "late"),
    ],
)
def test_planted_profiles_have_their_kind(profile, kind):
    assert kinds([profile]) == [kind]


@given(seed=st.integers(0, 10_000), n_layers=st.integers(1, 12))
def test_every_live_latent_has_one_kind_and_the_mirror_image_has_the_mirrored_one(seed, n_layers):
    rng = np.random.default_rng(seed)
    profiles = rng.gamma(0.3, 1.0, (20, n_layers)) + 1e-9
    mirror = {"early": "late", "late": "early"}
    found = kinds(profiles.tolist())
    assert set(found) <= set(KINDS)
    assert kinds(profiles[:, ::-1].tolist()) == [mirror.get(str(kind), kind) for kind in found]


def naive(W: np.ndarray, probs: np.ndarray, threshold: float):
    live = np.flatnonzero(probs.any(axis=1))
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    cosine = unit @ unit.T
    pairs = {
        (int(a), int(b)): (cosine[a, b], np.minimum(probs[a], probs[b]).sum())
        for a in live
        for b in live
        if a < b and cosine[a, b] > threshold
    }
    best = {int(a): max(cosine[a, b] for b in live if b != a) for a in live}
    return pairs, best


@pytest.mark.parametrize("tile_bytes", [4, 500, 2**20])
def test_pairs_neighbours_and_mmcs_equal_those_of_whole_matrices(monkeypatch, tile_bytes):
    monkeypatch.setattr(redundancy, "TILE_BYTES", tile_bytes)
    monkeypatch.setattr(redundancy, "_PAIRS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    W = rng.normal(size=(40, 3)) * rng.gamma(1.0, 1.0, (40, 1))
    probs = rng.dirichlet(np.full(6, 0.2), 40)
    probs[[0, 7, 39]] = 0  # dead
    found = find_redundancy(torch.from_numpy(W), probs, 0.9)
    pairs, best = naive(W, probs, 0.9)
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert {(a, b) for a, b in zip(found.pairs.a, found.pairs.b, strict=True)} == set(pairs)
    assert found.n_parallel == len(pairs) > 20
    for a, b, cosine, overlap in zip(*found.pairs, strict=True):
        assert (cosine, overlap) == pytest.approx(pairs[a, b], rel=1e-5)
    redundant = {pair for pair, (_, overlap) in pairs.items() if overlap < MAX_OVERLAP}
    assert found.n_redundant == len(redundant) > 0
    assert found.n_redundant_latents == len({latent for pair in redundant for latent in pair})
    assert (np.diff((found.pairs.overlap >= MAX_OVERLAP).astype(int)) >= 0).all()
    assert found.mmcs == pytest.approx(np.mean(list(best.values())), rel=1e-5)
    for latent in range(40):
        if latent in best:
            assert found.neighbours[latent, 0] != latent
            others = sorted((b for b in best if b != latent), key=lambda b: -cosines[latent, b])[:5]
            assert found.neighbours[latent].tolist() == others
            np.testing.assert_allclose(found.neighbour_cosines[latent], cosines[latent, others], rtol=1e-5, atol=1e-7)
            assert found.neighbour_cosines[latent, 0] == pytest.approx(best[latent], rel=1e-5)
        else:
            assert (found.neighbours[latent, 0], np.isnan(found.neighbour_cosines[latent, 0])) == (-1, True)
            assert (found.neighbours[latent] == -1).all()


def test_one_direction_learnt_once_per_layer_is_found_exactly():
    # Three directions at right angles, each learnt by four latents with a layer of their own; a fourth direction by two
    # latents of the same layers, which is parallel and not redundant.
    W = np.concatenate([np.repeat(np.eye(4)[:3], 4, axis=0), np.repeat(np.eye(4)[3:], 2, axis=0)])
    probs = np.concatenate([np.tile(np.eye(4), (3, 1)), np.full((2, 4), 0.25)])
    found = find_redundancy(torch.from_numpy(W), probs, 0.9)
    assert (found.n_parallel, found.n_redundant, found.n_redundant_latents) == (3 * 6 + 1, 18, 12)
    assert found.mmcs == pytest.approx(1.0)
    assert (found.pairs.a[-1], found.pairs.b[-1], found.pairs.overlap[-1]) == (12, 13, 1.0)


def test_the_pairs_kept_are_the_foremost(monkeypatch):
    monkeypatch.setattr(redundancy, "MAX_PAIRS", 5)
    monkeypatch.setattr(redundancy, "TILE_BYTES", 100)
    W = np.random.default_rng(0).normal(size=(30, 2))
    probs = np.eye(30)
    found = find_redundancy(torch.from_numpy(W), probs, 0.5)
    pairs, _ = naive(W, probs, 0.5)
    assert found.n_parallel == len(pairs)
    np.testing.assert_allclose(found.pairs.cosine, sorted((c for c, _ in pairs.values()), reverse=True)[:5], rtol=1e-5)


@pytest.mark.parametrize("n_live", [0, 1])
def test_no_other_latent_no_neighbour(n_live):
    probs = np.zeros((3, 2))
    probs[:n_live] = 0.5
    found = find_redundancy(torch.eye(3), probs, 0.9)
    assert found.n_parallel == 0
    assert np.isnan(found.mmcs)
    assert (found.neighbours == -1).all()


def test_few_latents_have_fewer_neighbours():
    found = find_redundancy(torch.tensor([[1.0, 0], [2, 1], [0, 1]]), np.eye(3), 0.9)
    assert found.neighbours[:, :3].tolist() == [[1, 2, -1], [0, 2, -1], [1, 0, -1]]
    np.testing.assert_allclose(found.neighbour_cosines[0], [0.8**0.5, 0, *[np.nan] * 3], atol=1e-7)


def test_an_analysis_writes_kinds_neighbours_and_pairs(tmp_path):
    small = make_small(tmp_path)
    summary = run(small, tmp_path / "out", redundancy_cosine=0.3)
    table = pd.read_parquet(tmp_path / "out" / "latents.parquet")
    live = table["count"].to_numpy() > 0
    found = table["profile"].to_numpy()
    probs = np.stack(list(table["probs"]))
    assert found[live].tolist() == [k for k in profile_kinds(probs, table["entropy"].to_numpy()) if k]
    assert {kind: part["latents"] for kind, part in summary["profiles"].items()} == {
        kind: int((found == kind).sum()) for kind in KINDS
    }
    assert sum(part["mass_share"] for part in summary["profiles"].values()) == pytest.approx(1)
    pairs = pd.read_parquet(tmp_path / "out" / "redundancy.parquet")
    expected, best = naive(small.weights.W_dec.detach().numpy(), probs, 0.3)
    assert len(pairs) == summary["redundancy"]["parallel_pairs"] == len(expected) > 0
    assert pairs["redundant"].to_numpy().sum() == summary["redundancy"]["redundant_pairs"]
    assert summary["redundancy"]["mmcs"] == pytest.approx(np.mean(list(best.values())), rel=1e-5)
    assert table["nearest_cosine"].to_numpy()[live].mean() == pytest.approx(summary["redundancy"]["mmcs"])

    assert run(small, tmp_path / "out", redundancy=False)["redundancy"] is None
    assert not (tmp_path / "out" / "redundancy.parquet").exists()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["profiles"] == summary["profiles"]
