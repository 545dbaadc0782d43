"""How activation mass spreads over layers: sums that add over tokens, and the variances that they give.

With a[t, l, j] >= 0 the activation of latent j at token t and layer l, P(l, j, t) = a / sum a, and the law of total
variance splits the variance of the layer L exactly into three parts:

    Var(L) = E[Var(L | J, T)] + E[Var(E[L | J, T] | J)] + Var(E[L | J])
             within token       between tokens            between latents

`LayerMoments` keeps what those parts need per latent j. A pair (t, j) has the mass m = sum_l a, the mean layer
mu = sum_l l a / m and the variance v = sum_l (l - mu)^2 a / m over layers; summed over tokens

    M0 = sum m     M1 = sum m mu     M2 = sum_l l^2 a = sum m v + sum m mu^2     Q = sum m mu^2

so that, by mass, with everything summed over latents and divided by sum_j M0

    within token     M2 - Q                    kept as the sum of m v, in which nothing cancels
    between tokens   Q - M1^2 / M0
    between latents  M0 (M1 / M0 - mean)^2     mean = sum_j M1 / sum_j M0

Sums are float64 (counts int64) with layers centred. They add over tokens, so they merge across shards, workers and
document groups in any order. Whole tokens must be added: every layer of a token in one call. The same pass over the
codes also fills the sums that `analysis.persistence` needs. The full method: docs/method.md.

Shapes: T tokens, L layers, k active latents a vector, M n_latents, G document groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.quality import defined, ratio, ratio_or_zero

Weighting = Literal["mass", "equal", "latent"]

WEIGHTINGS: tuple[Weighting, ...] = ("mass", "equal", "latent")
"""mass: P(l, j, t) = a / sum a. equal: every active (token, latent) pair has mass 1. latent: every live latent counts
once, with its own variance by mass."""


@dataclass(frozen=True, kw_only=True)
class LayerMoments:
    """Additive sums of the distribution of latents over layers."""

    layers: NDArray[np.int64]
    """[L] the model's block indices of the layers, increasing."""
    groups: NDArray[np.int64]
    """[G] ids of the document groups that are present, increasing."""
    n_tokens: NDArray[np.int64]
    """[G] tokens added."""
    sums: NDArray[np.float64]
    """[G, 8, M] sums over tokens of m, m mu, m v, m mu^2 (M0, M1, M2 - Q and Q), then of 1, mu, v, mu^2: the same with
    the mass of every pair set to 1. mu is centred."""
    counts: NDArray[np.int64]
    """[M, L] (token, layer) pairs at which a latent fired."""
    totals: NDArray[np.float64]
    """[M, L] sum of activations."""
    histograms: NDArray[np.float64]
    """[G, 2, 4, L]: total weight of (token, latent) pairs, by mass and then counting 1 each, per value of
    n_layers_active and run_length (n at position n - 1), onset and offset (at the layer's position)."""
    run_sums: NDArray[np.float64]
    """[G, 2, 3]: for the same two weightings, weighted sums of n_runs, of contiguity and of n_runs == 1."""
    latent_sums: NDArray[np.float64]
    """[M, 5]: sums over a latent's pairs of n_layers_active, onset, offset (centred), run_length and contiguity."""
    errors: NDArray[np.float64]
    """[G, 3, L] sums of |x - x_hat|^2, |x - m|^2 (m: `analysis.quality`) and active latents, for intervals."""

    @classmethod
    def zeros(cls, layers: Sequence[int], n_latents: int, groups: Sequence[int] = (0,)) -> "LayerMoments":
        """Empty sums; `add` takes tokens of these document groups only."""
        n_layers, n_groups = len(layers), len(set(groups))
        return cls(
            layers=np.asarray(layers, np.int64),
            groups=np.unique(np.asarray(groups, np.int64)),
            n_tokens=np.zeros(n_groups, np.int64),
            sums=np.zeros((n_groups, 8, n_latents)),
            counts=np.zeros((n_latents, n_layers), np.int64),
            totals=np.zeros((n_latents, n_layers)),
            histograms=np.zeros((n_groups, 2, 4, n_layers)),
            run_sums=np.zeros((n_groups, 2, 3)),
            latent_sums=np.zeros((n_latents, 5)),
            errors=np.zeros((n_groups, 3, n_layers)),
        )

    @property
    def n_latents(self) -> int:
        return len(self.counts)

    @property
    def centre(self) -> float:
        """The layer that sums are centred at: (n_layers - 1) / 2 where all layers are stored."""
        return float(self.layers[0] + self.layers[-1]) / 2

    def add(
        self,
        values: NDArray[np.floating],
        indices: NDArray[np.int64],
        group: NDArray[np.int64] | None = None,
        rows: NDArray[np.int64] | None = None,
        errors: NDArray[np.float64] | None = None,
    ) -> None:
        """Add whole tokens, in place: finite values [T, L, k] >= 0, indices [T, L, k], group [T] (default: the first).

        rows [T, L]: which of the T * L vectors, counted token by token, to use at each token and layer; by default
        its own (`analysis.baselines.nulls` permutes them). errors [3, T, L]: what `LayerQuality.add` returned for these
        tokens.
        """
        from analysis import loops

        n_tokens, n_layers, k = values.shape
        row = np.zeros(n_tokens, np.int64) if group is None else np.searchsorted(self.groups, group)
        rows = np.arange(n_tokens * n_layers).reshape(n_tokens, n_layers) if rows is None else rows
        codes = [np.ascontiguousarray(part).reshape(-1, k) for part in (values, indices)]
        sums = self.sums, self.counts, self.totals, self.histograms, self.run_sums, self.latent_sums
        loops.add_codes(*codes, rows, self.layers - self.centre, row, *sums)
        np.add.at(self.n_tokens, row, 1)
        if errors is not None:
            np.add.at(self.errors, row, np.moveaxis(errors, 0, 1))

    @staticmethod
    def merged(parts: Sequence["LayerMoments"]) -> "LayerMoments":
        """The sum of `parts`, added in their order."""
        first = parts[0]
        groups = np.unique(np.concatenate([part.groups for part in parts]))
        total = LayerMoments.zeros(first.layers.tolist(), first.n_latents, groups.tolist())
        for part in parts:
            rows = np.searchsorted(groups, part.groups)
            for name in ("n_tokens", "sums", "histograms", "run_sums", "errors"):
                getattr(total, name)[rows] += getattr(part, name)
            for name in ("counts", "totals", "latent_sums"):
                getattr(total, name)[:] += getattr(part, name)
        return total

    def pooled(self) -> NDArray[np.float64]:
        """[8, M] the sums over all document groups."""
        return self.sums.sum(axis=0)


