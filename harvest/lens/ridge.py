"""Fits translators by ridge regression, from sums that are computed in one pass over the vectors.

How: translator i maps x, the input of block i, to y, the last block's output, as x + W x + b. With r = y - x and bars
for means over kept tokens,

    W^T = (S_xx + lambda I)^-1 S_xr    S_xx = sum (x - x̄)(x - x̄)^T    S_xr = sum (x - x̄)(r - r̄)^T    b = r̄ - W x̄

so that the penalty pulls the translator towards "x plus a constant", not towards zero, and does not affect b. The sums
are kept in float64 about their own means, and merged by the update of Chan, Golub and LeVeque. lambda is chosen for
each translator, among multiples of the mean eigenvalue of S_xx, by the squared error on documents that are not in the
sums; then the sums of both groups of documents are merged and solved once more.

Shapes: n vectors, D = d_model.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PENALTIES = tuple(10.0 ** (power / 2) for power in range(-16, 3))
"""The candidates for lambda, in units of the mean eigenvalue of S_xx: 1e-8 to 10, in steps of half a decade."""


class RegressionSums:
    """Means of x and r, and sums of products about them, in float64."""

    def __init__(self, d_model: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean_x = torch.zeros(d_model, dtype=torch.float64, device=device)
        self.mean_r = torch.zeros(d_model, dtype=torch.float64, device=device)
        self.xx = torch.zeros(d_model, d_model, dtype=torch.float64, device=device)
        self.xr = torch.zeros(d_model, d_model, dtype=torch.float64, device=device)
        self.rr = torch.zeros((), dtype=torch.float64, device=device)
        """Summed over dimensions, too: the total squared deviation of r."""

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add vectors x and their targets y, each [n, D]."""
        if len(x) == 0:
            return
        x, r = x.double(), y.double() - x.double()
        mean_x, mean_r = x.mean(0), r.mean(0)
        x, r = x - mean_x, r - mean_r
        self._merge(len(x), mean_x, mean_r, x.T @ x, x.T @ r, r.square().sum())

    def merge(self, other: "RegressionSums") -> None:
        """Add the vectors of other sums."""
        if other.count:
            self._merge(other.count, other.mean_x, other.mean_r, other.xx, other.xr, other.rr)

    def _merge(self, n: int, mean_x: Tensor, mean_r: Tensor, xx: Tensor, xr: Tensor, rr: Tensor) -> None:
        total = self.count + n
        dx, dr, weight = mean_x - self.mean_x, mean_r - self.mean_r, self.count * n / total
        self.xx += xx
        self.xx.addr_(dx, dx, alpha=weight)
        self.xr += xr
        self.xr.addr_(dx, dr, alpha=weight)
        self.rr += rr + weight * dr.square().sum()
        self.mean_x += dx * (n / total)
        self.mean_r += dr * (n / total)
        self.count = total


class RidgeFit(NamedTuple):
    """One translator."""

    weight: Tensor
    """float64 [D, D]."""
    bias: Tensor
    """float64 [D]."""
    penalty: float
    """lambda, in units of the mean eigenvalue of S_xx."""
    r2: float
    """Share of the variance of y - x explained on the documents that chose lambda, before they were merged; higher is
    better, 1 is perfect."""


def fit_ridge(fit: RegressionSums, choose: RegressionSums) -> RidgeFit:
    """The translator of `fit` after merging `choose` into it, with the penalty that did best on `choose` before."""
    penalty, r2 = _best_penalty(fit, choose)
    fit.merge(choose)
    weight, bias = solve(fit, penalty)
    return RidgeFit(weight, bias, penalty, r2)


def solve(sums: RegressionSums, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight [D, D] and bias [D] (float64) for a penalty in units of the mean eigenvalue of S_xx."""
    matrix = sums.xx.clone()
    matrix.diagonal().add_(penalty * _mean_eigenvalue(sums))
    weight = torch.linalg.solve(matrix, sums.xr).T.contiguous()
    return weight, sums.mean_r - weight @ sums.mean_x


def _best_penalty(fit: RegressionSums, choose: RegressionSums) -> tuple[float, float]:
    """The best of `PENALTIES`, and its share of variance explained on `choose`.

    With S_xx = Q diag(e) Q^T, W^T = Q diag(1 / (e + lambda)) A where A = Q^T S_xr; and with the sums of `choose` taken
    about the means of `fit`, the squared error is rr - 2 tr(W C_xr) + tr(W C_xx W^T): a sum over D x D products that
    are the same for every lambda.
    """
    scale = _mean_eigenvalue(fit)
    values, vectors = torch.linalg.eigh(fit.xx)
    dx, dr, n = choose.mean_x - fit.mean_x, choose.mean_r - fit.mean_r, choose.count
    xx = torch.addr(choose.xx, dx, dx, alpha=n)
    xr = torch.addr(choose.xr, dx, dr, alpha=n)
    rr = choose.rr + n * dr.square().sum()
    a = vectors.T @ fit.xr  # [D, D]
    linear = (a * (vectors.T @ xr)).sum(1)  # [D]
    square = (vectors.T @ xx @ vectors) * (a @ a.T)  # [D, D]
    errors = []
    for penalty in PENALTIES:
        d = 1 / (values.clamp_min(0) + penalty * scale)
        errors.append(float(rr - 2 * (d @ linear) + d @ square @ d))
    best = min(range(len(errors)), key=errors.__getitem__)
    return PENALTIES[best], 1 - errors[best] / max(float(choose.rr), torch.finfo(torch.float64).tiny)


def _mean_eigenvalue(sums: RegressionSums) -> float:
    """The mean eigenvalue of S_xx; a tiny number if all vectors are equal, to avoid division by zero."""
    return max(float(sums.xx.diagonal().mean()), 1e-300)
