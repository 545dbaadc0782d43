"""Codes from tiles of products: exact whatever the tile, by k, by batch and by threshold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.codes import dense, exact_draws
from train.kernels.cpu.backend import NUMBA
from train.kernels.encode import ReadyEncoder
from train.kernels.interface import Kernels, SparseCodes, TopK
from train.kernels.plain import TORCH


@pytest.mark.parametrize("tile_bytes", [1, 12 * 4 * 3, 10**9])
def test_tiles_change_nothing(tile_bytes: int) -> None:
    x, W = torch.randn(10, 5), torch.randn(12, 5)
    whole = ReadyEncoder(TORCH, W).topk(x, 3)
    tiled = ReadyEncoder(TORCH, W, tile_bytes=tile_bytes).topk(x, 3)
    torch.testing.assert_close(tiled.values, whole.values)
    assert torch.equal(tiled.indices, whole.indices)


@pytest.mark.parametrize("kernels", [TORCH, NUMBA], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("tile_bytes", [1, 300, 10**9])
def test_of_equal_latents_either_is_taken_and_the_values_are_the_largest(kernels: Kernels, tile_bytes: int) -> None:
    """Their pre-activations may differ by rounding, which decides."""
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(50, 37, generator=generator), torch.randn(12, 37, generator=generator)[torch.arange(24) // 2]
    values, indices = ReadyEncoder(kernels, W, tile_bytes=tile_bytes).topk(x, 5)
    exact = x.double() @ W.double().T
    assert all(len(set(row)) == 5 for row in indices.tolist())
    torch.testing.assert_close(values.double(), exact.topk(5).values.relu(), rtol=0, atol=1e-4)
    torch.testing.assert_close(values.double(), exact.gather(1, indices).relu(), rtol=0, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 80), grid=st.booleans(), tile_bytes=st.sampled_from([1, 99, 9999])
)
def test_the_largest_of_a_batch_are_exact_for_any_tile(seed: int, count: int, grid: bool, tile_bytes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, W = (exact_draws(n, 4, generator=generator) for n in (9, 7))
    x, W = (x.round(), W.round()) if grid else (x, W)
    found = ReadyEncoder(TORCH, W, tile_bytes=tile_bytes).batch(x, count)
    flat = (x @ W.T).flatten()
    order = flat.sort(descending=True, stable=True).indices[:count]
    expected = torch.zeros_like(flat).scatter(0, order, 1.0) * flat.relu()
    torch.testing.assert_close(dense(*found.codes, 7), expected.view(9, 7))
    if (expected > 0).any():
        torch.testing.assert_close(found.smallest, expected[expected > 0].min())
    else:
        assert found.smallest is None


@pytest.mark.parametrize("tile_bytes", [1, 100, 10**6])
def test_codes_above_thresholds_by_hand(tile_bytes: int) -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-1.0, -1.0]])
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    z = [[1.0, -2.0, -1.0], [3.0, 0.5, 3.5], [-1.0, -1.0, -2.0]]
    for threshold, kept in (
        (torch.tensor(1.0), [[0, 0, 0], [3.0, 0, 3.5], [0, 0, 0]]),  # what equals it is not above it
        (torch.tensor(0.0), [[1.0, 0, 0], [3.0, 0.5, 3.5], [0, 0, 0]]),
        (torch.tensor(-5.0), [[1.0, 0, 0], [3.0, 0.5, 3.5], [0, 0, 0]]),  # never negative
        (torch.tensor([3.5, 0.2, 3.5]), [[0, 0, 0], [0, 0.5, 0], [0, 0, 0]]),
    ):
        found = ReadyEncoder(TORCH, W, tile_bytes=tile_bytes).above(x, threshold)
        assert dense(*found, 3).tolist() == kept, z
    assert ReadyEncoder(TORCH, W).above(x[:0], torch.tensor(0.0)).values.shape[0] == 0


def test_a_bfloat16_product_is_compared_with_the_threshold_as_it_is() -> None:
    """The comparison must not round the threshold to bfloat16, which may be the next number above it."""
    z = torch.arange(250, 262).bfloat16() / 128  # neighbours in bfloat16
    encoder = ReadyEncoder(TORCH, torch.ones(1, 1), product_dtype=torch.bfloat16)
    for threshold in (1.9999, 2.0, 2.0001, 2.0079, 2.0156, 0.0):
        found = encoder.above(z[:, None].float(), torch.tensor(threshold))
        assert found.values.flatten().tolist() == [value if value > threshold else 0.0 for value in z.tolist()]


def test_a_screen_is_asked_for_once_and_only_where_it_may_stand_for_the_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def screen(self: Kernels, W_enc: Tensor, k: int) -> TopK | None:
        asked.append(k)
        return lambda x, k: SparseCodes(torch.zeros(len(x), k), torch.zeros(len(x), k, dtype=torch.int64))

    monkeypatch.setattr(type(TORCH), "screen", screen)
    x, W, b_enc = torch.randn(10, 5), torch.randn(12, 5), torch.zeros(12)
    for encoder in (
        ReadyEncoder(TORCH, W),
        ReadyEncoder(TORCH, W, product_dtype=torch.bfloat16),
        ReadyEncoder(TORCH, W, b_enc, product_dtype=torch.int8),
        ReadyEncoder(TORCH, W, b_enc, screened=True),
    ):
        assert encoder.topk(x, 3).values.any()
    assert not asked
    for encoder in (ReadyEncoder(TORCH, W, product_dtype=torch.int8), ReadyEncoder(TORCH, W, screened=True)):
        for _ in range(2):
            assert not encoder.topk(x, 3).values.any()
        assert encoder.above(x, torch.tensor(0.0)).values.any()
    assert asked == [3, 3]
