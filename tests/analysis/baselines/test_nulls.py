"""Null models: permutations that are what they say, planted codes whose null is known, ratios, and independence of
grouping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.baselines.nulls import NULLS, permute_layers, permute_tokens
from analysis.moments import WEIGHTINGS, LayerMoments, variances
from analysis.persistence import persistence_numbers
from tests.support.codes import planted, random_codes
from tests.support.small import make_small
from tests.support.small import run_small as run


def null_of(values, indices, n_latents, name, seed=0, chunk=64):
    n_tokens, n_layers, _ = values.shape
    moments = LayerMoments.zeros(range(n_layers), n_latents)
    moments.add(values, indices, rows=NULLS[name](seed, np.arange(n_tokens), n_layers, chunk))
    return moments


def mean_of(moments: LayerMoments, name: str) -> float:
    sums = moments.histograms.sum(axis=0), moments.run_sums.sum(axis=0)
    found = persistence_numbers(*sums, moments.layers, "equal")
    return float(getattr(found, name))


@given(seed=st.integers(0, 2**63), first=st.integers(0, 10**9), n=st.integers(1, 20), n_layers=st.integers(1, 9))
def test_layers_are_permuted_within_the_token(seed, first, n, n_layers):
    rows = permute_layers(seed, first + np.arange(n), n_layers, 8)
    own = np.arange(n * n_layers).reshape(n, n_layers)
    np.testing.assert_array_equal(np.sort(rows, axis=1), own)


@given(seed=st.integers(0, 2**63), first=st.integers(0, 10**6), n=st.integers(1, 40), n_layers=st.integers(1, 9))
def test_tokens_are_permuted_within_layer_and_chunk_and_none_stays(seed, first, n, n_layers):
    token = first + np.cumsum(np.random.default_rng(n).integers(1, 3, n))  # some tokens are left out
    rows = permute_tokens(seed, token, n_layers, 8)
    source, layer = np.divmod(rows, n_layers)
    np.testing.assert_array_equal(layer, np.broadcast_to(np.arange(n_layers), layer.shape))
    np.testing.assert_array_equal(token[source] // 8, np.broadcast_to((token // 8)[:, None], source.shape))
    np.testing.assert_array_equal(np.sort(source, axis=0), np.broadcast_to(np.arange(n)[:, None], source.shape))
    alone = np.bincount(token // 8)[token // 8] == 1
    assert ((source != np.arange(n)[:, None]) | alone[:, None]).all()


def test_permutations_depend_on_the_tokens_place_alone():
    token = np.arange(64, 128)
    for permute in NULLS.values():
        whole = permute(3, token, 5, 16)
        parts = [permute(3, token[a : a + 16], 5, 16) + a * 5 for a in range(0, 64, 16)]
        np.testing.assert_array_equal(whole, np.concatenate(parts))
        assert (permute(4, token, 5, 16) != whole).any()


def test_permutations_are_even():
    rows = permute_layers(0, np.arange(20_000), 6, 64) % 6
    counts = np.stack([np.bincount(rows[:, i], minlength=6) for i in range(6)])
    assert ((counts - 20_000 / 6) ** 2 / (20_000 / 6)).sum() < 60  # chi squared with 25 degrees of freedom


def test_a_latent_that_is_on_everywhere_is_the_same_with_its_layers_permuted():
    profiles = np.random.default_rng(0).gamma(1.0, 1.0, (50, 1, 1)) * np.ones(6)
    values, indices = planted(profiles, 1)
    null = null_of(values, indices, 1, "layers_permuted")
    for weighting in WEIGHTINGS:
        assert variances(null.pooled(), weighting).within_token == pytest.approx(35 / 12, rel=1e-12)
    assert mean_of(null, "run_length") == 6


def test_permuted_layers_give_the_variance_of_a_random_subset():
    # A run of 4 of 16 layers: within a token its variance is 15 / 12; of 4 layers drawn at random it is (4 - 1) / 4
    # times the unbiased variance of 16 layers, 16 * 17 / 12.
    profiles = np.zeros((4000, 1, 16))
    profiles[:, 0, 5:9] = 1.0
    values, indices = planted(profiles, 1)
    null = null_of(values, indices, 1, "layers_permuted")
    assert variances(null.pooled(), "mass").within_token == pytest.approx(3 / 4 * 16 * 17 / 12, rel=0.02)
    # Of a layer's 15 others 3 are active, so the next one is with chance 3 / 15.
    assert mean_of(null, "stays_on") == pytest.approx(0.2, rel=0.05)
    assert mean_of(null, "n_layers_active") == 4


def test_permuted_tokens_keep_each_latents_profile_and_end_what_a_token_ties_together():
    # At each of 512 tokens one of 8 latents is on at all of 6 layers.
    rng = np.random.default_rng(1)
    profiles = np.zeros((512, 8, 6))
    profiles[np.arange(512), rng.integers(0, 8, 512)] = rng.gamma(1.0, 1.0, (512, 1))
    values, indices = planted(profiles, 8)
    null = null_of(values, indices, 8, "tokens_permuted")
    observed = LayerMoments.zeros(range(6), 8)
    observed.add(values, indices)
    was, now = variances(observed.pooled(), "mass"), variances(null.pooled(), "mass")
    assert now.aggregate == pytest.approx(float(was.aggregate), rel=1e-12)
    assert now.between_latents == pytest.approx(float(was.between_latents), abs=1e-12)
    assert was.aggregate_over_token == pytest.approx(1.0)
    assert now.aggregate_over_token > 2
    np.testing.assert_allclose(null.totals, observed.totals, rtol=1e-12)
    assert mean_of(observed, "stays_on") == 1
    assert mean_of(null, "stays_on") == pytest.approx(1 / 8, abs=0.03)


def test_random_codes_are_their_own_null():
    values, indices = random_codes(np.random.default_rng(5), 3000, 6, 3, 12)
    observed = LayerMoments.zeros(range(6), 12)
    observed.add(values, indices)
    for name in NULLS:
        null = null_of(values, indices, 12, name)
        for weighting in WEIGHTINGS:
            ratio = (
                variances(observed.pooled(), weighting).within_token / variances(null.pooled(), weighting).within_token
            )
            assert ratio == pytest.approx(1, abs=0.03)
        assert mean_of(observed, "contiguity") / mean_of(null, "contiguity") == pytest.approx(1, abs=0.03)


def test_the_summary_holds_ratios_that_no_grouping_of_shards_changes(tmp_path, monkeypatch):
    summary = run(make_small(tmp_path / "a"), tmp_path / "out_a")
    nulls = summary["nulls"]
    assert nulls["chunk_tokens"] == 16
    for name in NULLS:
        for part, weightings in (("variance", WEIGHTINGS), ("persistence", ("mass", "equal"))):
            for weighting in weightings:
                observed, null = summary[part][weighting], nulls[name][part][weighting]
                ratio = nulls[name]["ratio"][part][weighting]
                for key, value in null.items():
                    assert ratio[key] == pytest.approx(observed[key] / value) if value else ratio[key] is None
                    bounds = observed["ci95"][key]
                    if value and bounds:
                        np.testing.assert_allclose(ratio["ci95"][key], [bound / value for bound in bounds])
    mass = nulls["tokens_permuted"]["variance"]["mass"]
    assert mass["aggregate"] == pytest.approx(summary["variance"]["mass"]["aggregate"], rel=1e-9)

    monkeypatch.setattr("analysis.jobs.TASKS", 2)
    other = run(make_small(tmp_path / "b", shard_tokens=16), tmp_path / "out_b")["nulls"]
    for name in NULLS:
        for part in ("variance", "persistence"):
            for weighting, numbers in nulls[name][part].items():
                for key, value in numbers.items():
                    assert other[name][part][weighting][key] == pytest.approx(value, rel=1e-12), (name, weighting, key)
    assert (
        run(make_small(tmp_path / "c"), tmp_path / "out_c", seed=1)["nulls"]["layers_permuted"]
        != nulls["layers_permuted"]
    )
    assert run(make_small(tmp_path / "d"), tmp_path / "out_d", nulls=False)["nulls"] is None
