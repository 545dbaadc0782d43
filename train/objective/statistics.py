"""Statistics of the training vectors that are fixed during a run: b_pre's start and the loss's denominators.

Computed once, from a seeded sample of training rows of all layers, and kept in the checkpoint for a resume.

Shapes: N vectors, D d_model, L layers.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from residscope.errors import IncompatibleError
from train.data import TrainingData, Vectors
from train.model import TOO_LONG, standardize, standardize_by_layer
from train.model_config import Standardize

DENOMINATOR_VECTORS = 2**16
"""Vectors for the denominators, in whole batches: with 30 layers, two thousand of each."""

MEDIAN_VECTORS = 2**15
"""Most vectors for the geometric median."""

_LONGEST, _LARGEST = 1e18, 1e12
"""Limits of the distance from the mean: float32 holds the square of the first, and products of some like the second."""

_SEED = 2**31
"""Added to the run's seed, so that the sample is not the start of the training stream."""


class LayerVariance(NamedTuple):
    """Count, mean and summed squared deviation of vectors by layer, in float64; merges over batches in any order."""

    vectors: Tensor
    """int64 [L]"""
    mean: Tensor
    """[L, D]"""
    deviation: Tensor
    """[L] sum over vectors of |x - mean_l|^2, over all dimensions."""

    @classmethod
    def zeros(cls, n_layers: int, d_model: int, device: torch.device | str = "cpu") -> "LayerVariance":
        return cls(
            torch.zeros(n_layers, dtype=torch.int64, device=device),
            torch.zeros(n_layers, d_model, dtype=torch.float64, device=device),
            torch.zeros(n_layers, dtype=torch.float64, device=device),
        )

    def add(self, x: Tensor, layer: Tensor) -> "LayerVariance":
        """Itself plus vectors `x` [N, D] of layers `layer` int64 [N] (Chan et al.'s merge, free of cancellation)."""
        x = x.double()
        in_layer = torch.zeros(len(self.vectors), len(x), dtype=torch.float64, device=x.device)
        in_layer[layer, torch.arange(len(x), device=x.device)] = 1  # [L, N]; sums by layer are products with it
        added = in_layer.sum(dim=1)
        batch_mean = (in_layer @ x) / added.clamp_min(1).unsqueeze(1)
        batch_deviation = in_layer @ (x - batch_mean[layer]).square().sum(dim=1)
        total = self.vectors + added
        share = added / total.clamp_min(1)
        delta = batch_mean - self.mean
        return LayerVariance(
            total.long(),
            self.mean + delta * share.unsqueeze(1),
            self.deviation + batch_deviation + delta.square().sum(dim=1) * (self.vectors * share),
        )


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
    variance: Tensor | None = None
    """float32 [D]: mean square of the encoder's inputs, x_std - b_pre or x_std, over the vectors that b_pre is taken
    over; older checkpoints have none."""

    @property
    def layer_scale(self) -> Tensor:
        """float64 [L]: divided by it, a layer's deviations have a mean square of 1 per dimension."""
        assert self.layer_mean is not None
        return (self.raw / self.layer_mean.shape[1]).sqrt()


def require_finite(x: Tensor, layer: Tensor, layers: Sequence[int]) -> None:
    """Raise `IncompatibleError` if a value of `x` [N, D] is not finite; `layers` names the layers in `layer` [N]."""
    finite = x.isfinite().all(dim=1)  # [N]
    if not finite.all():
        raise IncompatibleError(
            f"layer {layers[int(layer[~finite][0])]}: the store contains NaN or infinite values: check it with "
            "`residscope verify`, harvest again, or leave the layer out with --layers"
        )


class View(NamedTuple):
    """Which vectors of the stream a run takes, and how; runs with equal views start from the same statistics."""

    standardize: Standardize
    """How the vectors are standardised first."""
    layers: tuple[int, ...]
    """The model's numbers of the layers trained on."""
    position: int | None = None
    """For a run on a single layer of the stream, that layer's position."""
    apply_b_dec_to_input: bool = True
    """Whether b_pre is subtracted from the encoder's input."""

    def own(self, batch: Vectors) -> Vectors:
        """The vectors of a batch that are trained on."""
        if self.position is None:
            return batch
        rows = (batch.layer == self.position).nonzero().squeeze(1)
        of_layer = None if batch.of_layer is None else batch.of_layer[[self.position]]
        return Vectors(batch.x[rows], torch.zeros_like(rows), of_layer)


def statistics_of(views: Iterable[View], data: TrainingData, window_bytes: int) -> dict[View, FixedStatistics]:
    """The statistics of each view, from a seeded sample of the data."""
    if not (views := list(dict.fromkeys(views))):
        return {}
    sample_bytes = DENOMINATOR_VECTORS * data.store.meta.d_model * data.store.meta.itemsize
    loader = data.loader(data.config.data.seed + _SEED, min(window_bytes, sample_bytes), first_part=True)
    with data.arriving(loader) as batches:
        return gather(views, batches)


