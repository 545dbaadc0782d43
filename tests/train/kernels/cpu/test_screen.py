"""The 8-bit screen finds the very latents that a float64 product ranks highest, outliers or not."""

import numpy as np
import pytest
import torch

from tests.support.codes import exact_draws
from train.hardware import has_byte_products
from train.kernels.cpu.backend import NUMBA
from train.kernels.cpu.screen import Screen
from train.kernels.encode import BatchCodes, ReadyEncoder
from train.kernels.interface import SparseCodes

pytestmark = pytest.mark.skipif(
    not has_byte_products(), reason="this processor has no fast products of bytes (AVX512-VNNI)"
)


def planted(n, d, m, seed, outlier=0.0):
    """Vectors [N, D] that are sums of a few encoder rows and noise, and the rows [M, D], of various norms."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(m, d)) * rng.uniform(0.2, 3, (m, 1)) / d**0.5
    rows[:, 3] += outlier * rng.normal(size=m) / d**0.5
    x = rng.normal(size=(n, d)) + np.einsum("nki,nk->ni", rows[rng.integers(0, m, (n, 4))], rng.gamma(2, 2, (n, 4)))
    x[:, 3] += outlier
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(rows.astype(np.float32))


def encode(x, rows, k, b_enc=None, product_dtype=torch.float32) -> SparseCodes:
    return ReadyEncoder(NUMBA, rows, b_enc, product_dtype=product_dtype).topk(x, k)


def encode_batch(x, rows, count) -> BatchCodes:
    return ReadyEncoder(NUMBA, rows, product_dtype=torch.int8).batch(x, count)


@pytest.mark.parametrize(
    ("n", "d", "m", "k", "outlier"),
    [
        (300, 64, 2048, 8, 0.0),
        (300, 64, 2050, 8, 30.0),
        (200, 48, 2200, 16, 0.0),
        (1, 16, 130, 1, 0.0),
        (40, 576, 5000, 32, 100.0),
        (700, 80, 4096, 3, 5.0),
    ],
)
def test_the_codes_are_those_of_the_exact_product(n, d, m, k, outlier):
    x, rows = planted(n, d, m, n + d, outlier)
    assert Screen.fits(rows, k)
    values, indices = Screen(rows).topk_relu(x, k)
    exact = x.double() @ rows.double().T
    best = exact.topk(k).values.relu()
    np.testing.assert_allclose(values.numpy(), best.numpy(), rtol=2e-5, atol=2e-5 * float(best.max()))
    # What was taken is what the exact product says of these latents, each of them once.
    np.testing.assert_allclose(
        values.numpy(), exact.gather(1, indices).relu().numpy(), rtol=2e-5, atol=2e-5 * float(best.max())
    )
    assert all(len(set(row)) == k for row in indices.tolist())


def test_where_no_two_are_near_each_other_it_is_the_plain_path_latent_by_latent():
    x, rows = planted(400, 64, 2048, 1)
    screened, plain = Screen(rows).topk_relu(x, 8), encode(x, rows, 8)
    same = screened.indices == plain.indices
    assert same.float().mean() > 0.999
    np.testing.assert_allclose(screened.values[same].numpy(), plain.values[same].numpy(), rtol=1e-4, atol=1e-5)


def test_equal_values_come_by_ascending_latent_and_a_vector_of_zeros_has_none():
    rows = torch.ones(256, 32)
    values, indices = Screen(rows).topk_relu(torch.stack([torch.ones(32), torch.zeros(32), -torch.ones(32)]), 2)
    assert indices.tolist() == [[0, 1]] * 3
    assert values.tolist() == [[32, 32], [0, 0], [0, 0]]


def test_vectors_of_zeros_take_no_longer_than_others():
    rows = torch.randn(30_000, 32, generator=torch.Generator().manual_seed(0))
    screen = Screen(rows)
    screen.topk_relu(torch.zeros(1, 32), 4)  # compiles
    values, indices = screen.topk_relu(
        torch.zeros(1500, 32), 4
    )  # ranking 30,000 equal products so often takes longer than a test may
    assert indices.tolist() == [[0, 1, 2, 3]] * 1500
    assert not values.any()


@pytest.mark.parametrize("what", ["estimates are further off than they say", "a first bound is too high"])
def test_what_the_screen_cannot_be_sure_of_is_multiplied_out(what, monkeypatch):
    """Each of these goes wrong if the check that is meant for it is left out."""
    x, rows = planted(2000, 16, 2048, 4)
    expected, screen = Screen(rows).topk_relu(x, 8), Screen(rows)
    if what.startswith("estimates"):  # a factor of each latent's own, so that their order is another
        screen._scale *= torch.rand(len(screen._scale), generator=torch.Generator().manual_seed(0)) + 0.5
    else:  # the largest of the first 512 latents, which 4 in the mean exceed and not always 8
        monkeypatch.setattr(screen, "_ranks", lambda k: (np.arange(64) == 15).astype(np.int32))
    found = screen.topk_relu(x, 8)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize(("d", "m", "k", "outlier"), [(64, 2048, 8, 0.0), (576, 5000, 32, 100.0), (80, 4096, 3, 5.0)])
def test_next_to_none_of_ordinary_vectors_are_multiplied_out(d, m, k, outlier, monkeypatch):
    """Or else the screen would be right, and slower than what it replaces."""
    x, rows = planted(1000, d, m, 1, outlier)
    screen, left_out = Screen(rows), []
    make_all = screen._from_all_products
    monkeypatch.setattr(screen, "_from_all_products", lambda x, k: left_out.append(len(x)) or make_all(x, k))
    screen.topk_relu(x, k)
    assert sum(left_out) <= 2


def test_more_equal_latents_than_there_is_room_for_come_by_ascending_latent():
    rows = planted(1, 64, 5000, 5)[1] * 0.01
    rows[::2] = planted(1, 64, 1, 6)[1]
    values, indices = Screen(rows).topk_relu(rows[:4:2], 16)
    assert indices.tolist() == [list(range(0, 32, 2))] * 2
    assert len(values.unique()) == 1


def test_values_below_zero_are_none_and_the_nearest_to_zero():
    x, rows = (exact_draws(n, 64, generator=torch.Generator().manual_seed(n)).abs() for n in (60, 2048))
    values, indices = Screen(-rows).topk_relu(x + 1, 8)
    assert not values.any()
    assert torch.equal(indices, ((x + 1) @ rows.T).sort(stable=True).indices[:, :8])


def test_all_latents_may_be_asked_for():
    x, rows = planted(20, 32, 256, 7)
    values, indices = Screen(rows).topk_relu(x, 256)
    exact = (x.double() @ rows.double().T).topk(256).values.relu()
    np.testing.assert_allclose(values.numpy(), exact.numpy(), rtol=2e-5, atol=1e-5)
    assert torch.equal(indices.sort().values, torch.arange(256).expand(20, -1))


def test_a_vector_has_the_same_bits_whatever_stands_beside_it():
    x, rows = planted(100, 64, 2048, 8)
    x[20:30] = 0
    screen = Screen(rows)
    together = screen.topk_relu(x, 8)
    for part in (slice(0, 1), slice(3, 60), slice(25, 26), slice(99, 100)):
        alone = screen.topk_relu(x[part], 8)
        assert torch.equal(alone.values, together.values[part])
        assert torch.equal(alone.indices, together.indices[part])


def test_the_same_bits_whatever_the_number_of_threads():
    x, rows = planted(100, 64, 2048, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Screen(rows).topk_relu(x, 8)
        torch.set_num_threads(3)
        three = Screen(rows).topk_relu(x, 8)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.values, three.values)
    assert torch.equal(one.indices, three.indices)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_vector_without_a_finite_norm_is_as_in_the_plain_product_and_no_other_minds(bad):
    x, rows = planted(20, 64, 2048, 3)
    screen = Screen(rows)
    expected = screen.topk_relu(x, 8)
    x[7, 5] = bad
    found, plain = screen.topk_relu(x, 8), encode(x[7:8], rows, 8)
    assert torch.equal(found.indices[7:8], plain.indices)
    torch.testing.assert_close(found.values[7:8], plain.values, equal_nan=True)
    others = torch.arange(20) != 7
    assert torch.equal(found.values[others], expected.values[others])
    assert torch.equal(found.indices[others], expected.indices[others])


@pytest.mark.parametrize(
    "rows",
    [torch.ones(64, 32), torch.ones(4096, 10), torch.ones(4096, 32).double()],
)
def test_what_it_is_not_made_for_is_said(rows):
    assert not Screen.fits(rows, 8)


def test_a_product_in_8_bits_is_the_screen_where_it_applies_and_the_fastest_product_elsewhere():
    x, rows = planted(50, 64, 2048, 9)
    screened = Screen(rows).topk_relu(x, 8)
    for found, expected in zip(encode(x, rows, 8, product_dtype=torch.int8), screened, strict=True):
        assert torch.equal(found, expected)
    bias = torch.linspace(-1, 1, 2048)
    for b_enc, k in ((bias, 8), (torch.zeros(2048), 100)):  # neither has a screen
        values, _ = encode(x, rows, k, b_enc, torch.int8)
        torch.testing.assert_close(values, (x @ rows.T + b_enc).topk(k).values.relu(), rtol=1e-2, atol=0.05)


@pytest.mark.parametrize(("n", "mean", "share"), [(60, 8, 0.05), (60, 8, 1.0), (3, 16, 0.4), (1, 16, 1.0)])
def test_the_largest_of_a_batch_are_those_of_the_exact_product(n, mean, share):
    """Also where a few rows have most of them: then those rows are looked at again, up to all their latents."""
    x, rows = planted(n, 64, 2048, n)
    x[: max(1, round(share * n))] *= 30
    found = encode_batch(x, rows, mean * n)
    exact = (x.double() @ rows.double().T).relu()
    best = exact.flatten().topk(mean * n).values
    dense = torch.zeros(n, 2048).scatter_add_(1, found.codes.indices, found.codes.values)
    assert int((dense > 0).sum()) == int((best > 0).sum())
    torch.testing.assert_close(dense.flatten().topk(mean * n).values.double(), best, rtol=2e-5, atol=2e-4)
    torch.testing.assert_close(dense[dense > 0].double(), exact[dense > 0], rtol=2e-5, atol=2e-4)
    assert found.smallest is not None
    assert float(found.smallest) == float(dense[dense > 0].min())


def test_of_equal_ones_in_a_batch_the_first_rows_and_latents_stay():
    rows, x = torch.ones(2048, 64), torch.ones(4, 64)
    codes, smallest = encode_batch(x, rows, 8 * 4)
    assert codes.indices[0].tolist() == list(range(32))
    assert (codes.values > 0).sum(dim=1).tolist() == [32, 0, 0, 0]
    assert smallest is not None
    assert float(smallest) == 64


def test_a_batch_without_positive_values_has_no_codes():
    codes, smallest = encode_batch(-torch.ones(4, 64), torch.ones(2048, 64), 8 * 4)
    assert smallest is None
    assert not codes.values.any()


def test_weights_that_are_not_finite_give_what_the_plain_product_gives():
    x, rows = planted(20, 64, 2048, 3)
    rows[5, 7] = torch.nan
    found, plain = Screen(rows).topk_relu(x, 8), encode(x, rows, 8)
    assert torch.equal(found.indices, plain.indices)
    torch.testing.assert_close(found.values, plain.values, equal_nan=True)
