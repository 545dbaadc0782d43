"""The sums against the definitions, on random and on planted codes; merging; and arithmetic that must not go wrong."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.latents.table import latent_table
from analysis.moments import WEIGHTINGS, LayerMoments, Weighting, variances
from analysis.reference import mlsae_compat
from tests.support.codes import moments_of, planted, random_codes
from tests.support.dense import decompose, reference_ratios, scatter, spread_of


def parts(moments, weighting: Weighting = "mass"):
    return {name: float(value) for name, value in variances(moments.pooled(), weighting)._asdict().items()}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_tokens=st.integers(1, 12),
    n_layers=st.integers(1, 7),
    n_latents=st.integers(2, 9),
    first_layer=st.integers(0, 20),
    silent=st.sampled_from([0.0, 0.4, 0.9]),
    data=st.data(),
)
def test_variances_equal_their_definitions(seed, n_tokens, n_layers, n_latents, first_layer, silent, data):
    k = data.draw(st.integers(1, n_latents))
    rng = np.random.default_rng(seed)
    values, indices = random_codes(rng, n_tokens, n_layers, k, n_latents, silent)
    values[0, 0, 0] = 1.0
    layers = np.sort(rng.choice(np.arange(first_layer, first_layer + 2 * n_layers), n_layers, replace=False))
    moments = moments_of(values, indices, n_latents, layers)
    for weighting in WEIGHTINGS:
        expected = decompose(scatter(values, indices, n_latents), layers, weighting)
        found = variances(moments.pooled(), weighting)
        for name, value in expected.items():
            np.testing.assert_allclose(
                getattr(found, name), value, rtol=1e-9, atol=1e-11, err_msg=f"{weighting} {name}"
            )
        np.testing.assert_allclose(
            found.within_token + found.between_tokens + found.between_latents, expected["total"], rtol=1e-12, atol=1e-12
        )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), n_tokens=st.integers(1, 10), n_layers=st.integers(2, 6))
def test_compat_equals_the_reference_formula(seed, n_tokens, n_layers):
    values, indices = random_codes(np.random.default_rng(seed), n_tokens, n_layers, 3, 8)
    indices[0, 0] = indices[0, 1]
    values[0, :2, 0] = 1.0  # one latent at two layers of a token, so that no ratio is 0 / 0
    found = mlsae_compat(moments_of(values, indices, 8))
    for name, value in reference_ratios(scatter(values, indices, 8)).items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 40), max_size=6), order=st.randoms())
def test_any_grouping_and_order_of_merges_gives_the_same(seed, cuts, order):
    rng = np.random.default_rng(seed)
    values, indices = random_codes(rng, 40, 5, 4, 11)
    values = values.astype(np.float32)
    group = np.sort(rng.integers(0, 6, 40))
    whole = moments_of(values, indices, 11, group=group)
    edges = sorted({0, 40, *cuts})
    pieces = [moments_of(values[a:b], indices[a:b], 11, group=group[a:b]) for a, b in itertools.pairwise(edges)]
    order.shuffle(pieces)
    while len(pieces) > 1:
        take = order.randint(2, len(pieces))
        pieces = [LayerMoments.merged(pieces[:take]), *pieces[take:]]
    (merged,) = pieces
    np.testing.assert_array_equal(merged.groups, whole.groups)
    np.testing.assert_array_equal(merged.n_tokens, whole.n_tokens)
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_allclose(merged.totals, whole.totals, rtol=1e-12)
    for weighting in WEIGHTINGS:
        np.testing.assert_allclose(
            variances(merged.pooled(), weighting), variances(whole.pooled(), weighting), rtol=1e-12, atol=1e-13
        )


def test_group_sums_are_those_of_the_groups_tokens():
    rng = np.random.default_rng(1)
    values, indices = random_codes(rng, 20, 4, 3, 7)
    group = np.array([5] * 8 + [9] * 12)
    moments = moments_of(values, indices, 7, group=group)
    np.testing.assert_array_equal(moments.groups, [5, 9])
    np.testing.assert_array_equal(moments.n_tokens, [8, 12])
    np.testing.assert_allclose(moments.sums[0], moments_of(values[:8], indices[:8], 7).pooled())
    np.testing.assert_allclose(moments.sums[1], moments_of(values[8:], indices[8:], 7).pooled())


def test_latents_fixed_to_one_layer_have_no_variance_of_their_own():
    profiles = np.zeros((9, 3, 6))
    rng = np.random.default_rng(0)
    for latent, layer in enumerate((0, 2, 5)):
        profiles[:, latent, layer] = rng.gamma(1.0, 1.0, 9)
    found = parts(moments_of(*planted(profiles, 3), 3))
    mass = profiles.sum(axis=(0, 2))
    assert found["within_token"] == 0.0
    assert found["between_tokens"] == pytest.approx(0.0, abs=1e-12)
    assert found["between_latents"] == pytest.approx(spread_of(np.array([0, 2, 5]), mass)[1], rel=1e-12)


def test_a_profile_that_is_the_same_at_every_token_has_nothing_between_tokens():
    shape = np.array([1.0, 2.0, 3.0, 0.0, 5.0])
    profiles = np.random.default_rng(0).gamma(1.0, 1.0, (7, 1, 1)) * shape
    moments = moments_of(*planted(profiles, 1), 1)
    for weighting in WEIGHTINGS:
        found = variances(moments.pooled(), weighting)
        assert found.within_token == pytest.approx(spread_of(np.arange(5), shape)[1], rel=1e-12)
        assert found.between_tokens == pytest.approx(0.0, abs=1e-12)
        assert found.between_latents == pytest.approx(0.0, abs=1e-12)
        assert found.aggregate_over_token == pytest.approx(1.0, rel=1e-12)


def test_a_layer_that_moves_between_tokens_is_all_between_tokens():
    profiles = np.zeros((4, 1, 4))
    profiles[np.arange(4), 0, np.arange(4)] = 2.0
    found = variances(moments_of(*planted(profiles, 1), 1).pooled(), "mass")
    assert found.within_token == 0.0
    assert found.between_tokens == pytest.approx(1.25)  # variance of 0, 1, 2, 3
    assert np.isnan(found.aggregate_over_token)  # a ratio to zero is not a number, and is not called 1 or 0


def test_where_the_true_ratio_is_one_the_references_ratio_is_not():
    # Six layers; at the few tokens where a latent is active, always the same flat profile: aggregate = token-level
    # variance, ratio 1.
    rng = np.random.default_rng(3)
    active = rng.random((2000, 40)) < 0.005
    profiles = active[:, :, None] * np.ones(6)
    moments = moments_of(*planted(profiles, 40), 40)
    assert variances(moments.pooled(), "mass").aggregate_over_token == pytest.approx(1.0, rel=1e-12)
    ratio = mlsae_compat(moments)["rel_var_t"]
    assert ratio is not None
    assert ratio == pytest.approx(
        (35 / 12) / (55 / 6), rel=0.01
    )  # Var(L) / E[L^2] of a flat profile as activity goes to 0


def test_the_references_ratio_depends_on_where_numbering_starts_and_ours_does_not():
    profiles = (np.random.default_rng(3).random((500, 10)) < 0.02)[:, :, None] * np.ones(6)
    from_0, from_9 = (moments_of(*planted(profiles, 10), 10, range(start, start + 6)) for start in (0, 9))
    for weighting in WEIGHTINGS:
        np.testing.assert_allclose(
            variances(from_0.pooled(), weighting), variances(from_9.pooled(), weighting), rtol=1e-12
        )
    low, high = mlsae_compat(from_0)["rel_var_t"], mlsae_compat(from_9)["rel_var_t"]
    assert low is not None
    assert high is not None
    assert high < low / 5


def test_a_single_token_and_latents_that_stay_silent():
    profiles = np.zeros((1, 4, 3))
    profiles[0, 1] = [1.0, 0.0, 1.0]
    profiles[0, 3] = [0.0, 0.0, 4.0]
    moments = moments_of(*planted(profiles, 4), 4)
    found = {w: parts(moments, w) for w in WEIGHTINGS}
    assert found["mass"]["within_token"] == pytest.approx(1 * 2 / 6)  # variance 1, mass 2 of 6
    assert found["equal"]["within_token"] == pytest.approx(1 / 2)
    assert found["latent"]["within_token"] == pytest.approx(1 / 2)
    assert {f["between_tokens"] for f in found.values()} == {0.0}
    assert found["mass"]["between_latents"] == pytest.approx(2 / 6 * 4 / 6 * 1.0)  # means 1 and 2
    table = latent_table(moments)
    assert np.isnan(table.layer_mean[[0, 2]]).all()
    assert np.isnan(table.mean[[0, 2]]).all()
    np.testing.assert_array_equal(table.n_fired, [0, 2, 0, 1])
    np.testing.assert_array_equal(table.probs[0], 0)


def test_nothing_active_gives_zeros_and_no_ratio():
    moments = moments_of(np.zeros((3, 2, 1)), np.zeros((3, 2, 1), np.int64), 2)
    for weighting in WEIGHTINGS:
        found = variances(moments.pooled(), weighting)
        assert (float(found.total), float(found.aggregate)) == (0.0, 0.0)
        assert np.isnan(found.aggregate_over_token)
    assert mlsae_compat(moments)["rel_var_t"] is None


def test_huge_masses_neither_cancel_nor_overflow():
    # Layers 100..131 and masses around 1e8 for 3,000 tokens: E[L^2] - E[L]^2 in float32 would lose all digits.
    rng = np.random.default_rng(0)
    profiles = 1e8 * rng.gamma(2.0, 1.0, (3000, 2, 32)) * (1 + 1e-6 * np.arange(32))
    moments = moments_of(*planted(profiles.astype(np.float32), 2), 2, range(100, 132))
    expected = decompose(np.moveaxis(profiles.astype(np.float32), 1, 2).astype(np.float64), np.arange(100, 132), "mass")
    for name, value in parts(moments).items():
        assert value == pytest.approx(expected[name], rel=1e-9), name


def test_counts_do_not_stop_at_two_to_the_24():
    moments = moments_of(np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.int64), 1)
    moments.counts[:] = 2**24
    moments.totals[:] = 2.0**24
    moments.add(np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.int64))
    assert moments.counts[0, 0] == 2**24 + 1
    assert moments.totals[0, 0] == 2.0**24 + 1


def test_the_latent_table_against_hand_computed_values():
    # One latent, three layers, totals 2, 0, 6 from counts 1, 0, 2.
    values = np.array([[[2.0], [0.0], [4.0]], [[0.0], [0.0], [2.0]]])
    table = latent_table(moments_of(values, np.zeros((2, 3, 1), np.int64), 1))
    assert (table.n_fired[0], table.n_tokens[0], table.total[0], table.n_layers_active[0]) == (3, 2, 8.0, 2)
    assert table.mean[0] == pytest.approx(8 / 3)
    np.testing.assert_allclose(table.probs[0], [0.25, 0, 0.75])
    np.testing.assert_allclose(table.means[0], [2, 0, 3])
    assert table.layer_mean[0] == pytest.approx(1.5)
    assert table.layer_var[0] == pytest.approx(0.75)
    assert table.entropy[0] == pytest.approx(0.25 * 2 + 0.75 * np.log2(4 / 3))
    # token 0 has mass 6, mean 4/3, variance 8/9; token 1 mass 2, mean 2, variance 0
    assert table.within_token[0] == pytest.approx(6 / 8 * 8 / 9)
    assert table.between_tokens[0] == pytest.approx(0.75 - 6 / 8 * 8 / 9)


def test_layer_statistics_follow_from_totals_as_published():
    # The rule behind the published -dists rows: probs = totals / total; layer_mean = sum l probs; layer_var = sum l^2
    # probs - layer_mean^2.
    totals = np.array([[3.0, 1.0, 0.0, 4.0], [0.5, 0.0, 0.0, 0.0]])
    probs = totals / totals.sum(axis=1, keepdims=True)
    table = latent_table(moments_of(totals.T[None], np.tile(np.arange(2), (1, 4, 1)), 2))
    np.testing.assert_allclose(table.probs, probs)
    np.testing.assert_allclose(table.layer_mean, [13 / 8, 0])
    np.testing.assert_allclose(table.layer_var, probs @ np.arange(4) ** 2 - table.layer_mean**2)


@pytest.mark.parametrize(
    ("n_layers", "support", "layer_mean", "layer_var"),
    [(12, (0, 5, 11), 5.220183, 15.743475), (28, (16, 21, 25), 20.94702, 5.922241)],
    ids=["gpt2 x64 k32 latent 0", "Llama-3.2-3B latent 0"],
)
def test_totals_with_the_moments_of_a_published_row_give_its_numbers(n_layers, support, layer_mean, layer_var):
    # The totals of these rows are not at hand, only two numbers made of them. So three layers share a mass such that,
    # with layers numbered from 0 and the variance of a whole population, these two numbers come out; numbered from 1,
    # or divided by n - 1, they would not.
    powers = np.vander(support, increasing=True).T  # rows: 1, l, l^2
    share = np.linalg.solve(powers, [1, layer_mean, layer_var + layer_mean**2])
    assert (share > 0).all()
    values = np.zeros((1, n_layers, 1))
    values[0, list(support), 0] = 40 * share
    table = latent_table(moments_of(values, np.zeros((1, n_layers, 1), np.int64), 1))
    assert table.layer_mean[0] == pytest.approx(layer_mean, rel=1e-12)
    assert table.layer_var[0] == pytest.approx(layer_var, rel=1e-12)
    assert table.total[0] == pytest.approx(40)
