"""Row weights, dead latents and layer moments, against numbers worked out by hand."""

import pytest
import torch

from train.kernels.interface import SparseCodes
from train.objective.losses import DeadLatents, dead_threshold, row_weights
from train.objective.statistics import LayerVariance


def codes(values: list[list[float]], indices: list[list[int]]) -> SparseCodes:
    return SparseCodes(torch.tensor(values), torch.tensor(indices))


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


def test_silent_vectors_do_not_depend_on_how_batches_are_cut() -> None:
    """Mistake 1: counters that tick per micro-batch."""
    values = torch.rand(12, 2)
    indices = torch.stack([torch.randperm(6)[:2] for _ in range(12)])
    whole, cut = DeadLatents(6, 100), DeadLatents(6, 100)
    whole.update(SparseCodes(values, indices))
    for part in (slice(0, 6), slice(6, 12)):
        cut.update(SparseCodes(values[part], indices[part]))
    fired_late = set(indices[6:].flatten().tolist())
    assert [cut.silent[j].item() == whole.silent[j].item() for j in fired_late] == [True] * len(fired_late)
    for latent in set(range(6)) - set(indices.flatten().tolist()):
        assert cut.silent[latent] == whole.silent[latent] == 12


def test_only_values_above_the_threshold_fire() -> None:
    """Mistake 1: counting indices whatever their value. A latent dies at the threshold, not before."""
    dead = DeadLatents(4, threshold=4)
    for _ in range(2):
        dead.update(codes([[0.5, 0.0], [0.5, 1e-3]], [[0, 1], [0, 2]]))
    assert dead.silent.tolist() == [0, 4, 4, 4]
    assert dead.dead_latents().tolist() == [1, 2, 3]
    assert dead.fraction() == 0.75
    dead.update(codes([[0.002, 0.0]], [[3, 1]]))
    assert dead.silent.tolist() == [1, 5, 5, 0]


def test_counters_pass_two_to_the_24() -> None:
    """Mistake 9: float32 counters stop at 2^24."""
    dead = DeadLatents(1, threshold=2**40)
    dead.silent += 2**24
    for _ in range(3):
        dead.update(codes([[0.0]], [[0]]))
    assert dead.silent.tolist() == [2**24 + 3]


def test_dead_threshold_counts_tokens_not_vectors() -> None:
    assert dead_threshold(run_tokens=1_000, n_layers=30, dead_tokens=None) == 100 * 30
    assert dead_threshold(run_tokens=10**9, n_layers=6, dead_tokens=None) == 10_000_000 * 6
    assert dead_threshold(run_tokens=10**9, n_layers=6, dead_tokens=7) == 42
    assert dead_threshold(run_tokens=3, n_layers=2, dead_tokens=None) == 1
