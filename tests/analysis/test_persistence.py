"""When latents switch on and off: planted runs, and every number against a definition on dense arrays."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.latents.table import latent_table
from analysis.moments import LayerMoments
from analysis.persistence import DISTRIBUTIONS, PAIR_WEIGHTINGS, PairWeighting, distributions, persistence_numbers
from analysis.uncertainty import jackknife_intervals, persistence_intervals
from tests.support.codes import moments_of, planted, random_codes
from tests.support.dense import scatter


def pair_numbers(activations: np.ndarray) -> dict[str, float]:
    """The numbers of one pair from its activations [L], by walking along the layers."""
    on = np.flatnonzero(activations)
    runs = np.split(on, np.flatnonzero(np.diff(on) > 1) + 1)
    longest = max(len(run) for run in runs)
    return {
        "n_layers_active": len(on),
        "onset": on[0],
        "offset": on[-1],
        "run_length": longest,
        "n_runs": len(runs),
        "contiguity": longest / (on[-1] - on[0] + 1),
        "unbroken": float(len(runs) == 1),
        "single_layer": float(len(on) == 1),
    }


def naive(dense: np.ndarray, layers: np.ndarray, weighting: PairWeighting) -> dict[str, float]:
    """Means over the pairs of dense activations [T, L, M]."""
    pairs = [row for token in dense for row in token.T if row.any()]
    found = [pair_numbers(row) for row in pairs]
    weight = np.array([row.sum() if weighting == "mass" else 1.0 for row in pairs])
    column = {name: np.array([pair[name] for pair in found], float) for name in found[0]}
    result = {name: float(np.average(values, weights=weight)) for name, values in column.items()}
    for name in ("onset", "offset"):
        result[name] = float(np.average(layers[column[name].astype(int)], weights=weight))
    multi = column["n_layers_active"] > 1
    for name in ("contiguity", "unbroken"):
        result[f"{name}_multi"] = (
            float(np.average(column[name][multi], weights=weight[multi])) if multi.any() else np.nan
        )
    chances = np.array([np.count_nonzero(row[:-1]) for row in pairs]) @ weight
    stays = np.array([np.count_nonzero(row[:-1] * row[1:]) for row in pairs]) @ weight
    return result | {"stays_on": float(stays / chances) if chances else np.nan}


def numbers(moments: LayerMoments, weighting: PairWeighting = "equal") -> dict[str, Any]:
    sums = moments.histograms.sum(axis=0), moments.run_sums.sum(axis=0)
    found = persistence_numbers(*sums, moments.layers, weighting)
    return {name: float(value) for name, value in found._asdict().items()}


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_tokens=st.integers(1, 8),
    n_layers=st.integers(1, 8),
    n_latents=st.integers(2, 8),
    silent=st.sampled_from([0.0, 0.4, 0.9]),
    data=st.data(),
)
def test_every_number_equals_its_definition(seed, n_tokens, n_layers, n_latents, silent, data):
    rng = np.random.default_rng(seed)
    values, indices = random_codes(rng, n_tokens, n_layers, data.draw(st.integers(1, n_latents)), n_latents, silent)
    values[0, 0, 0] = 1.0
    layers = np.sort(rng.choice(np.arange(3, 3 + 2 * n_layers), n_layers, replace=False))
    moments = moments_of(values, indices, n_latents, layers)
    dense = scatter(values, indices, n_latents)
    for weighting in PAIR_WEIGHTINGS:
        found = numbers(moments, weighting)
        for name, value in naive(dense, layers, weighting).items():
            np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12, err_msg=f"{weighting} {name}")
        for name, shares in distributions(moments)[weighting].items():
            assert sum(shares) == pytest.approx(1), name
    table = latent_table(moments).persistence
    for j in range(n_latents):
        own = dense[:, :, [j]]
        for name, column in table._asdict().items():
            if own.any():
                expected = naive(own, layers, "equal")["n_layers_active" if name == "layers_per_token" else name]
                assert column[j] == pytest.approx(expected, rel=1e-10)
            else:
                assert np.isnan(column[j])


def test_planted_runs_are_found_exactly():
    # Of ten layers: on at 2 and off after 6, at every token; on, off and on again; and one layer only.
    profiles = np.zeros((5, 3, 10))
    profiles[:, 0, 2:7] = 2.0
    profiles[:, 1, [0, 1, 2, 8]] = 1.0
    profiles[:, 2, 9] = 3.0
    moments = moments_of(*planted(profiles, 3), 3)
    found = numbers(moments)
    assert found == pytest.approx(
        {
            "n_layers_active": 10 / 3,
            "onset": 11 / 3,
            "offset": 23 / 3,
            "run_length": 3,
            "n_runs": 4 / 3,
            "contiguity": (1 + 3 / 9 + 1) / 3,
            "unbroken": 2 / 3,
            "single_layer": 1 / 3,
            "contiguity_multi": (1 + 3 / 9) / 2,
            "unbroken_multi": 1 / 2,
            "stays_on": (4 + 2 + 0) / (5 + 4 + 0),
        }
    )
    by_mass = numbers(moments, "mass")  # masses 10, 4 and 3
    assert by_mass["run_length"] == pytest.approx((10 * 5 + 4 * 3 + 3 * 1) / 17)
    assert by_mass["unbroken_multi"] == pytest.approx(10 / 14)
    np.testing.assert_allclose(latent_table(moments).persistence.run_length, [5, 3, 1])
    np.testing.assert_allclose(latent_table(moments).persistence.contiguity, [1, 1 / 3, 1])


def test_only_single_layers_leave_nothing_to_say_of_the_others():
    profiles = np.zeros((4, 2, 3))
    profiles[:, 0, 1], profiles[:, 1, 2] = [1.0, 0.1, 0.7, 3.3], 0.3
    found = numbers(moments_of(*planted(profiles, 2), 2), "mass")
    assert (found["single_layer"], found["contiguity"], found["n_runs"]) == (1, 1, 1)
    assert np.isnan(found["contiguity_multi"])
    assert found["stays_on"] == 0
    silent = numbers(moments_of(np.zeros((3, 2, 1)), np.zeros((3, 2, 1), np.int64), 2))
    assert all(np.isnan(value) for value in silent.values())


def test_groups_add_up_and_merge_in_any_grouping():
    rng = np.random.default_rng(4)
    values, indices = random_codes(rng, 30, 6, 4, 9)
    group = np.sort(rng.integers(0, 5, 30))
    whole = moments_of(values, indices, 9, group=group)
    parts = [moments_of(values[a:b], indices[a:b], 9, group=group[a:b]) for a, b in ((0, 11), (11, 12), (12, 30))]
    merged = LayerMoments.merged([LayerMoments.merged(parts[:2]), parts[2]])
    for name in ("histograms", "run_sums", "latent_sums"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-12)
    own = moments_of(values[group == 2], indices[group == 2], 9)
    np.testing.assert_allclose(whole.histograms[2], own.histograms[0], rtol=1e-12)


def test_intervals_come_from_leaving_out_groups_and_hold_the_value():
    rng = np.random.default_rng(4)
    values, indices = random_codes(rng, 240, 6, 4, 9)
    group = np.repeat(np.arange(24), 10)
    moments = moments_of(values, indices, 9, group=group)
    found = persistence_intervals(moments)
    for weighting in PAIR_WEIGHTINGS:
        value = numbers(moments, weighting)
        others = [numbers(moments_of(values[group != g], indices[group != g], 9), weighting) for g in range(24)]
        for name, interval in found[weighting].items():
            assert interval is not None
            replicates = np.array([[other[name] for other in others]])
            expected = jackknife_intervals(np.array([value[name]]), replicates)[0]
            assert interval == pytest.approx(expected, rel=1e-9)
            assert interval.low <= value[name] <= interval.high
    assert len(DISTRIBUTIONS) == moments.histograms.shape[2]
