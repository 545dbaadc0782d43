"""Intervals by leaving out document groups: what they are made of, what they hold, and when there are none."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.moments import VARIANCE_NAMES, WEIGHTINGS, LayerMoments, variances
from analysis.quality import LayerQuality, QualityResult
from analysis.uncertainty import (
    MIN_INTERVAL_GROUPS,
    NO_INTERVALS,
    all_intervals,
    jackknife_intervals,
    leave_one_out,
    reconstruction_intervals,
    t_quantile,
    variance_intervals,
    without_each,
)


def grouped_moments(n_groups, seed=0, per_group=6):
    rng = np.random.default_rng(seed)
    n_tokens = n_groups * per_group
    moments = LayerMoments.zeros(range(4), 9, range(n_groups))
    values = rng.gamma(1.0, 1.0, (n_tokens, 4, 2))
    indices = np.argsort(rng.random((n_tokens, 4, 8)), axis=-1)[..., :2]  # latent 8 never fires
    moments.add(values, indices, np.repeat(np.arange(n_groups), per_group))
    return moments


def test_sums_without_each_group():
    x = np.random.default_rng(0).normal(size=(2, 3, MIN_INTERVAL_GROUPS))
    draws = leave_one_out(MIN_INTERVAL_GROUPS)
    np.testing.assert_allclose(without_each(x), x @ draws, rtol=1e-12)
    x = np.full((1, 400), 1e-300)
    x[0, 7] = 1e300
    assert without_each(x)[0, 7] == pytest.approx(399e-300)  # a difference of sums would give 0
    assert without_each(np.array([[5, 7]])).tolist() == [[7.0, 5.0]]


def by_hand(value, replicates):
    """The interval of a positive number, written out from the papers' formulas."""
    n, v, r = len(replicates), np.log(value), np.log(replicates)
    pseudo = n * v - (n - 1) * r  # Tukey's pseudo-values
    centre, error = pseudo.mean(), pseudo.std(ddof=1) / n**0.5
    z = (pseudo - centre) / pseudo.std()
    skewness, kurtosis = (z**3).mean(), (z**4).mean()
    t = t_quantile(min(max(2 * n / (kurtosis - (n - 3) / (n - 1)), 3), n - 1))

    def transform(s):  # Hall's: of the studentised mean, to something nearly normal
        u = s / n**0.5
        return n**0.5 * (u + skewness * u**2 / 3 + skewness**2 * u**3 / 27 + skewness / (6 * n))

    def inverse(target):
        low, high = -100.0, 100.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if transform(middle) < target else (low, middle)
        return low

    ends = (centre - error * max(t, inverse(t)), centre - error * min(-t, inverse(-t)))
    return min(np.exp(ends[0]), value), max(np.exp(ends[1]), value)


def test_an_interval_of_every_number_is_that_of_the_groups_left_out_one_by_one():
    moments = grouped_moments(24)
    found = variance_intervals(moments)
    for weighting in WEIGHTINGS:
        value = variances(moments.pooled(), weighting)
        replicates = [variances(np.delete(moments.sums, g, axis=0).sum(axis=0), weighting) for g in range(24)]
        for name in VARIANCE_NAMES:
            v, interval = float(getattr(value, name)), found[weighting][name]
            assert interval is not None
            np.testing.assert_allclose(interval, by_hand(v, [getattr(r, name) for r in replicates]), rtol=1e-8)
            assert interval.low < v < interval.high


def test_of_a_mean_of_even_numbers_it_is_students_interval():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    x = np.concatenate([x, -x])  # no skewness
    draws = leave_one_out(400)
    interval = jackknife_intervals(np.array([x.mean()]), (draws @ x / 399)[None])[0]
    assert interval is not None
    half = 1.966 * x.std(ddof=1) / 20
    np.testing.assert_allclose(interval, (-half, half), rtol=2e-3)


