"""How activation mass spreads over layers: sums that add over tokens, and the variances that they give.

With a[t, l, j] >= 0 the activation of latent j at token t and layer l, probabilities are proportional to activation
mass, and the law of total variance splits the variance of the layer L exactly into three parts: within one token of one
latent, between the tokens of one latent, and between latents. `LayerMoments` keeps, per latent, what those parts need;
it adds over tokens, so it merges across shards, workers and document groups in any order and grouping. Whole tokens
must be added: every layer of a token in one call. The same pass over the codes fills the sums of
`analysis.persistence`.

All sums are float64 (counts int64) with layers centred; nothing that could cancel is got by subtracting large sums
where a sum of squares can be had. A value that is negative or not finite raises. Not here: encoding
(`analysis.encoder`), reading (`analysis.jobs`), intervals (`analysis.uncertainty`).

Shapes: T tokens, L layers, k active latents a vector, M n_latents, G document groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.persistence import LatentPersistence, Persistence, latent_persistence

Weighting = Literal["mass", "equal", "latent"]

WEIGHTINGS: tuple[Weighting, ...] = ("mass", "equal", "latent")
"""mass: P(l, j, t) = a / sum a. equal: every active (token, latent) pair has mass 1. latent: every live latent counts
once, its own variance by mass."""

N_SUMS = 8
"""Sums kept per latent and document group; their order is that of the constants in `analysis.sum_loops`."""


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
    """[G, 8, M]: for (token, latent) pairs of mass m, mean layer mu (centred) and variance v over layers, the sums over
    tokens of m, m mu, m v, m mu^2, 1, mu, v, mu^2: M0, M1, M2 - Q and Q of the method, then the same with every pair's
    mass set to 1."""

    counts: NDArray[np.int64]
    """[M, L] (token, layer) pairs at which a latent fired."""

    totals: NDArray[np.float64]
    """[M, L] sum of activations."""

    persistence: Persistence
    """Sums of when latents switch on and off, for the same groups."""

    @classmethod
    def zeros(cls, layers: Sequence[int], n_latents: int, groups: Sequence[int] = (0,)) -> "LayerMoments":
        """No tokens yet; `add` takes tokens of these document groups only."""
        return cls(
            layers=np.asarray(layers, np.int64),
            groups=np.unique(np.asarray(groups, np.int64)),
            n_tokens=np.zeros(len(set(groups)), np.int64),
            sums=np.zeros((len(set(groups)), N_SUMS, n_latents)),
            counts=np.zeros((n_latents, len(layers)), np.int64),
            totals=np.zeros((n_latents, len(layers))),
            persistence=Persistence.zeros(len(layers), n_latents, len(set(groups))),
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
    ) -> None:
        """Add whole tokens, in place: values [T, L, k] >= 0, indices [T, L, k], group [T] (default: all in the first).

        rows [T, L]: which of the T * L vectors, counted token by token, is taken to stand at a token and layer; default
        each at its own (`analysis.baselines.nulls` has others). Raises `ValueError` on a value that is negative,
        infinite or not a number, naming token and layer.
        """
        from analysis import sum_loops as compiled

        values = np.ascontiguousarray(values)
        bad = compiled.first_bad(values)
        if bad >= 0:
            token, layer, _ = np.unravel_index(bad, values.shape)
            raise ValueError(
                f"activation {values.reshape(-1)[bad]} at token {token} of the tile, layer {self.layers[layer]}: "
                "it should be finite and at least 0; look at the store with `residscope verify`"
            )
        n_tokens, n_layers, k = values.shape
        row = np.zeros(n_tokens, np.int64) if group is None else np.searchsorted(self.groups, group)
        own = np.arange(n_tokens * n_layers).reshape(n_tokens, n_layers) if rows is None else rows
        compiled.add_codes(
            values.reshape(-1, k),
            np.ascontiguousarray(indices).reshape(-1, k),
            own,
            self.layers - self.centre,
            row,
            self.sums,
            self.counts,
            self.totals,
            self.persistence.histograms,
            self.persistence.shape,
            self.persistence.latents,
        )
        np.add.at(self.n_tokens, row, 1)

    @staticmethod
    def merged(parts: Sequence["LayerMoments"]) -> "LayerMoments":
        """The sum of `parts`, added in their order."""
        first = parts[0]
        groups = np.unique(np.concatenate([part.groups for part in parts]))
        total = LayerMoments.zeros(first.layers.tolist(), first.n_latents, groups.tolist())
        for part in parts:
            rows = np.searchsorted(groups, part.groups)
            total.n_tokens[rows] += part.n_tokens
            total.sums[rows] += part.sums
            np.add(total.counts, part.counts, out=total.counts)
            np.add(total.totals, part.totals, out=total.totals)
            total.persistence.add_rows(part.persistence, rows)
        return total

    def pooled(self) -> NDArray[np.float64]:
        """[8, M] the sums over all document groups."""
        return self.sums.sum(axis=0)


class Variances(NamedTuple):
    """The law of total variance of the layer L under one weighting; unit: layers squared. Floats, or arrays over
    replicates."""

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
        """How many times the token-level variance the aggregate variance is, at least 1; NaN where the token-level
        variance is 0."""
        positive = self.within_token > 0
        return np.divide(self.aggregate, self.within_token, out=np.full_like(self.within_token, np.nan), where=positive)


VARIANCE_NAMES = ("within_token", "between_tokens", "between_latents", "total", "aggregate", "aggregate_over_token")
"""What is reported of a `Variances`, in this order."""


def variances(sums: NDArray[np.float64], weighting: Weighting) -> Variances:
    """The decomposition from pooled sums [..., 8, M]; leading axes (replicates) are kept. All zero where no latent is
    live."""
    rows = sums[..., 4:, :] if weighting == "equal" else sums[..., :4, :]
    weight, linear, spread, square = np.moveaxis(rows, -2, 0)  # each [..., M]
    live = weight > 0
    mean = _ratio(linear, weight, live)
    # Rounding alone can take this difference of nearly equal numbers below zero; layers are centred, so by no more than
    # a few ulp of `square`.
    between = square - linear * mean
    assert np.all(between >= -1e-9 * square), "between-token sums should not be negative"
    between = np.maximum(between, 0.0)
    if weighting == "latent":
        spread, between = _ratio(spread, weight, live), _ratio(between, weight, live)
        weight = live.astype(np.float64)
    total = weight.sum(axis=-1)
    some = total > 0
    centre = _ratio((weight * mean).sum(axis=-1), total, some)
    between_latents = (weight * (mean - centre[..., None]) ** 2).sum(axis=-1)
    return Variances(
        _ratio(spread.sum(axis=-1), total, some),
        _ratio(between.sum(axis=-1), total, some),
        _ratio(between_latents, total, some),
    )


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[Any], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.divide(numerator, denominator, out=np.zeros_like(np.asarray(numerator)), where=where)


class CompatVariances(NamedTuple):
    """The reference's numbers. They are called variances there but are none where a latent is silent: see
    `mlsae_compat`."""

    exp_var_l_tf: float
    exp_var_l_f: float
    var_l: float
    rel_var_f: float | None
    """exp_var_l_f / var_l; None if var_l is 0."""

    rel_var_t: float | None
    """exp_var_l_tf / exp_var_l_f, the reference's share of token-level variance; None if exp_var_l_f is 0."""


