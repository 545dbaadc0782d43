"""FVU and the other numbers of a layer against their definitions, with massive activations and on degenerate input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.quality import LayerQuality
from train.compare.pca import PCASums


def quality_of(x, x_hat, shift, member=None, values=None):
    n_tokens, n_layers, d_model = x.shape
    member = np.ones((1, n_tokens), bool) if member is None else member
    values = np.zeros((n_tokens, n_layers, 1)) if values is None else values
    quality = LayerQuality.zeros(len(member), n_layers, d_model)
    quality.add(x, x_hat, values, shift.astype(x.dtype), member)
    return quality


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 20), shifted=st.floats(-3, 3))
def test_numbers_equal_their_definitions_whatever_shift_and_grouping(seed, cut, shifted):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20, 3, 5)) + rng.normal(size=(3, 5)) * 10
    x_hat = x + rng.normal(size=x.shape)
    values = np.maximum(rng.normal(size=(20, 3, 4)), 0)
    shift = x.mean(axis=0) + shifted
    member = np.stack([np.ones(20, bool), rng.random(20) < 0.5])
    member[1, :2] = True
    parts = [
        quality_of(x[rows], x_hat[rows], shift, member[:, rows], values[rows])
        for rows in (slice(cut), slice(cut, None))
        if len(x[rows])
    ]
    quality = LayerQuality.merged(parts)
    for subset, rows in enumerate(member):
        found = quality.result(subset)
        ours, theirs = x[rows], x_hat[rows]
        error = ((ours - theirs) ** 2).sum(axis=(0, 2))
        np.testing.assert_allclose(found.fvu, error / ((ours - ours.mean(axis=0)) ** 2).sum(axis=(0, 2)), rtol=1e-9)
        np.testing.assert_allclose(found.mse, error / ours[:, 0].size, rtol=1e-9)
        np.testing.assert_allclose(found.l0, (values[rows] > 0).sum(axis=-1).mean(axis=0))
        np.testing.assert_allclose(found.mean_norm, np.linalg.norm(ours, axis=-1).mean(axis=0), rtol=1e-9)
        unit = (ours - shift) / np.linalg.norm(ours - shift, axis=-1, keepdims=True)
        cosine = (unit[:, :-1] * unit[:, 1:]).sum(axis=-1).mean(axis=0)
        np.testing.assert_allclose(found.cosine_to_next, [*cosine, np.nan], rtol=1e-9, atol=1e-12)


def test_fvu_is_against_the_mean_of_each_dimension_not_against_one_scalar_mean():
    # Dimension 0 is 100 with a spread of 1, dimension 1 is 0 with a spread of 1; a scalar mean of 50 would make the
    # denominator about 5,000 times too large.
    x = np.array([[[101.0, 1.0]], [[99.0, -1.0]]])
    x_hat = np.array([[[100.0, 0.0]], [[100.0, 0.0]]])
    assert quality_of(x, x_hat, x.mean(axis=0)).result(0).fvu[0] == pytest.approx(1.0, rel=1e-12)


def test_massive_activations_lose_no_digits_in_float32():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2, 16))
    x[:, 0, 3] += 23_400.0
    x = x.astype(np.float32)
    x_hat = (x + 0.5 * rng.normal(size=x.shape)).astype(np.float32)
    exact, found = x.astype(np.float64), quality_of(x, x_hat, x.mean(axis=0, dtype=np.float64))
    expected = ((exact - x_hat) ** 2).sum(axis=(0, 2)) / ((exact - exact.mean(axis=0)) ** 2).sum(axis=(0, 2))
    np.testing.assert_allclose(found.result(0).fvu, expected, rtol=1e-5)


def test_what_is_not_defined_is_nan_and_not_a_number():
    x = np.ones((1, 2, 3))
    found = quality_of(x, x, x.mean(axis=0)).result(0)  # one token: no spread about its own mean
    assert np.isnan(found.fvu).all()
    assert np.isnan(found.cosine_to_next).all()
    np.testing.assert_allclose(found.mean_norm, 3**0.5)
    equal = np.full((50, 2, 3), 0.1) * np.arange(1, 7).reshape(2, 3)  # whose sums of squares leave rounding
    assert np.isnan(quality_of(equal, equal * 1.5, np.full((2, 3), 0.7)).result(0).fvu).all()
    empty = LayerQuality.zeros(1, 2, 3).result(0)
    assert np.isnan([*empty.fvu, *empty.mse, *empty.l0, *empty.mean_norm]).all()


def test_pca_equals_the_singular_vectors_of_the_centred_rows():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 6)) * np.arange(1, 7) + 3
    sums = PCASums.zeros(6)
    for part in (rows[:20], rows[20:]):
        for some in (part[::2], part[1::2], part[:0]):
            sums.add(torch.from_numpy(some))
    mean, found = (tensor.numpy() for tensor in sums.fit(2))
    _, _, directions = np.linalg.svd(rows - rows.mean(axis=0))
    np.testing.assert_allclose(mean, rows.mean(axis=0))
    np.testing.assert_allclose(found.T @ found, directions[:2].T @ directions[:2], atol=1e-12)
    assert sums.fit(40).directions.shape == (6, 6)
