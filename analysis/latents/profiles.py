"""Kinds of latents by their layer profile P(layer | latent), by rules that can be said in a sentence each.

    persistent   2^entropy, the number of layers that an even profile of this entropy has, is at least two thirds of all
    bimodal      two groups of layers with a valley between them: some layer holds at most half of the highest share
                 before it and of the highest after it, at least a quarter of the mass lies on either side of it, and
                 the mean layers of the two sides are at least a quarter of all layers apart
    early, middle, late
                 the mean layer lies in the first, second or last third of the depth

The first rule that holds decides; a latent that never fired has no kind. Depth is the position among the analysed
layers, 0 at the first and 1 at the last. Shares of activation mass decide, not counts. Not here: how latents are alike
(`analysis.latents.redundancy`).

Shapes: M n_latents, L layers.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

KINDS = ("early", "middle", "late", "persistent", "bimodal")

PERSISTENT_SHARE = 2 / 3
"""Of all layers, as 2^entropy."""

VALLEY = 0.5
"""Highest share of the lower peak that a valley may hold."""

SIDE_MASS = 0.25
"""Least mass on either side of the valley."""

SIDE_DISTANCE = 0.25
"""Least distance of the two sides' mean layers, as a share of all layers."""


def profile_kinds(probs: NDArray[np.float64], entropy: NDArray[np.float64]) -> Sequence[str | None]:
    """Kind of each latent, from its profile [M, L] (rows sum to 1, or to 0: no kind) and its entropy in bits [M]."""
    n_layers = probs.shape[1]
    live = probs.sum(axis=1) > 0
    depth = probs @ np.linspace(0, 1, n_layers)
    kinds = np.where(depth < 1 / 3, "early", np.where(depth > 2 / 3, "late", "middle")).astype(object)
    kinds[_bimodal(probs)] = "bimodal"
    persistent = np.exp2(np.where(live, entropy, 0.0)) >= PERSISTENT_SHARE * n_layers * (1 - 1e-9)
    kinds[persistent] = "persistent"
    kinds[~live] = None
    return kinds.tolist()


def _bimodal(probs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[M] whether some layer is a valley between two sides."""
    n_layers = probs.shape[1]
    position = np.arange(n_layers)
    found = np.zeros(len(probs), bool)
    mass, moment = np.cumsum(probs, axis=1), np.cumsum(probs * position, axis=1)
    for v in range(1, n_layers - 1):
        before, after = probs[:, :v], probs[:, v + 1 :]
        left, right = mass[:, v - 1], mass[:, -1] - mass[:, v]
        sides = (left >= SIDE_MASS) & (right >= SIDE_MASS)
        valley = probs[:, v] <= VALLEY * np.minimum(before.max(axis=1), after.max(axis=1))
        with np.errstate(invalid="ignore", divide="ignore"):
            distance = (moment[:, -1] - moment[:, v]) / right - moment[:, v - 1] / left
            found |= sides & valley & (distance >= SIDE_DISTANCE * n_layers)
    return found
