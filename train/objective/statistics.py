"""Statistics of the training vectors that stay fixed for a run: b_pre's start and the loss's denominators.

Computed once, from a seeded sample of training rows spread over all layers (the stream of a loader with a seed of its
own), then kept in the checkpoint: a resumed run uses the very same numbers.

Shapes: N vectors, D d_model, L layers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from residscope.errors import IncompatibleError
from train.data import Vectors
from train.model import Standardized, standardize_by_layer
from train.objective.losses import LayerMoments

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

    layer_mean: Tensor | None = None
    """float64 [L, D]: mean_l, in raw space."""

    @property
    def layer_scale(self) -> Tensor:
        """float64 [L]: what gives the deviations of a layer's vectors a mean square of 1 in each dimension."""
        assert self.layer_mean is not None
        return (self.raw / self.layer_mean.shape[1]).sqrt()


def require_finite(x: Tensor, layer: Tensor, layers: Sequence[int]) -> None:
    """`IncompatibleError` where a value of `x` [N, D] is not finite, with its layer, one of `layers` by `layer` [N]."""
    finite = x.isfinite().all(dim=1)  # [N]
    if not finite.all():
        raise IncompatibleError(
            f"layer {layers[int(layer[~finite][0])]}: the store holds values there that are not finite numbers, which "
            "`harvest` never writes: look with `residscope verify`, harvest anew, or leave the layer out with --layers"
        )


class StatisticsSums:
    """Gathers the statistics of one run; several can watch one stream, so that it is read once for all of them."""

    def __init__(self, standardize: Callable[[Tensor], Standardized] | None, layers: tuple[int, ...]) -> None:
        """standardize: the run's own, or None where it is by layer, with the very numbers that are gathered here;
        layers: the model's numbers of the layers it is trained on, for errors."""
        self._standardize = standardize
        self._layers = layers
        self._standardized: LayerMoments | None = None
        self._raw: LayerMoments | None = None
        self._sample: list[Vectors] = []  # standardised, or raw where that is not known before the end
        self._seen = 0

    def add(self, x: Tensor, layer: Tensor) -> None:
        """Count raw vectors `x` [N, D] of layers `layer` int64 [N]; `IncompatibleError` where a value is not finite."""
        require_finite(x, layer, self._layers)
        x_std = x if self._standardize is None else self._standardize(x).x
        if self._standardized is None or self._raw is None:
            self._standardized = self._raw = LayerMoments.zeros(len(self._layers), x.shape[1], x.device)
        self._standardized = self._standardized.add(x_std, layer)
        self._raw = self._raw.add(x, layer)
        if self._seen < MEDIAN_VECTORS:
            part = slice(MEDIAN_VECTORS - self._seen)
            self._sample.append(Vectors(x_std[part], layer[part]))
        self._seen += len(x)

    def finish(self) -> FixedStatistics:
        """The statistics; raises `IncompatibleError` naming a layer whose vectors do not vary."""
        standardized, raw = self._standardized, self._raw
        assert standardized is not None
        assert raw is not None
        for position, moments in ((p, m) for m in (standardized, raw) for p in range(len(self._layers))):
            if not moments.deviation[position] > 0:
                raise IncompatibleError(
                    f"layer {self._layers[position]}: {int(moments.vectors[position])} training vectors, and they do "
                    "not vary; FVU has no meaning there: harvest more text, or leave the layer out with --layers"
                )
        variance = raw.deviation / raw.vectors
        found = FixedStatistics(raw.mean[0], standardized.deviation / standardized.vectors, variance, raw.mean)
        x, layer = (torch.cat(parts) for parts in zip(*self._sample, strict=True))
        if self._standardize is None:
            mean, scale = raw.mean.to(x.dtype), found.layer_scale.to(x.dtype)
            x = standardize_by_layer(x, layer, mean, scale).x
            found = found._replace(standardized=variance / found.layer_scale.square())  # d_model, by its definition
        return found._replace(b_pre=geometric_median(x))


def fixed_statistics(
    batches: Iterable[Vectors], standardize: Callable[[Tensor], Standardized] | None, layers: tuple[int, ...]
) -> FixedStatistics:
    """Statistics of the first rows of `batches`; raises `IncompatibleError` naming a layer whose vectors do not vary.

    The bias is taken in the space in which it is used: on standardised vectors, never on raw ones.
    """
    sums = StatisticsSums(standardize, layers)
    for x, layer in sample(batches):
        sums.add(x, layer)
    return sums.finish()


def sample(batches: Iterable[Vectors]) -> Iterator[Vectors]:
    """The batches that statistics are taken over: the first `DENOMINATOR_VECTORS` vectors, to a whole batch."""
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch.x)
        if seen >= DENOMINATOR_VECTORS:
            return


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
