"""Row weights, AuxK, dead latents and layer moments, against numbers worked out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from train.kernels.choose import choose_kernels
from train.objective import losses
from train.objective.losses import (
    FIRING_THRESHOLD,
    AuxOutput,
    DeadLatents,
    auxk,
    dead_threshold,
    row_weights,
)
from train.objective.statistics import LayerVariance


def count(dead: DeadLatents, values: Tensor, indices: Tensor) -> None:
    """Count the rows of a batch with these codes, as a step does."""
    dead.count(len(values), indices[values > FIRING_THRESHOLD])


def test_row_weights_in_both_spaces() -> None:
    layer, std = torch.tensor([1, 0]), torch.tensor([[2.0], [3.0]])
    denominators = torch.tensor([4.0, 5.0])
    standardized = row_weights(layer, std, denominators, raw=False)
    assert standardized.total.tolist() == pytest.approx([1 / 10, 1 / 8])
    raw = row_weights(layer, std, denominators, raw=True)
    assert raw.total.tolist() == pytest.approx([4 / 10, 9 / 8])


def test_the_loss_of_predicting_each_layer_mean_is_one() -> None:
    """The loss is a mean over layers of FVU: 1 when every vector is reconstructed as its layer's mean."""
    x = torch.randn(400, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    layer = torch.arange(400) % 2
    moments = LayerVariance.zeros(2, 3).add(x, layer)
    weights = row_weights(layer, torch.ones(400, 1).double(), moments.deviation / moments.vectors, raw=False)
    loss = weights.total @ (x - moments.mean[layer]).square().sum(dim=1)
    assert loss.item() == pytest.approx(1.0, rel=1e-12)


def auxk_case(
    dtype: torch.dtype, product_dtype: torch.dtype, error: Tensor | None = None, *, k: int = 90, bias: bool = False
) -> AuxOutput:
    """90 dead latents, by default all, so that no close call counts; error [300, 64], default random."""
    generator = torch.Generator().manual_seed(0)
    x, drawn, W = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (300, 300, 90))
    error = drawn if error is None else error.to(dtype)
    rows = row_weights(torch.zeros(300, dtype=torch.int64), x.new_ones(300, 1), x.new_ones(1), raw=False)
    how: dict[str, Any] = {"k": k, "b_enc": W[:, 0] if bias else None, "product_dtype": product_dtype}
    return auxk(x, error, rows, W, W / 8, tile_bytes=30_000, kernels=choose_kernels(W), **how)


def test_gradients_of_auxk_in_bfloat16_are_near_those_in_float64() -> None:
    rounded, exact = auxk_case(torch.float32, torch.bfloat16), auxk_case(torch.float64, torch.float64)
    for one, other in zip(rounded, exact, strict=True):
        assert (one - other).norm() < 1e-2 * other.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("multiple", [7, 64])
def test_rows_that_fill_up_a_multiple_change_nothing(
    monkeypatch: pytest.MonkeyPatch, multiple: int, bias: bool
) -> None:
    plain = auxk_case(torch.float64, torch.float64, k=7, bias=bias)
    monkeypatch.setitem(losses._ROW_MULTIPLE, "cpu", multiple)
    for found, expected in zip(auxk_case(torch.float64, torch.float64, k=7, bias=bias), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_equal_errors_have_no_variance_and_auxk_no_gradient() -> None:
    assert all(not part.any() for part in auxk_case(torch.float32, torch.float32, torch.full((300, 64), 0.3)))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_auxk_does_not_hide_what_is_not_finite(broken: float) -> None:
    error = torch.ones(300, 64)
    error[150, 3] = broken
    assert not auxk_case(torch.float32, torch.float32, error).loss.isfinite()


def test_silent_vectors_do_not_depend_on_how_batches_are_cut() -> None:
    """Mistake 1: counters that tick per micro-batch."""
    values = torch.rand(12, 2)
    indices = torch.stack([torch.randperm(6)[:2] for _ in range(12)])
    whole, cut = DeadLatents(6, 100), DeadLatents(6, 100)
    count(whole, values, indices)
    for part in (slice(0, 6), slice(6, 12)):
        count(cut, values[part], indices[part])
    fired_late = set(indices[6:].flatten().tolist())
    assert [cut.silent[j].item() == whole.silent[j].item() for j in fired_late] == [True] * len(fired_late)
    for latent in set(range(6)) - set(indices.flatten().tolist()):
        assert cut.silent[latent] == whole.silent[latent] == 12


def test_only_values_above_the_threshold_fire() -> None:
    """Mistake 1: counting indices whatever their value. A latent dies at the threshold, not before."""
    dead = DeadLatents(4, threshold=4)
    for _ in range(2):
        count(dead, torch.tensor([[0.5, 0.0], [0.5, 1e-3]]), torch.tensor([[0, 1], [0, 2]]))
    assert dead.silent.tolist() == [0, 4, 4, 4]
    assert dead.dead_latents().tolist() == [1, 2, 3]
    assert dead.fraction() == 0.75
    count(dead, torch.tensor([[0.002, 0.0]]), torch.tensor([[3, 1]]))
    assert dead.silent.tolist() == [1, 5, 5, 0]


def test_counters_pass_two_to_the_24() -> None:
    """Mistake 9: float32 counters stop at 2^24."""
    dead = DeadLatents(1, threshold=2**40)
    dead.silent += 2**24
    for _ in range(3):
        count(dead, torch.tensor([[0.0]]), torch.tensor([[0]]))
    assert dead.silent.tolist() == [2**24 + 3]


def test_dead_threshold_counts_tokens_not_vectors() -> None:
    assert dead_threshold(run_tokens=1_000, n_layers=30, dead_tokens=None) == 100 * 30
    assert dead_threshold(run_tokens=10**9, n_layers=6, dead_tokens=None) == 10_000_000 * 6
    assert dead_threshold(run_tokens=10**9, n_layers=6, dead_tokens=7) == 42
    assert dead_threshold(run_tokens=3, n_layers=2, dead_tokens=None) == 1
