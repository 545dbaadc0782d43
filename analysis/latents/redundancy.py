"""How similar the latents of a dictionary are, and whether it has learnt the same direction once per layer.

For the live latents, with unit decoder rows:

    neighbours    the five other live latents with the highest cosines
    nearest       the first of them; MMCS is the mean of its cosine over live latents
    parallel      pairs whose cosine is above a threshold
    redundant     parallel pairs with disjoint layer profiles: sum_l min(P(l | a), P(l | b)) below a tenth

Cosines are computed for a tile of rows and all later rows at a time, so memory does not grow with the square of the
number of latents. Of the parallel pairs, only the first `MAX_PAIRS` in the order of `Pairs` are kept.

Shapes: J live latents, D d_model, L layers, P pairs. Tested in tests/analysis/latents/test_table.py.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

MAX_OVERLAP = 0.1
"""Profiles with less overlap than this are disjoint."""

N_NEIGHBOURS = 5
"""Nearest latents kept for each latent."""

MAX_PAIRS = 10_000
"""Pairs kept."""

TILE_BYTES = 64 * 2**20
"""Bytes of the float32 cosines held at once."""

_PAIRS_AT_ONCE = 2**18
"""Pairs whose profiles are compared at once."""


class Pairs(NamedTuple):
    """Parallel pairs of latents a < b, redundant ones first, then by falling cosine; each column [P]."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    cosine: NDArray[np.float64]
    overlap: NDArray[np.float64]
    """Overlap of the two profiles, 0 to 1."""


class Redundancy(NamedTuple):
    threshold: float
    """Cosine above which a pair is parallel."""
    pairs: Pairs
    """At most `MAX_PAIRS`."""
    n_parallel: int
    n_redundant: int
    n_redundant_latents: int
    """Latents that are in a redundant pair."""
    neighbours: NDArray[np.int64]
    """[M, 5] the nearest other live latents, nearest first; -1 for a dead latent, or if there are fewer."""
    neighbour_cosines: NDArray[np.float64]
    """[M, 5] their cosines; NaN if there is no such latent."""

    @property
    def mmcs(self) -> float:
        """Mean over live latents of the highest cosine to another live latent; NaN with fewer than two."""
        known = self.neighbours[:, 0] >= 0
        return float(self.neighbour_cosines[known, 0].mean()) if known.any() else float("nan")


def find_redundancy(W_dec: torch.Tensor, probs: NDArray[np.float64], threshold: float) -> Redundancy:
    """From decoder rows [M, D] and profiles [M, L]; latents that never fired, whose profiles are 0, are left out."""
    live = np.flatnonzero(probs.sum(axis=1) > 0)
    rows = torch.nn.functional.normalize(W_dec.detach()[torch.from_numpy(live)].float(), dim=1)  # [J, D]
    n = len(live)
    best = torch.full((n, N_NEIGHBOURS), -torch.inf)
    near = torch.full((n, N_NEIGHBOURS), -1, dtype=torch.int64)
    pairs = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))
    n_parallel = n_redundant = 0
    in_redundant = np.zeros(len(probs), bool)
    start = 0
    while start < n:
        stop = min(n, start + max(1, TILE_BYTES // (4 * (n - start))))
        size = stop - start
        cosine = rows[start:stop] @ rows[start:].T  # [t, n - start]
        own = cosine[:, :size]
        own.masked_fill_(torch.eye(size, dtype=torch.bool), -torch.inf)
        value, index = cosine.topk(min(N_NEIGHBOURS, n - start), dim=1)
        _keep_nearest(best[start:stop], near[start:stop], value, index + start)
        if stop < n:  # the only time that later rows meet the rows of this tile
            value, index = cosine[:, size:].topk(min(N_NEIGHBOURS, size), dim=0)
            _keep_nearest(best[stop:], near[stop:], value.T, index.T + start)
        own.masked_fill_(torch.ones(size, size, dtype=torch.bool).tril(), -torch.inf)
        found = (cosine > threshold).nonzero()
        for part in found.split(_PAIRS_AT_ONCE):
            a, b = live[(part[:, 0] + start).numpy()], live[(part[:, 1] + start).numpy()]
            overlap = np.minimum(probs[a], probs[b]).sum(axis=1)
            disjoint = overlap < MAX_OVERLAP
            n_parallel += len(part)
            n_redundant += int(disjoint.sum())
            in_redundant[a[disjoint]] = in_redundant[b[disjoint]] = True
            values = cosine[part[:, 0], part[:, 1]].double().numpy()
            pairs = _foremost(pairs, Pairs(a, b, values, overlap))
        start = stop
    known = torch.isfinite(best)  # a latent's cosine with itself was set to -inf
    neighbours = np.full((len(probs), N_NEIGHBOURS), -1)
    cosines = np.full((len(probs), N_NEIGHBOURS), np.nan)
    neighbours[live] = np.where(known.numpy(), live[near.numpy()] if n else -1, -1)
    cosines[live] = torch.where(known, best, torch.nan).double().numpy()
    return Redundancy(threshold, pairs, n_parallel, n_redundant, int(in_redundant.sum()), neighbours, cosines)


def _keep_nearest(best: torch.Tensor, near: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> None:
    """Merge newly found cosines and latents [r, at most 5] into those kept so far [r, 5], in place."""
    value, place = torch.cat([best, value], dim=1).topk(best.shape[1], dim=1)
    near.copy_(torch.cat([near, index], dim=1).gather(1, place))
    best.copy_(value)


def _foremost(*parts: Pairs) -> Pairs:
    a, b, cosine, overlap = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((b, a, -cosine, overlap >= MAX_OVERLAP))[:MAX_PAIRS]
    return Pairs(a[order], b[order], cosine[order], overlap[order])
