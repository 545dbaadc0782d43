"""Intervals by the bootstrap over document groups: what they are made of, and when there are none."""

import numpy as np

from analysis.moments import VARIANCE_NAMES, WEIGHTINGS, LayerMoments, variances
from analysis.persistence import Persistence
from analysis.quality import GroupQuality, LayerQuality
from analysis.uncertainty import MIN_INTERVAL_GROUPS, bootstrap, bootstrap_reconstruction, draw_groups


def grouped_moments(n_groups, seed=0, per_group=6):
    rng = np.random.default_rng(seed)
    n_tokens = n_groups * per_group
    moments = LayerMoments.zeros(range(4), 9, range(n_groups))
    values = rng.gamma(1.0, 1.0, (n_tokens, 4, 2))
    indices = np.argsort(rng.random((n_tokens, 4, 8)), axis=-1)[..., :2]  # latent 8 never fires
    moments.add(values, indices, np.repeat(np.arange(n_groups), per_group))
    return moments


def test_an_interval_is_the_basic_one_of_replicates_drawn_by_group_and_holds_the_value():
    moments = grouped_moments(12)
    found = bootstrap(moments, 40, seed=3)
    draws = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), 40)
    for weighting in WEIGHTINGS:
        value = variances(moments.pooled(), weighting)
        replicates = [variances(np.einsum("g,gsm->sm", draw, moments.sums), weighting) for draw in draws]
        for name in VARIANCE_NAMES:
            low, high = np.percentile([getattr(r, name) for r in replicates], [2.5, 97.5])
            v, interval = getattr(value, name), found[weighting][name]
            assert interval is not None
            np.testing.assert_allclose(interval, (min(2 * v - high, v), max(2 * v - low, v)), rtol=1e-10)


def test_replicates_made_in_small_pieces_are_the_same(monkeypatch):
    moments = grouped_moments(12)
    whole = bootstrap(moments, 30, seed=0)
    monkeypatch.setattr("analysis.uncertainty._REPLICATES_AT_ONCE_BYTES", 1)
    pieces = bootstrap(moments, 30, seed=0)
    for weighting in WEIGHTINGS:
        for name in VARIANCE_NAMES:
            np.testing.assert_allclose(whole[weighting][name], pieces[weighting][name], rtol=1e-10)  # type: ignore[arg-type]


def test_intervals_of_the_reconstruction_are_those_of_documents_drawn_again():
    rng = np.random.default_rng(1)
    x, x_hat = rng.normal(size=(120, 3, 5)) + np.array([[1], [2], [3]]), rng.normal(size=(120, 3, 5))
    values = rng.gamma(1.0, 1.0, (120, 3, 4)) * (rng.random((120, 3, 4)) > 0.3)
    group, shift = np.repeat(np.arange(12), 10), x.mean(axis=0)
    quality, by_group = LayerQuality.zeros(1, 3, 5), GroupQuality.zeros(3, range(12))
    by_group.add(quality.add(x, x_hat, values, shift, np.ones((1, 120), bool)), group)
    result = quality.result(0)
    found = bootstrap_reconstruction(by_group, result, 5, 50, seed=4)
    assert found is not None
    draws = draw_groups(12, 50, seed=4)
    assert draws is not None
    drawn = [np.repeat(np.arange(120), np.repeat(draw.astype(int), 10)) for draw in draws]
    error, deviation = ((x - x_hat) ** 2).sum(-1), ((x - shift) ** 2).sum(-1)
    replicates = {
        "fvu": [(error[i].sum(0) / deviation[i].sum(0)).mean() for i in drawn],
        "mse": [error[i].mean() / 5 for i in drawn],
        "l0": [(values[i] > 0).sum(-1).mean() for i in drawn],
    }
    for name, numbers in replicates.items():
        value, (low, high) = getattr(result, name).mean(), np.percentile(numbers, [2.5, 97.5])
        expected = (min(2 * value - high, value), max(2 * value - low, value))
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-9)
    for layer, interval in enumerate(found.fvu_by_layer):
        low, high = np.percentile([error[i, layer].sum() / deviation[i, layer].sum() for i in drawn], [2.5, 97.5])
        v = result.fvu[layer]
        np.testing.assert_allclose(interval, (min(2 * v - high, v), max(2 * v - low, v)), rtol=1e-9)  # type: ignore[arg-type]
    halves = [GroupQuality.zeros(3, [g]) for g in range(12)]
    for g, part in enumerate(halves):
        chosen = group == g
        per_token = LayerQuality.zeros(1, 3, 5).add(
            x[chosen], x_hat[chosen], values[chosen], shift, np.ones((1, 10), bool)
        )
        part.add(per_token, group[chosen])
    np.testing.assert_allclose(GroupQuality.merged(halves).sums, by_group.sums, rtol=1e-12)
    assert bootstrap_reconstruction(by_group, result, 5, 0, seed=4) is None


def test_too_few_groups_or_no_replicates_give_no_interval():
    assert bootstrap(grouped_moments(MIN_INTERVAL_GROUPS - 1), 100, seed=0) == {}
    assert bootstrap(grouped_moments(MIN_INTERVAL_GROUPS), 0, seed=0) == {}
    assert bootstrap(grouped_moments(MIN_INTERVAL_GROUPS), 10, seed=0)


def test_documents_that_are_all_alike_leave_no_uncertainty():
    one = grouped_moments(1)
    sums = np.repeat(one.sums, 10, axis=0)
    alike = LayerMoments(
        layers=one.layers,
        groups=np.arange(10),
        n_tokens=np.repeat(one.n_tokens, 10),
        sums=sums,
        counts=one.counts * 10,
        totals=one.totals * 10,
        persistence=Persistence.zeros(4, 9, 10),
    )
    for name, interval in bootstrap(alike, 20, seed=0)["mass"].items():
        assert interval is not None
        value = getattr(variances(one.pooled(), "mass"), name)
        np.testing.assert_allclose(interval, (value, value), rtol=1e-9)


def test_a_ratio_that_is_not_defined_in_every_replicate_has_no_interval():
    moments = LayerMoments.zeros(range(2), 1, range(10))
    values = np.zeros((10, 2, 1))
    values[:, 0] = 1.0
    values[0, 1] = 1.0  # two layers in one document only: some replicates have no token-level variance
    moments.add(values, np.zeros((10, 2, 1), np.int64), np.arange(10))
    found = bootstrap(moments, 50, seed=0)["mass"]
    assert found["aggregate_over_token"] is None
    assert found["aggregate"] is not None
