"""When a latent switches on and off along the layers of one token: sums that add over tokens, and what they give.

A (token, latent) pair is a latent that is active (> 0) at one or more layers of the token. Each pair has

    n_layers_active   layers at which it is active
    onset, offset     first and last such layer
    run_length        layers of its longest run: analysed layers in a row at which it is active
    n_runs            runs; 1 if it switches on once and stays on until it switches off
    contiguity        run_length / layers from onset to offset; 1 if there is no gap

`LayerMoments` keeps the sums, per document group, so that intervals come from the same replicates as those of the
variances. Where a store holds only some of the model's layers, "in a row" refers to those.

Shapes: G document groups, L layers, M n_latents.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.moments import LayerMoments
from analysis.quality import defined

PairWeighting = Literal["mass", "equal"]

PAIR_WEIGHTINGS: tuple[PairWeighting, ...] = ("mass", "equal")
"""The weight of a pair: its activation mass, or 1."""

DISTRIBUTIONS = ("n_layers_active", "run_length", "onset", "offset")
"""Rows of `LayerMoments.histograms`, in order."""


class PersistenceNumbers(NamedTuple):
    """Means over pairs under one weighting; arrays of any shape (replicates). NaN where there is no such pair."""

    n_layers_active: NDArray[np.float64]
    onset: NDArray[np.float64]
    """In the model's layer numbers, as `offset`."""
    offset: NDArray[np.float64]
    run_length: NDArray[np.float64]
    n_runs: NDArray[np.float64]
    contiguity: NDArray[np.float64]
    unbroken: NDArray[np.float64]
    """Share of pairs with one run, without a gap."""
    single_layer: NDArray[np.float64]
    """Share of pairs active at one layer only, which are trivially unbroken and have contiguity 1."""
    contiguity_multi: NDArray[np.float64]
    """Contiguity of the other pairs."""
    unbroken_multi: NDArray[np.float64]
    """Share of the other pairs with one run."""
    stays_on: NDArray[np.float64]
    """Share of the layers at which a pair is active (except the last analysed layer) with it active at the next too."""


def persistence_numbers(
    histograms: NDArray[np.float64], run_sums: NDArray[np.float64], layers: NDArray[np.int64], weighting: PairWeighting
) -> PersistenceNumbers:
    """Numbers from histograms [..., 2, 4, L] and run_sums [..., 2, 3], summed over groups; layers [L]: the model's."""
    w = PAIR_WEIGHTINGS.index(weighting)
    active, run, onset, offset = np.moveaxis(histograms[..., w, :, :], -2, 0)  # each [..., L]
    runs, contiguity, unbroken = np.moveaxis(run_sums[..., w, :], -1, 0)
    weight, single = active.sum(axis=-1), active[..., 0]
    n, numbers = np.arange(1.0, active.shape[-1] + 1), layers.astype(np.float64)
    layers_on = active @ n
    return PersistenceNumbers(
        n_layers_active=_mean(layers_on, weight),
        onset=_mean(onset @ numbers, weight),
        offset=_mean(offset @ numbers, weight),
        run_length=_mean(run @ n, weight),
        n_runs=_mean(runs, weight),
        contiguity=_mean(contiguity, weight),
        unbroken=_mean(unbroken, weight),
        single_layer=_mean(single, weight),
        contiguity_multi=_mean(contiguity - single, weight - single, weight),
        unbroken_multi=_mean(unbroken - single, weight - single, weight),
        # n active layers in r runs give n - r pairs of adjacent layers that are both active.
        stays_on=_mean(layers_on - runs, layers_on - offset[..., -1], layers_on),
    )


PERSISTENCE_NAMES = PersistenceNumbers._fields
"""What is reported, in this order."""


def distributions(moments: LayerMoments) -> dict[str, dict[str, list[float]]]:
    """weighting -> name (`DISTRIBUTIONS`) -> shares [L] over all document groups that sum to 1; zeros without pairs."""
    histograms = zip(PAIR_WEIGHTINGS, moments.histograms.sum(axis=0), strict=True)  # each [4, L]
    shares = {weighting: rows / (rows[0].sum() or 1.0) for weighting, rows in histograms}
    return {w: dict(zip(DISTRIBUTIONS, rows.tolist(), strict=True)) for w, rows in shares.items()}


def persistence_summary(moments: LayerMoments) -> dict[str, dict[str, Any]]:
    """weighting -> name (`PERSISTENCE_NAMES`) -> number over all document groups, None where undefined."""
    sums = moments.histograms.sum(axis=0), moments.run_sums.sum(axis=0), moments.layers
    means = {weighting: persistence_numbers(*sums, weighting)._asdict() for weighting in PAIR_WEIGHTINGS}
    return {w: {name: defined(value) for name, value in numbers.items()} for w, numbers in means.items()}


class LatentPersistence(NamedTuple):
    """Means over the tokens at which a latent fired, each counting once; [M], NaN if it never fired."""

    layers_per_token: NDArray[np.float64]
    onset: NDArray[np.float64]
    """In the model's layer numbers, as `offset`."""
    offset: NDArray[np.float64]
    run_length: NDArray[np.float64]
    contiguity: NDArray[np.float64]


def latent_persistence(moments: LayerMoments) -> LatentPersistence:
    """When each latent is on, from its sums over all document groups."""
    pairs = moments.pooled()[4]
    active, onset, offset, run, contiguity = (_mean(column, pairs) for column in moments.latent_sums.T)
    return LatentPersistence(active, onset + moments.centre, offset + moments.centre, run, contiguity)


def _mean(total: NDArray, weight: NDArray, scale: NDArray | float = 0.0) -> NDArray[np.float64]:
    """total / weight; NaN where weight is 0, or only rounding, if it is a difference of sums as large as `scale`."""
    some = np.asarray(weight) > 1e-12 * np.asarray(scale)
    return np.divide(total, weight, out=np.full_like(np.asarray(total), np.nan), where=some)
