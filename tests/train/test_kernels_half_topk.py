"""Product and top-k in one loop: the codes of the two apart, to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.hardware import _has_half_products

if not _has_half_products():
    pytest.skip("this processor has no float16 arithmetic (AVX512-FP16)", allow_module_level=True)

from train.encode import encode_tiled
from train.kernels import SparseCodes
from train.kernels_half import half_product
from train.kernels_half_topk import fused_topk_relu
from train.kernels_numba import topk_relu


def apart(left: Tensor, right: Tensor, k: int, bias: Tensor | None = None) -> SparseCodes:
    z = half_product(left, right)
    return topk_relu(z if bias is None else z + bias, k)


def assert_same(found: SparseCodes, expected: SparseCodes) -> None:
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.sampled_from([40, 64, 300, 1000]),
    k=st.integers(1, 40),
    kind=st.sampled_from(["random", "ascending", "ties"]),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_codes_are_those_of_product_and_top_k(n: int, m: int, k: int, kind: str, biased: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(n, 20, generator=generator), torch.randn(m, 20, generator=generator)
    if kind == "ascending":  # every latent is a new largest
        left, right = left.abs(), right[:1].abs() * torch.arange(1, m + 1).unsqueeze(1)
    if kind == "ties":
        left, right = left.sign(), right.sign()
    bias = torch.randn(m, generator=generator) if biased else None
    assert_same(
        encode_tiled(left, right, k, b_enc=bias, product_dtype=torch.float16, tile_bytes=10_000),
        apart(left, right, k, bias),
    )


def test_only_rows_with_too_few_positive_latents_are_left() -> None:
    left, right = torch.randn(50, 30), torch.randn(200, 30)
    left[7], left[40] = 0, -right.mean(dim=0) * 100
    bias = torch.full((200,), -1.0)
    positive = ((half_product(left, right) + bias) > 0).sum(dim=1)
    _, rest = fused_topk_relu(left, right, 20, bias)
    assert rest.tolist() == (positive < 20).nonzero().squeeze(1).tolist()
    assert 7 in rest.tolist()
    assert_same(encode_tiled(left, right, 20, b_enc=bias, product_dtype=torch.float16), apart(left, right, 20, bias))


def test_nan_is_the_largest_here_too() -> None:
    left, right = torch.randn(20, 30), torch.randn(100, 30)
    left[3, 5] = torch.nan
    for spoilt in (right, right.index_fill(0, torch.tensor([60]), torch.inf)):
        found, expected = encode_tiled(left, spoilt, 4, product_dtype=torch.float16), apart(left, spoilt, 4)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.values.isnan(), expected.values.isnan())
        assert found.values[3].isnan().all()


def test_the_same_bits_on_any_number_of_threads() -> None:
    left, right = torch.randn(900, 40), torch.randn(300, 40)
    threads, codes = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            codes.append(encode_tiled(left, right, 16, product_dtype=torch.float16))
    finally:
        torch.set_num_threads(threads)
    assert_same(codes[1], codes[0])
    assert_same(codes[2], codes[0])
