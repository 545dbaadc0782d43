"""The geometric median and the fixed denominators."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residscope.errors import ResidscopeError
from train.data import Vectors
from train.model import standardize
from train.objective.statistics import FixedStatistics, LayerVariance, View, gather, geometric_median


def test_the_median_of_a_square_with_an_outlier() -> None:
    """Of four corners and their centre it is the centre, wherever a sixth of the points goes."""
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).repeat(5, 1)
    assert geometric_median(corners).tolist() == pytest.approx([0, 0], abs=1e-6)
    far = torch.cat([corners, torch.tensor([[1e4, 0.0]] * 2)])
    assert geometric_median(far).norm() < 0.3  # the mean is at 909


def test_the_median_on_a_line_is_the_middle_point() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [50.0], [100.0]]).double()
    assert geometric_median(x, iterations=2000, tolerance=0).item() == pytest.approx(2.0, abs=1e-2)


def test_the_median_minimises_the_summed_distance() -> None:
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).double().exp()
    best = geometric_median(x, tolerance=1e-9)
    pull = torch.nn.functional.normalize(x - best, dim=1).sum(dim=0)  # the gradient of the summed distance
    assert pull.norm() < 1e-4 * len(x)


def test_identical_points() -> None:
    assert geometric_median(torch.full((4, 3), 2.0)).tolist() == [2.0, 2.0, 2.0]


def vectors() -> Iterator[Vectors]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        layer = torch.arange(60) % 2
        scale = torch.tensor([1.0, 1000.0])[layer].unsqueeze(1)
        yield Vectors((torch.randn(60, 8, generator=generator) + 3 * torch.arange(8)) * scale, layer)


def statistics(batches: Iterable[Vectors], layers: tuple[int, ...]) -> FixedStatistics:
    view = View("vector", layers)
    return gather([view], batches)[view]


def test_b_pre_is_the_median_of_standardised_vectors() -> None:
    """Mistake 4: b_pre computed on raw vectors and used on standardised ones."""
    found = statistics(vectors(), (0, 1))
    everything = torch.cat([standardize(x).x for x, *_ in vectors()])
    torch.testing.assert_close(found.b_pre, geometric_median(everything))
    assert found.variance is not None
    torch.testing.assert_close(found.variance, (everything - found.b_pre).square().mean(dim=0))
    whole = View("vector", (0, 1), apply_b_dec_to_input=False)
    torch.testing.assert_close(gather([whole], vectors())[whole].variance, everything.square().mean(dim=0))
    assert found.b_pre.norm() < 8**0.5 + 1e-3  # a standardised vector's norm is sqrt(D - 1); raw ones are thousands


def test_denominators_are_variances_about_each_layer_mean() -> None:
    found = statistics(vectors(), (0, 1))
    x, layer = (torch.cat(parts) for parts in list(zip(*vectors(), strict=True))[:2])
    for index in range(2):
        raw = x[layer == index].double()
        std = standardize(x).x[layer == index].double()
        assert found.raw[index].item() == pytest.approx((raw - raw.mean(0)).square().sum(1).mean().item())
        assert found.standardized[index].item() == pytest.approx((std - std.mean(0)).square().sum(1).mean().item())


def test_a_layer_that_does_not_vary_is_named() -> None:
    batches = [Vectors(torch.ones(4, 3).cumsum(1), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(ResidscopeError, match="layer 7: its 4 training vectors"):
        statistics(batches, (7,))


@pytest.mark.parametrize(
    ("standardize_by", "size", "line"),
    [
        ("vector", 1e30, "vectors as long as .* overflow float32"),
        ("none", 1e30, "layer 0: vectors .* from their mean overflow float32"),
        ("vector", 1e-30, "layer 0: its vectors are only .* from their mean"),
        ("vector", 1e-7, "layer 0: its vectors are only .* too little for --standardize vector"),
        ("none", 1e-30, "layer 0: its vectors are only .* from their mean"),
    ],
)
def test_vectors_too_large_or_too_small_are_named_and_not_said_to_be_equal(
    standardize_by: Any, size: float, line: str
) -> None:
    view = View(standardize_by, (0, 1))
    with pytest.raises(ResidscopeError, match=line):
        gather([view], [Vectors(x * size, layer) for x, layer, _ in vectors()])
    by_layer = View("layer", (0, 1))
    found = gather([by_layer], [Vectors(x * size, layer) for x, layer, _ in vectors()])[by_layer]
    torch.testing.assert_close(found.standardized, torch.full((2,), 8.0, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 39), unique=True, max_size=4))
def test_layer_variances_merge_as_if_all_came_at_once(seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, generator=generator) + 1e4  # far from zero, where E[x^2] - E[x]^2 would cancel
    layer = torch.randint(0, 3, (40,), generator=generator)
    sums = LayerVariance.zeros(3, 3)
    bounds = [0, *sorted(cuts), 40]
    for start, stop in itertools.pairwise(bounds):
        sums = sums.add(x[start:stop], layer[start:stop])
    for index in range(3):
        rows = x[layer == index].double()
        assert sums.vectors[index] == len(rows)
        if len(rows):
            torch.testing.assert_close(sums.mean[index], rows.mean(0))
            torch.testing.assert_close(sums.deviation[index], (rows - rows.mean(0)).square().sum())


def test_vectors_that_differ_little_from_one_pattern_are_not_too_small() -> None:
    """Their own standard deviation is what counts, not their distance from each other."""
    x = torch.linspace(-1, 1, 8) + 9e-6 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    found = statistics([Vectors(x, torch.zeros(64, dtype=torch.int64))], (7,))
    assert 0 < found.standardized.item() < 1e-8
