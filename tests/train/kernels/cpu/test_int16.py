"""Products in 16-bit integers against exact ones of rounded rows; bits that depend on two rows alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from train.kernels.cpu.int16 import Int16Product, int16_product, integer_products_run

if not integer_products_run():
    pytest.skip("this processor has no fast products of integers (AVX512-VNNI)", allow_module_level=True)

from train.kernels.encode import encode_tiled
from train.kernels.interface import choose_kernels
from train.objective.losses import RowWeights, auxk, row_weights


def naive(left: Tensor, right: Tensor) -> Tensor:
    """Rows scaled to norms of 2^14..2^15, with a margin for rounding; their products in 64-bit integers."""
    exponents = [15 - torch.frexp(rows.double().norm(dim=1, keepdim=True) * (1 + 2**-14))[1] for rows in (left, right)]
    whole = [torch.ldexp(x.double(), e).round().long() for x, e in zip((left, right), exponents, strict=True)]
    return torch.ldexp((whole[0] @ whole[1].T).double(), -exponents[0] - exponents[1].T).float()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 100),
    d=st.one_of(st.integers(1, 40), st.sampled_from([143, 144, 145, 577])),
    scale=st.sampled_from([1.0, 1e-12, 3e4, 1e15]),
    seed=st.integers(0, 2**31),
)
def test_products_are_those_of_rounded_rows(n: int, m: int, d: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = scale * torch.randn(n, d, generator=generator), torch.randn(m, d, generator=generator)
    left[0, 0] = 100 * scale  # an outlier
    torch.testing.assert_close(int16_product(left, right), naive(left, right), rtol=3e-7, atol=0)


@pytest.mark.parametrize("d", [64, 576, 4096])
def test_errors_are_those_of_rounding_to_a_norm_over_2_to_the_15(d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, d, generator=generator) for rows in (200, 300))
    norms = left.double().norm(dim=1, keepdim=True) * right.double().norm(dim=1)
    error = (int16_product(left, right) - left.double() @ right.double().T) / norms
    # Each rounding is uniform in a step that is a norm divided by 2^14..2^15.
    assert 2**-15 / 12**0.5 < error.std() < 2 * 2**-15 * (2 / 12) ** 0.5


@pytest.mark.parametrize("number", [2 - 2**-23, 1.0, 3.0e38, 1.0e-30])
def test_a_row_of_one_number_keeps_its_sign_and_size(number: float) -> None:
    """Rounded up to 2^15 it would be the smallest of 16 bits."""
    left, right = torch.zeros(2, 6), torch.ones(1, 6)
    left[0, 3], left[1, 4] = number, -number
    expected = torch.tensor([[number], [-number]])
    torch.testing.assert_close(int16_product(left, right), expected, rtol=2**-13, atol=0)


def test_sums_of_the_longest_rows_do_not_overflow() -> None:
    ones = torch.ones(1, 300_000)
    assert int16_product(ones, ones).item() == pytest.approx(300_000, rel=0.03)
    assert int16_product(ones, -ones).item() == pytest.approx(-300_000, rel=0.03)


def test_small_whole_numbers_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-3, 4, (s, 50), generator=generator).float() for s in (20, 70))
    left[0], right[1] = 0, 0
    assert torch.equal(int16_product(left, right), left @ right.T)


def test_bits_depend_on_the_two_rows_alone() -> None:
    left, right = torch.randn(60, 100), torch.randn(90, 100)
    whole = int16_product(left, right)
    assert torch.equal(whole[13:37, 40:77], int16_product(left[13:37], right[40:77]))
    out = torch.empty(60, 90)
    assert torch.equal(Int16Product(right)(left, out), out)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert torch.equal(int16_product(left, right), whole)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_shows_in_its_own_row() -> None:
    left = torch.randn(3, 10)
    left[1, 4] = torch.nan
    left[2, 5] = torch.inf
    z = int16_product(left, torch.randn(7, 10))
    assert z[0].isfinite().all()
    assert not z[1:].isfinite().any()


def test_wrong_shapes_are_named() -> None:
    product = Int16Product(torch.randn(4, 10))
    with pytest.raises(ValueError, match=r"left: expected \[n, 10\], found \[2, 9\]"):
        product(torch.randn(2, 9))
    with pytest.raises(ValueError, match="out: expected contiguous"):
        product(torch.randn(2, 10), torch.empty(4, 2).t())


def test_codes_are_those_of_a_float32_product_but_for_close_calls() -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(rows, 64, generator=generator) for rows in (200, 400))
    W /= W.norm(dim=1, keepdim=True)
    exact = encode_tiled(x, W, 8)
    rounded = encode_tiled(x, W, 8, product_dtype=torch.int16, tile_bytes=50_000)
    assert (exact.values - rounded.values).abs().max() < 0.002
    same = (exact.indices.unsqueeze(2) == rounded.indices.unsqueeze(1)).any(dim=2)
    assert same.float().mean() > 0.99


def test_the_transpose_of_contiguous_memory_is_packed_as_its_copy_is() -> None:
    left, right = torch.randn(45, 51), torch.randn(45, 70)  # over 45 rows, an odd depth
    assert torch.equal(int16_product(left.t(), right.t()), int16_product(left.t().contiguous(), right.t().contiguous()))


def test_gradients_of_auxk_are_near_those_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x, error, W = (torch.randn(rows, 64, generator=generator).double() for rows in (300, 300, 90))
    rows = row_weights(torch.zeros(300, dtype=torch.int64), x.new_ones(300, 1), x.new_ones(1), raw=False)
    found, expected = (
        auxk(
            x.to(kind),
            error.to(kind),
            RowWeights(*(part.to(kind) for part in rows)),
            W.to(kind),
            W.to(kind) / 8,
            k=90,  # all, so that no close call counts
            product_dtype=product,
            tile_bytes=30_000,
            kernels=choose_kernels(W),
        )
        for kind, product in ((torch.float32, torch.int16), (torch.float64, torch.float64))
    )
    for rounded, exact in zip(found, expected, strict=True):
        assert (rounded - exact).norm() < 5e-3 * exact.norm()