def mlsae_compat(moments: LayerMoments) -> CompatVariances:
    """What the reference implementation (tim-lawson/mlsae, `analysis/variances.py`) computes, from the same sums.

    p[l, t, j] = a / sum_l a, 0 where latent j is silent at token t; V(p) = sum_l l^2 p - (sum_l l p)^2 with the model's
    layer numbers, from 0; exp_var_l_tf = mean_{t,j} V(p), exp_var_l_f = mean_j V(mean_t p), var_l = V(mean_{t,j} p). A
    silent token stays in the means as mass 0, so the p that V sees do not sum to 1. The reference takes the ratios per
    batch of its own data loader and averages them; here all tokens are one batch, because a number should not depend on
    a batch size, nor on the shards of a store. The difference is small: on a made-up process, batches of 2,048 tokens
    gave a rel_var_t of 0.0917 where all 9,563 tokens give 0.0910.
    """
    _, _, _, _, pairs, linear, spread, square = moments.pooled()
    cells = float(moments.n_tokens.sum())
    if cells == 0:
        return CompatVariances(0.0, 0.0, 0.0, None, None)
    c = moments.centre
    first = (linear + c * pairs) / cells  # [M] sum_l l mean_t p
    second = (spread + square + 2 * c * linear + c * c * pairs) / cells  # [M] sum_l l^2 mean_t p
    exp_var_l_tf = float(spread.mean()) / cells
    exp_var_l_f = float((second - first**2).mean())
    var_l = float(second.mean() - first.mean() ** 2)
    return CompatVariances(
        exp_var_l_tf,
        exp_var_l_f,
        var_l,
        exp_var_l_f / var_l if var_l > 0 else None,
        exp_var_l_tf / exp_var_l_f if exp_var_l_f > 0 else None,
    )