def gather(views: Iterable[View], batches: Iterable[Vectors]) -> dict[View, FixedStatistics]:
    """The statistics of each view, from batches with `DENOMINATOR_VECTORS` vectors, read once for all of them; raises
    `IncompatibleError` naming a layer whose vectors are all equal or not finite."""
    sums = [_Sums(view) for view in views]
    seen = 0
    for batch in batches:
        for each in sums:
            each.add(*each.view.own(batch)[:2])
        seen += len(batch.x)
        if seen >= DENOMINATOR_VECTORS:
            break
    return {each.view: each.finish() for each in sums}


class _Sums:
    """Gathers the statistics of one view; standardising by layer needs them, and so waits until the end."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._variances: tuple[LayerVariance, LayerVariance] | None = None  # standardised, raw
        self._sampled = 0
        self._sample: list[Vectors] = []  # standardised, or raw if that waits until the end

    def add(self, x: Tensor, layer: Tensor) -> None:
        """Count raw vectors `x` [N, D] of layers `layer` int64 [N]."""
        require_finite(x, layer, self.view.layers)
        x_std = standardize(x).x if self.view.standardize == "vector" else x
        if self._variances is None:
            zeros = LayerVariance.zeros(len(self.view.layers), x.shape[1], x.device)
            self._variances = zeros, zeros
        standardized, raw = self._variances
        self._variances = standardized.add(x_std, layer), raw.add(x, layer)
        if (room := MEDIAN_VECTORS - self._sampled) > 0:
            self._sample.append(Vectors(x_std[:room], layer[:room]))
            self._sampled += min(room, len(x_std))

    def finish(self) -> FixedStatistics:
        """The statistics; raises `IncompatibleError` naming a layer whose vectors are all equal."""
        assert self._variances is not None
        (standardized, raw), layers = self._variances, self.view.layers
        by = self.view.standardize
        for position, layer in enumerate(layers):
            n = int(raw.vectors[position])
            spread, inside = ((sums.deviation[position] / n).sqrt().item() for sums in (raw, standardized))
            if by != "layer" and spread > (_LONGEST if by == "vector" else _LARGEST):
                raise IncompatibleError(f"layer {layer}: vectors {spread:.1e} from their mean {TOO_LONG}")
            if not min(spread, inside) > 0:
                raise IncompatibleError(
                    f"layer {layer}: its {n} training vectors are all equal{' once standardised' * (spread > 0)}, so "
                    "FVU is not defined: harvest more text, or leave the layer out with --layers"
                )
            # Below 0.01 if the standard deviation is less than a ninth of the epsilon added to it; otherwise about 1.
            length = (inside**2 + standardized.mean[position].square().sum().item()) / max(raw.mean.shape[1] - 1, 1)
            if (by != "layer" and inside < 1 / _LARGEST) or (by == "vector" and length < 0.01):
                what = f"too little for --standardize {by}: use --standardize layer, or leave the layer out (--layers)"
                raise IncompatibleError(f"layer {layer}: its vectors are only {spread:.1e} from their mean, {what}")
        variance = raw.deviation / raw.vectors
        found = FixedStatistics(raw.mean[0], standardized.deviation / standardized.vectors, variance, raw.mean)
        x, layer = torch.cat([part.x for part in self._sample]), torch.cat([part.layer for part in self._sample])
        if self.view.standardize == "layer":
            mean, scale = raw.mean.to(x.dtype), found.layer_scale.to(x.dtype)
            x = standardize_by_layer(x, layer, mean, scale).x
            found = found._replace(standardized=variance / found.layer_scale.square())  # d_model, by its definition
        b_pre = geometric_median(x)
        inputs = x - b_pre if self.view.apply_b_dec_to_input else x
        return found._replace(b_pre=b_pre, variance=inputs.square().mean(dim=0))


def geometric_median(x: Tensor, *, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point [D] with the least summed distance to the rows of `x` [N, D], by Weiszfeld's iteration from the mean.

    Stops when a move is below `tolerance` of the rows' mean distance. A row at the median itself is weighted as if it
    were a millionth of that distance away, which keeps the weights finite.
    """
    median = x.mean(dim=0)
    for _ in range(iterations):
        distance = (x - median).norm(dim=1)
        if (scale := distance.mean()) == 0:
            break
        weight = distance.clamp_min(1e-6 * scale).reciprocal()
        moved = (weight @ x) / weight.sum()
        if (moved - median).norm() <= tolerance * scale:
            return moved
        median = moved
    return median
