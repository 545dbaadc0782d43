"""Statistics of the training vectors that stay fixed for a run: b_pre's start and the loss's denominators.

Computed once, from a seeded sample of training rows spread over all layers (the stream of a loader with a seed of its
own), then kept in the checkpoint: a resumed run uses the very same numbers.

Shapes: N vectors, D d_model, L layers.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from store.errors import ResidscopeError
from train.batches import Vectors
from train.losses import LayerMoments
from train.sae import Standardized

DENOMINATOR_VECTORS = 2**16
"""Vectors that the denominators are taken over, at most: two thousand of each layer where there are 30."""

MEDIAN_VECTORS = 2**15
"""Vectors that the geometric median is taken over, at most."""


class FixedStatistics(NamedTuple):
    """What a run needs to know of its data beforehand."""

    b_pre: Tensor
    """float32 [D]: geometric median of the standardised vectors of all layers."""

    standardized: Tensor
    """float64 [L]: E|x_std - mean_l|^2."""

    raw: Tensor
    """float64 [L]: E|x - mean_l|^2 of the same vectors in raw space."""


def fixed_statistics(
    batches: Iterable[Vectors], standardize: Callable[[Tensor], Standardized], layers: tuple[int, ...]
) -> FixedStatistics:
    """Statistics of the first rows of `batches`; raises `ResidscopeError` naming a layer whose vectors do not vary.

    The bias is taken in the space in which it is used: on standardised vectors, never on raw ones.
    """
    standardized = raw = None
    sample: list[Tensor] = []
    seen = 0
    for x, layer in batches:
        x_std = standardize(x).x
        if standardized is None or raw is None:
            standardized = raw = LayerMoments.zeros(len(layers), x.shape[1], x.device)
        standardized = standardized.add(x_std, layer)
        raw = raw.add(x, layer)
        if seen < MEDIAN_VECTORS:
            sample.append(x_std[: MEDIAN_VECTORS - seen])
        seen += len(x)
        if seen >= DENOMINATOR_VECTORS:
            break
    assert standardized is not None
    assert raw is not None
    for position, moments in ((p, m) for m in (standardized, raw) for p in range(len(layers))):
        if not moments.deviation[position] > 0:
            raise ResidscopeError(
                f"layer {layers[position]}: {int(moments.vectors[position])} training vectors, and they do not vary; "
                "FVU has no meaning there: harvest more text, or leave the layer out with --layers"
            )
    return FixedStatistics(
        geometric_median(torch.cat(sample)),
        standardized.deviation / standardized.vectors,
        raw.deviation / raw.vectors,
    )


def geometric_median(x: Tensor, *, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point [D] with the least summed distance to the rows of `x` [N, D], by Weiszfeld's iteration from the mean.

    Stops when a move is below `tolerance` of the rows' mean distance. A row that is met exactly weighs as one at a
    millionth of that distance, which keeps the weights finite.
    """
    median = x.mean(dim=0)
    for _ in range(iterations):
        distance = (x - median).norm(dim=1)
        scale = distance.mean()
        if scale == 0:
            break
        weight = distance.clamp_min(1e-6 * scale).reciprocal()
        moved = (weight @ x) / weight.sum()
        converged = (moved - median).norm() <= tolerance * scale
        median = moved
        if converged:
            break
    return median