class Variances(NamedTuple):
    """The law of total variance of the layer L under one weighting, in layers squared; scalars, or [replicates]."""

    within_token: NDArray[np.float64]
    """E[Var(L | J, T)], the token-level variance."""
    between_tokens: NDArray[np.float64]
    """E[Var(E[L | J, T] | J)]."""
    between_latents: NDArray[np.float64]
    """Var(E[L | J])."""

    @property
    def aggregate(self) -> NDArray[np.float64]:
        """E[Var(L | J)]: what the per-latent tables show."""
        return self.within_token + self.between_tokens

    @property
    def total(self) -> NDArray[np.float64]:
        """Var(L)."""
        return self.aggregate + self.between_latents

    @property
    def aggregate_over_token(self) -> NDArray[np.float64]:
        """Aggregate variance / token-level variance, at least 1; NaN where the latter is 0."""
        return ratio(self.aggregate, self.within_token)


VARIANCE_NAMES = ("within_token", "between_tokens", "between_latents", "total", "aggregate", "aggregate_over_token")
"""The reported attributes of `Variances`, in this order."""


def variances(sums: NDArray[np.float64], weighting: Weighting) -> Variances:
    """The decomposition from pooled sums [..., 8, M]; leading axes (replicates) are kept. Zero if no latent is live."""
    rows = sums[..., 4:, :] if weighting == "equal" else sums[..., :4, :]
    weight, linear, spread, square = np.moveaxis(rows, -2, 0)  # each [..., M]
    live = weight > 0
    mean = ratio_or_zero(linear, weight, live)
    # Rounding can take this difference of nearly equal numbers below zero, but as layers are centred only by a few ulp
    # of `square`.
    between = square - linear * mean
    assert np.all(between >= -1e-9 * square), "between-token sums should not be negative"
    between = np.maximum(between, 0.0)
    if weighting == "latent":
        spread, between = ratio_or_zero(spread, weight, live), ratio_or_zero(between, weight, live)
        weight = live.astype(np.float64)
    total = weight.sum(axis=-1)
    some = total > 0
    centre = ratio_or_zero((weight * mean).sum(axis=-1), total, some)
    between_latents = (weight * (mean - centre[..., None]) ** 2).sum(axis=-1)
    return Variances(
        ratio_or_zero(spread.sum(axis=-1), total, some),
        ratio_or_zero(between.sum(axis=-1), total, some),
        ratio_or_zero(between_latents, total, some),
    )


def variance_numbers(pooled: NDArray[np.float64]) -> dict[str, dict[str, float | None]]:
    """weighting -> name (`VARIANCE_NAMES`) -> number, None where undefined."""
    parts = {weighting: variances(pooled, weighting) for weighting in WEIGHTINGS}
    return {w: {name: defined(getattr(part, name)) for name in VARIANCE_NAMES} for w, part in parts.items()}
