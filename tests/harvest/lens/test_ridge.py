"""Ridge translators, against the normal equations written out in float64."""

import numpy as np
import pytest
import torch

from harvest.lens.ridge import PENALTIES, RegressionSums, fit_ridge, solve
from tests.support.lenses import correlated

D = 6


def sums_of(x: torch.Tensor, y: torch.Tensor, pieces: int = 1) -> RegressionSums:
    sums = RegressionSums(x.shape[1])
    for rows_x, rows_y in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        sums.add(rows_x, rows_y)
    return sums


def naive(x: torch.Tensor, y: torch.Tensor, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Minimises sum |x + W x + b - y|^2 + lambda |W|^2 over W and b, with a column of ones for b."""
    a, r = x.double().numpy(), (y.double() - x.double()).numpy()
    scatter = (a - a.mean(0)).T @ (a - a.mean(0))
    ridge = np.eye(D + 1) * penalty * np.trace(scatter) / D
    ridge[D, D] = 0  # The intercept is free.
    a = np.hstack([a, np.ones((len(a), 1))])
    solution = np.linalg.solve(a.T @ a + ridge, a.T @ r)
    return solution[:D].T, solution[D]


@pytest.mark.parametrize("penalty", [1e-8, 1e-2, 10.0])
@pytest.mark.parametrize("pieces", [1, 7])
def test_ridge_equals_the_normal_equations(penalty: float, pieces: int) -> None:
    x, y = correlated(60, D)
    weight, bias = solve(sums_of(x, y, pieces), penalty)
    expected_weight, expected_bias = naive(x, y, penalty)
    np.testing.assert_allclose(weight.numpy(), expected_weight, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(bias.numpy(), expected_bias, rtol=1e-8, atol=1e-8)


def test_a_large_common_offset_costs_no_precision() -> None:
    x, y = correlated(60, D)
    weight, _ = solve(sums_of(x.double(), y.double(), 5), 1e-6)
    moved, bias = solve(sums_of(x.double() + 1e5, y.double() - 3e4, 5), 1e-6)
    torch.testing.assert_close(moved, weight, rtol=1e-6, atol=1e-8)
    predicted = (x.double() + 1e5) @ (moved + torch.eye(D)).T + bias
    assert (predicted - (y.double() - 3e4)).square().mean() < 1.1 * (y - y.mean(0)).square().mean()


def test_the_penalty_is_the_one_that_does_best_on_the_other_documents() -> None:
    x, y = correlated(14, D, noise=3.0)
    other_x, other_y = correlated(40, D, seed=1, noise=3.0)
    errors, residual = [], other_y - other_x
    for penalty in PENALTIES:
        weight, bias = naive(x, y, penalty)
        errors.append(float(((other_x.numpy() @ weight.T + bias - residual.numpy()) ** 2).sum()))
    found = fit_ridge(sums_of(x, y), sums_of(other_x, other_y))
    assert found.penalty == PENALTIES[int(np.argmin(errors))]
    assert PENALTIES[0] < found.penalty < PENALTIES[-1]
    total = float((residual - residual.mean(0)).square().sum())
    assert found.r2 == pytest.approx(1 - min(errors) / total, rel=1e-6)
    weight, _ = naive(torch.cat([x, other_x]), torch.cat([y, other_y]), found.penalty)
    np.testing.assert_allclose(found.weight.numpy(), weight, rtol=1e-7, atol=1e-9)


def test_vectors_that_are_all_the_same_give_a_constant() -> None:
    x, y = torch.ones(5, D), torch.arange(5.0)[:, None].expand(5, D)
    weight, bias = solve(sums_of(x, y), 1e-3)
    assert torch.equal(weight, torch.zeros_like(weight))
    torch.testing.assert_close(bias, torch.ones(D, dtype=torch.float64))