@pytest.mark.parametrize(("freedom", "t"), [(3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (99, 1.9842)])
def test_quantiles_are_those_of_the_tables(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=0.005)


def test_nine_in_ten_intervals_hold_a_skewed_mean():
    rng = np.random.default_rng(1)
    draws = leave_one_out(MIN_INTERVAL_GROUPS)
    x = rng.lognormal(0, 1, (400, MIN_INTERVAL_GROUPS))  # true mean exp(1/2)
    found = jackknife_intervals(x.mean(axis=1), x @ draws / (MIN_INTERVAL_GROUPS - 1))
    assert np.mean([i is not None and i.low <= np.exp(0.5) <= i.high for i in found]) > 0.9


def test_a_number_that_may_be_negative_has_no_interval_by_its_logarithm():
    """Of a mean of 1.5 standard errors, which is mostly positive."""
    rng = np.random.default_rng(2)
    x = rng.normal(1.5 / np.sqrt(30), 1, (1000, 30))
    replicates = x @ leave_one_out(30) / 29
    held, width = {}, {}
    for signed in (False, True):
        found = [i for i in jackknife_intervals(x.mean(axis=1), replicates, signed=signed) if i is not None]
        held[signed] = np.mean([i.low <= 1.5 / np.sqrt(30) <= i.high for i in found])
        width[signed] = max(i.high - i.low for i in found)
    assert held[False] < 0.92 < 0.94 < held[True] < 0.98
    assert width[True] < 2 < 100 < width[False]


def test_replicates_made_in_small_pieces_are_the_same(monkeypatch):
    moments = grouped_moments(24)
    whole = variance_intervals(moments)
    monkeypatch.setattr("analysis.uncertainty._AT_ONCE_BYTES", 1)
    pieces = variance_intervals(moments)
    for weighting in WEIGHTINGS:
        for name in VARIANCE_NAMES:
            np.testing.assert_allclose(whole[weighting][name], pieces[weighting][name], rtol=1e-9)  # type: ignore[arg-type]


def test_intervals_of_the_reconstruction_are_those_of_groups_left_out():
    rng = np.random.default_rng(1)
    x, x_hat = rng.normal(size=(240, 3, 5)) + np.array([[1], [2], [3]]), rng.normal(size=(240, 3, 5))
    values = rng.gamma(1.0, 1.0, (240, 3, 4)) * (rng.random((240, 3, 4)) > 0.3)
    group, shift = np.repeat(np.arange(24), 10), x.mean(axis=0)
    quality, moments = LayerQuality.zeros(1, 3, 5), LayerMoments.zeros(range(3), 4, range(24))
    indices = np.broadcast_to(np.arange(4), values.shape)
    moments.add(values, indices, group, errors=quality.add(x, x_hat, values, shift, np.ones((1, 240), bool)))
    result = quality.result(0)
    found, by_layer = reconstruction_intervals(moments, result)
    error, deviation = ((x - x_hat) ** 2).sum(-1), ((x - shift) ** 2).sum(-1)
    left = [group != g for g in range(24)]
    fvu = np.array([error[i].sum(0) / deviation[i].sum(0) for i in left])  # [G, L]
    replicates = {
        "fvu": fvu.mean(axis=1),
        "mse": [error[i].mean() / 5 for i in left],
        "l0": [(values[i] > 0).sum(-1).mean() for i in left],
    }
    for name, numbers in replicates.items():
        interval = found[name]
        assert interval is not None
        np.testing.assert_allclose(interval, by_hand(getattr(result, name).mean(), numbers), rtol=1e-7)
    for layer, interval in enumerate(by_layer):
        assert interval is not None
        np.testing.assert_allclose(interval, by_hand(result.fvu[layer], fvu[:, layer]), rtol=1e-7)
    parts = [LayerMoments.zeros(range(3), 4, [g]) for g in range(24)]
    for g, part in enumerate(parts):
        chosen = group == g
        per_token = LayerQuality.zeros(1, 3, 5).add(
            x[chosen], x_hat[chosen], values[chosen], shift, np.ones((1, 10), bool)
        )
        part.add(values[chosen], indices[chosen], group[chosen], errors=per_token)
    np.testing.assert_allclose(LayerMoments.merged(parts).errors, moments.errors, rtol=1e-12)


def test_too_few_groups_give_no_interval():
    found = QualityResult(1, 1, *np.ones((5, 4)))
    assert all_intervals(grouped_moments(MIN_INTERVAL_GROUPS - 1), found) == NO_INTERVALS
    assert all_intervals(grouped_moments(MIN_INTERVAL_GROUPS), found).variance


def test_documents_that_are_all_alike_leave_no_uncertainty():
    one, n = grouped_moments(1), 24
    none = LayerMoments.zeros(range(4), 9, range(n))
    alike = replace(
        none,
        n_tokens=np.repeat(one.n_tokens, n),
        sums=np.repeat(one.sums, n, axis=0),
        counts=one.counts * n,
        totals=one.totals * n,
    )
    for name, interval in variance_intervals(alike)["mass"].items():
        assert interval is not None
        value = getattr(variances(one.pooled(), "mass"), name)
        np.testing.assert_allclose(interval, (value, value), rtol=1e-9)


def test_a_ratio_that_is_not_defined_in_every_replicate_has_no_interval():
    moments = LayerMoments.zeros(range(2), 1, range(24))
    values = np.zeros((24, 2, 1))
    values[:, 0] = 1.0
    values[0, 1] = 1.0  # two layers in one document only: without it there is no token-level variance
    moments.add(values, np.zeros((24, 2, 1), np.int64), np.arange(24))
    found = variance_intervals(moments)["mass"]
    assert found["aggregate_over_token"] is None
    assert found["aggregate"] is not None