class LatentTable(NamedTuple):
    """Per-latent statistics, all layers of a latent together; NaN where a latent never fired."""

    n_fired: NDArray[np.int64]
    """[M] (token, layer) pairs at which it fired."""

    n_tokens: NDArray[np.int64]
    """[M] tokens at which it fired at one layer at least."""

    total: NDArray[np.float64]
    """[M] summed activation."""

    mean: NDArray[np.float64]
    """[M] total / n_fired."""

    layer_mean: NDArray[np.float64]
    """[M] mean of P(layer | latent), in the model's layer numbers."""

    layer_var: NDArray[np.float64]
    """[M] population variance of P(layer | latent), layers squared."""

    within_token: NDArray[np.float64]
    """[M] Var(L | J = j, T) averaged over tokens by mass; layer_var = within_token + between_tokens."""

    between_tokens: NDArray[np.float64]
    """[M] variance by mass of the tokens' mean layers."""

    entropy: NDArray[np.float64]
    """[M] of P(layer | latent), in bits."""

    n_layers_active: NDArray[np.int64]
    """[M] layers at which it fired."""

    means: NDArray[np.float64]
    """[M, L] totals / counts, 0 where the count is 0."""

    probs: NDArray[np.float64]
    """[M, L] P(layer | latent) = totals / total; 0 for a latent that never fired."""

    persistence: LatentPersistence
    """When it switches on and off, in the mean over its tokens."""


def latent_table(moments: LayerMoments) -> LatentTable:
    """The columns that the reference publishes as its `-dists` data sets, and the latent's own two parts of
    variance."""
    sums = moments.pooled()
    total = moments.totals.sum(axis=1)
    live = total > 0
    probs = _ratio(moments.totals, total[:, None], live[:, None])
    layer_mean, layer_var = profile_mean_and_variance(probs, moments.layers)
    count = moments.counts.sum(axis=1)
    between = np.maximum(sums[3] - _ratio(sums[1] ** 2, sums[0], live), 0.0)
    log_probs = np.log2(probs, out=np.zeros_like(probs), where=probs > 0)
    dead = np.where(live, 0.0, np.nan)
    return LatentTable(
        n_fired=count,
        n_tokens=np.rint(sums[4]).astype(np.int64),
        total=total,
        mean=_ratio(total, count, live) + dead,
        layer_mean=layer_mean + dead,
        layer_var=layer_var + dead,
        within_token=_ratio(sums[2], sums[0], live) + dead,
        between_tokens=_ratio(between, sums[0], live) + dead,
        entropy=np.abs((probs * log_probs).sum(axis=1)) + dead,
        n_layers_active=(moments.counts > 0).sum(axis=1),
        means=_ratio(moments.totals, moments.counts, moments.counts > 0),
        probs=probs,
        persistence=latent_persistence(moments.persistence, sums[4], moments.centre),
    )


def profile_mean_and_variance(
    probs: NDArray[np.float64], layers: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [M] and population variance [M] of the layer under profiles `probs` [M, L]; `layers` [L] are the model's
    layer numbers."""
    mean = probs @ layers.astype(np.float64)
    deviation = layers[None, :] - mean[:, None]
    return mean, (probs * deviation**2).sum(axis=1)
