"""How well the autoencoder reconstructs each layer, and what the layers' vectors look like: sums that add over tokens,
and the numbers that they give.

    FVU_l    = sum |x - x_hat|^2 / sum |x - mean_l|^2   mean_l per dimension, over the same vectors
    MSE_l    = sum |x - x_hat|^2 / (n d_model)          grows with the square of a layer's norm
    L0_l     = mean number of latents with a value > 0
    norm_l   = mean L2 norm of x
    cosine_l = mean cosine between x_l - m_l and x_{l+1} - m_{l+1} of the same token, where m are the means over the
               store's kept tokens

Errors are in raw space; lower is better. Deviations are taken from m and summed in float64: sum |x - mean_l|^2 =
sum |x - m|^2 - |sum (x - m)|^2 / n, in which nothing cancels, because m is (nearly) the mean. So one pass is enough,
even with massive activations. Several subsets of the tokens (analysed, validation) are summed at once.

Shapes: T tokens, L layers, D d_model, k active latents a vector, S subsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class LayerQuality:
    """Additive sums of reconstruction errors and vector statistics, and n_tokens [S], per subset of tokens."""

    n_tokens: NDArray[np.int64]
    squared_error: NDArray[np.float64]
    """[S, L] sum |x - x_hat|^2."""
    squared_deviation: NDArray[np.float64]
    """[S, L] sum |x - m|^2."""
    deviation: NDArray[np.float64]
    """[S, L, D] sum of x - m."""
    norm: NDArray[np.float64]
    """[S, L] sum |x|."""
    active: NDArray[np.int64]
    """[S, L] latents with a value > 0."""
    cosine: NDArray[np.float64]
    """[S, L] sum of cosines to the next layer."""
    n_cosines: NDArray[np.int64]
    """[S, L] tokens whose cosine is defined (neither vector is the mean itself)."""

    @classmethod
    def zeros(cls, n_subsets: int, n_layers: int, d_model: int) -> "LayerQuality":
        shape = (n_subsets, n_layers)
        names = ("squared_error", "squared_deviation", "norm", "cosine")
        sums: dict[str, Any] = {name: np.zeros(shape) for name in names}
        counts: dict[str, Any] = {name: np.zeros(shape, np.int64) for name in ("active", "n_cosines")}
        return cls(n_tokens=np.zeros(n_subsets, np.int64), deviation=np.zeros((*shape, d_model)), **sums, **counts)

    def add(
        self,
        x: NDArray[np.floating],
        x_hat: NDArray[np.floating],
        values: NDArray[np.floating],
        shift: NDArray[np.floating],
        member: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        """Add tokens in place: x, x_hat [T, L, D], values [T, L, k] of their codes, shift [L, D] = m in x's float type,
        member [S, T].

        Returns [3, T, L] for `LayerMoments.add`: |x - x_hat|^2, |x - m|^2 and the number of active latents.
        """
        from analysis import loops

        error, deviation, norm, cosine = (np.empty(x.shape[:2]) for _ in range(4))  # each [T, L]
        x, x_hat = np.ascontiguousarray(x), np.ascontiguousarray(x_hat)
        loops.measure_vectors(x, x_hat, shift, member, error, deviation, norm, cosine, self.deviation)
        defined = ~np.isnan(cosine)
        active = (values > 0).sum(axis=-1)  # [T, L]
        totals = self.squared_error, self.squared_deviation, self.norm, self.active, self.cosine, self.n_cosines
        parts = error, deviation, norm, active, np.where(defined, cosine, 0.0), defined
        for subset, rows in enumerate(member):
            self.n_tokens[subset] += rows.sum()
            for total, part in zip(totals, parts, strict=True):
                total[subset] += part[rows].sum(axis=0)
        return np.stack([error, deviation, active])

    @staticmethod
    def merged(parts: Sequence["LayerQuality"]) -> "LayerQuality":
        """The sum of `parts`, added in their order."""
        names = [field.name for field in fields(LayerQuality)]
        return LayerQuality(**{name: sum_in_order([getattr(part, name) for part in parts]) for name in names})

    def result(self, subset: int) -> "QualityResult":
        """The numbers of one subset, by its index."""
        n, d_model = int(self.n_tokens[subset]), self.deviation.shape[-1]
        spread = self.spread(subset)
        return QualityResult(
            n_tokens=n,
            d_model=d_model,
            fvu=ratio(self.squared_error[subset], spread),
            mse=ratio(self.squared_error[subset], n * d_model),
            l0=ratio(self.active[subset], n),
            mean_norm=ratio(self.norm[subset], n),
            cosine_to_next=ratio(self.cosine[subset], self.n_cosines[subset]),
        )

    def spread(self, subset: int) -> NDArray[np.float64]:
        """[L] sum |x - mean_l|^2 with mean_l the mean of the same vectors: the denominator of FVU."""
        n, total = max(int(self.n_tokens[subset]), 1), self.squared_deviation[subset]
        spread = total - (self.deviation[subset] ** 2).sum(axis=-1) / n
        return np.where(spread > 1e-12 * total, spread, 0.0)  # less is rounding: all vectors are equal


class QualityResult(NamedTuple):
    """Numbers of a subset of tokens per layer, each [L]; NaN where undefined (no vectors, or no spread)."""

    n_tokens: int
    d_model: int
    fvu: NDArray[np.float64]
    mse: NDArray[np.float64]
    l0: NDArray[np.float64]
    mean_norm: NDArray[np.float64]
    cosine_to_next: NDArray[np.float64]


def ratio(numerator: NDArray, denominator: NDArray | float) -> NDArray[np.float64]:
    """numerator / denominator, NaN where the denominator is 0."""
    denominator = np.broadcast_to(np.asarray(denominator, np.float64), numerator.shape)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def ratio_or_zero(numerator: NDArray, denominator: NDArray, where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """numerator / denominator where `where` is True, 0 elsewhere."""
    return np.divide(numerator, denominator, out=np.zeros_like(np.asarray(numerator)), where=where)


def defined(value: Any) -> float | None:
    """The number for JSON; None if it is undefined (not finite)."""
    return float(value) if np.isfinite(value) else None


def sum_in_order(arrays: Sequence[NDArray]) -> NDArray:
    """The sum of arrays, first to last."""
    return reduce(np.add, arrays)
