"""Agreement of top contexts between layers: planted agreement, and chance as permuting the tokens makes it."""

import numpy as np
import pytest

from analysis.latents.contexts import N_CONTEXTS, agreement_summary, context_agreement, contexts_per_layer
from analysis.latents.examples import CodeTile, TopExamples


def top_contexts(dense: np.ndarray, n: int) -> np.ndarray:
    """[M, L, n] from activations [T, L, M], by the code that an analysis uses."""
    n_tokens, n_layers, n_latents = dense.shape
    top = TopExamples.zeros(n_latents, n_layers, n)
    indices = np.broadcast_to(np.arange(n_latents), dense.shape)
    token = np.arange(n_tokens)
    top.add(CodeTile(token, dense.astype(np.float32), indices), document=token)
    return top.token


def naive(dense: np.ndarray, n: int) -> tuple[list[float], dict[int, list[float]]]:
    """Mean overlap of each latent, and all overlaps by distance."""
    _, n_layers, n_latents = dense.shape
    means, by_distance = [], {d: [] for d in range(1, n_layers)}
    for j in range(n_latents):
        found = []
        for low in range(n_layers):
            for high in range(low + 1, n_layers):
                a, b = dense[:, low, j], dense[:, high, j]
                if min((a > 0).sum(), (b > 0).sum()) < n:
                    continue
                best = [set(np.argsort(-x, kind="stable")[:n]) for x in (a, b)]
                found.append(len(best[0] & best[1]) / n)
                by_distance[high - low].append(found[-1])
        means.append(np.mean(found) if found else np.nan)
    return means, by_distance


def test_overlap_is_that_of_the_naive_sets() -> None:
    rng = np.random.default_rng(0)
    dense = rng.random((40, 4, 12)) * (rng.random((40, 4, 12)) > rng.random(12))
    fired = (dense > 0).any(axis=1).sum(axis=0)
    found = context_agreement(top_contexts(dense, 3), fired)
    means, by_distance = naive(dense, 3)
    np.testing.assert_allclose(found.overlap, means)
    np.testing.assert_allclose(found.by_distance, [np.mean(by_distance[d]) for d in (1, 2, 3)])
    defined = ~np.isnan(found.overlap)
    np.testing.assert_allclose(found.chance[defined], 3 / fired[defined])
    assert np.isnan(found.chance[~defined]).all()
    summary = agreement_summary(found)
    assert summary["latents"] == defined.sum()
    assert summary["overlap"] == pytest.approx(np.nanmean(means))
    assert summary["overlap_over_chance"] == pytest.approx(np.nanmean(means) / (3 / fired[defined]).mean())


def test_a_latent_that_says_the_same_at_each_layer_agrees_with_itself() -> None:
    rng = np.random.default_rng(1)
    same = np.repeat(rng.random((30, 1, 2)) + 0.1, 5, axis=1)
    moved = same.copy()
    moved[:, :, 1] = rng.permuted(same[:, :, 1], axis=0)
    size = np.array([1.0, 2.0, 0.5, 3.0, 1.0])[None, :, None]  # a layer's scale is no matter
    np.testing.assert_array_equal(context_agreement(top_contexts(same * size, 4), np.array([30, 30])).overlap, [1, 1])
    assert context_agreement(top_contexts(moved, 4), np.array([30, 30])).overlap[1] < 0.5


def test_chance_is_the_mean_over_permutations() -> None:
    """Permuting, at each layer, the tokens at which a latent fires at all."""
    rng = np.random.default_rng(2)
    dense = rng.random((12, 2, 1))
    overlaps = []
    for _ in range(4000):
        permuted = np.stack([dense[rng.permutation(12), layer] for layer in range(2)], axis=1)
        overlaps.append(context_agreement(top_contexts(permuted, 3), np.array([12])).overlap[0])
    assert np.mean(overlaps) == pytest.approx(3 / 12, abs=4 * np.std(overlaps) / np.sqrt(4000))


def test_nothing_to_compare_is_null() -> None:
    found = context_agreement(np.full((2, 1, 3), -1), np.array([0, 0]))
    assert agreement_summary(found) == {
        "n": 3,
        "latents": 0,
        "overlap": None,
        "chance": None,
        "overlap_over_chance": None,
        "overlap_by_distance": [],
        "chance_by_distance": [],
    }


def test_fewer_are_kept_of_very_many() -> None:
    assert contexts_per_layer(9216, 30) == N_CONTEXTS
    assert contexts_per_layer(2**20, 32) == 2
