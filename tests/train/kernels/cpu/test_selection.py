"""The k largest of each row against a stable sort: ties, infinities, NaN, and rows of any width."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.kernels.cpu.backend import NUMBA
from train.kernels.plain import TORCH


def rows_of_kind(kind: str, n: int, m: int, seed: int) -> Tensor:
    """Pre-activations [n, m], float64, with something that a selection can get wrong."""
    z = torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "ties":
        return (2 * z).round()
    if kind == "negative":
        return -z.abs()
    if kind == "constant":
        return torch.full_like(z, seed % 3 - 1)
    if kind == "few positive":
        return torch.where(z > 1.5, z, -z.abs())
    if kind == "infinite":
        return torch.where(z > 1, torch.inf, torch.where(z < -1, -torch.inf, z))
    if kind == "signed zeros":
        return torch.where(z > 0.5, 0.0, torch.where(z < -0.5, -0.0, z))
    return z


KINDS = ["normal", "ties", "negative", "constant", "few positive", "infinite", "signed zeros"]
WIDTHS = st.one_of(st.integers(1, 300), st.sampled_from([512, 1024, 2048 + 17]))


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    n=st.integers(1, 4),
    m=WIDTHS,
    seed=st.integers(0, 2**31),
)
def test_topk_is_the_start_of_a_stable_sort(
    data: st.DataObject, kind: str, dtype: torch.dtype, n: int, m: int, seed: int
) -> None:
    """Exactly the k largest, largest first, and of equal ones the lowest latents."""
    k = data.draw(st.one_of(st.sampled_from([1, m]), st.integers(1, m)), label="k")
    z = rows_of_kind(kind, n, m, seed).to(dtype)
    values, indices = NUMBA.topk_relu(z, k)
    ordered, order = torch.sort(z, dim=1, descending=True, stable=True)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(values, ordered[:, :k].relu().to(values.dtype))
    assert torch.equal(indices, order[:, :k])


@pytest.mark.parametrize("k", [1, 20, 100, 600, 2000])
def test_topk_of_wide_rows(k: int) -> None:
    """Each way to a bound: over blocks and over the latents; and many candidates."""
    z = rows_of_kind("normal", 6, 5000, seed=k).float()
    z[1].round_()
    z[2] = z[2].sort().values
    z[3] = z[3].sort(descending=True).values
    values, indices = NUMBA.topk_relu(z, k)
    ordered, order = torch.sort(z, dim=1, descending=True, stable=True)
    assert torch.equal(values, ordered[:, :k].relu())
    assert torch.equal(indices, order[:, :k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_topk_does_not_hide_nan(dtype: torch.dtype, sign: int) -> None:
    """Also the NaN that x86 makes of inf - inf, whose sign bit is set."""
    z = rows_of_kind("normal", 3, 400, seed=0).to(dtype)
    z[1, [7, 399]] = torch.copysign(torch.tensor(torch.nan), torch.tensor(float(sign))).to(dtype)
    values, indices = NUMBA.topk_relu(z, 5)
    assert values.isnan().sum(dim=1).tolist() == [0, 2, 0]
    assert indices[1, :2].tolist() == [7, 399]
    assert torch.equal(values[1, 2:], z[1].nan_to_num(nan=-torch.inf).topk(3).values.to(values.dtype))


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    m=WIDTHS,
    seed=st.integers(0, 2**31),
)
def test_keeping_the_largest_is_topk_scattered(
    data: st.DataObject, kind: str, dtype: torch.dtype, m: int, seed: int
) -> None:
    k = data.draw(st.one_of(st.sampled_from([1, m, m + 1]), st.integers(1, m)), label="k")
    z = rows_of_kind(kind, 3, m, seed).to(dtype)
    ordered, order = torch.sort(z, dim=1, descending=True, stable=True)
    expected = torch.zeros_like(z).scatter_(1, order[:, :k], ordered[:, :k].relu())
    assert torch.equal(TORCH.keep_largest(z.clone(), k).sort().values, expected.sort().values)  # ties are its own
    assert torch.equal(NUMBA.keep_largest(z, k), expected)


def test_keeping_the_largest_does_not_hide_nan() -> None:
    z = rows_of_kind("normal", 2, 100, seed=0)
    z[1, 7] = -torch.tensor(torch.nan)
    kept = NUMBA.keep_largest(z.clone(), 3)
    assert kept.isnan().nonzero().tolist() == [[1, 7]]
    assert int((kept[1] > 0).sum()) == 2
