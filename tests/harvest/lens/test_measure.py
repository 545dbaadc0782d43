"""Condition numbers, and how they are limited. Mean KL is tested beside the loss, in test_kl.py."""

import pytest
import torch

from harvest.lens.measure import condition, limit_condition
from tests.support.lenses import correlated

D = 6


def test_the_condition_is_limited_and_the_mean_stays() -> None:
    x, _ = correlated(50, D)
    weight = torch.diag(torch.tensor([9.0, 0, 0, -0.5, -0.999, -1], dtype=torch.float64))
    bias, mean = torch.ones(D, dtype=torch.float64), x.double().mean(0)
    assert condition(weight) > 1e15
    limited, moved = limit_condition(weight, bias, mean, 100)
    assert condition(limited) == pytest.approx(100, rel=1e-6)
    torch.testing.assert_close(limited.diagonal()[:4], weight.diagonal()[:4])
    torch.testing.assert_close(mean + limited @ mean + moved, mean + weight @ mean + bias)
    same, _ = limit_condition(weight, bias, mean, 0)
    assert same is weight
