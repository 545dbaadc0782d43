"""How far a run's numbers have settled: a curve over its steps on one sample of held-out tokens.

The ratio and the share that stays on are those of docs/method.md, mass-weighted and with every active pair counting
once, over a few hundred tokens: read their trend; for their value use `analyze`.

Shapes: T tokens, L layers, k active latents per vector.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from train.kernels.interface import SparseCodes
from train.parallel.ranks import ALONE, Ranks

NUMBERS = ("fvu", "ratio", "stays_on")
"""Numbers in each point of the curve, beside step and vectors; None where not defined."""

SETTLED, FVU_SETTLED, LEAST_STEPS = 0.01, 0.1, 20
"""A ratio is settled if, over the last quarter of the training, it moved by less than `SETTLED` of its last value and
FVU by less than `FVU_SETTLED` of its own, and that quarter has `LEAST_STEPS` or more."""


class Spread(NamedTuple):
    """Sums over tokens of how latents spread over layers; add over batches of whole tokens."""

    per_latent: Tensor
    """float64 [3, M]: mass, its first moment over layers, and the sum over tokens of mass times variance over layers;
    layers count from 0 at the lowest one, with the gaps that the model's numbers have."""
    followed: int
    """Active (token, layer, latent) triples whose latent is active at the token's next layer too."""
    before_last: int
    """Active (token, layer, latent) triples at any layer but the last."""
    second: Tensor
    """float64 scalar: the second moment of mass over layers."""

    @classmethod
    def zeros(cls, n_latents: int, device: torch.device) -> "Spread":
        per_latent = torch.zeros(3, n_latents, dtype=torch.float64, device=device)
        return cls(per_latent, 0, 0, per_latent.new_zeros(()))

    def add(self, codes: SparseCodes, layers: Sequence[int]) -> "Spread":
        """Itself plus codes [T L, k] of whole tokens, layer by layer within a token. layers: the model's [L]."""
        n_latents, n_layers = self.per_latent.shape[1], len(layers)
        row = torch.arange(len(codes.values), device=codes.values.device).unsqueeze(1).expand_as(codes.indices)
        on = codes.values > 0
        mass, row, latent = codes.values[on].double(), row[on], codes.indices[on]
        layer = (torch.tensor(layers, device=row.device) - layers[0])[row % n_layers].double()
        pair, inverse = torch.unique(row // n_layers * n_latents + latent, return_inverse=True)  # (token, latent)
        of_pair = mass.new_zeros(3, len(pair)).index_add_(
            1, inverse, torch.stack([mass, mass * layer, mass * layer.square()])
        )
        within = (of_pair[2] - of_pair[1].square() / of_pair[0]).clamp(min=0)
        sums = torch.stack([of_pair[0], of_pair[1], within])
        place = row * n_latents + latent  # the same latent at the token's next layer is n_latents further
        inner = row % n_layers < n_layers - 1
        return Spread(
            self.per_latent.index_add(1, pair % n_latents, sums),
            self.followed + int(torch.isin(place[inner] + n_latents, place).sum()),
            self.before_last + int(inner.sum()),
            self.second + of_pair[2].sum(),
        )

    def numbers(self, latents: Ranks = ALONE) -> dict[str, float | None]:
        """`ratio`: aggregate over token-level variance, by mass; `stays_on`: a share; None where not defined."""
        mass, first, within = self.per_latent
        live = mass > 0
        second_of_means = (first[live].square() / mass[live]).sum()
        counts = torch.tensor([self.followed, self.before_last], dtype=torch.float64)
        token, aggregate = within.sum(), self.second - second_of_means
        latents.sum_(token, aggregate, counts)
        followed, before_last = counts.tolist()
        return {
            "ratio": (aggregate / token).item() if token > 0 else None,
            "stays_on": followed / before_last if before_last else None,
        }


def is_curve(found: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether `found` is a list of points that a trainer can have written, in order."""
    if not isinstance(found, list) or not all(isinstance(point, dict) for point in found):
        return False
    for before, point in itertools.pairwise([{"step": 0, "vectors": 1}, *found]):
        numbers = [point[name] for name in NUMBERS if point.get(name) is not None]
        if not all(type(number) is float and 0 <= number < math.inf for number in numbers):
            return False
        if not all(type(point.get(n)) is int for n in ("step", "vectors")):
            return False
        if point["step"] <= before["step"] or point["vectors"] < before["vectors"]:
            return False
    return True


def last_quarter(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How the numbers moved from the point nearest three quarters of the training to its end.

    `steps`: between the two; `fvu`, `ratio` and `stays_on`: the change as a share of the last value, None if not
    defined; `settled`: see `SETTLED`. None if the curve has no point to start from.
    """
    early = [point for point in curve if point["vectors"] < 0.9 * curve[-1]["vectors"]]
    if not early:
        return None
    last = curve[-1]
    start = min(early, key=lambda point: abs(point["vectors"] - 0.75 * last["vectors"]))
    moved = {name: 1 - start[name] / last[name] if start.get(name) and last.get(name) else None for name in NUMBERS}
    steps, still = last["step"] - start["step"], abs(moved["fvu"] or 0.0) < FVU_SETTLED
    settled = None if moved["ratio"] is None else abs(moved["ratio"]) < SETTLED and still and steps >= LEAST_STEPS
    return {"steps": steps, **moved, "settled": settled}


def in_words(moved: Mapping[str, Any] | None) -> str:
    """`last_quarter` as a sentence to print beside the ratio; empty if there is nothing to say."""
    if moved is None or moved["ratio"] is None:
        return ""
    fvu = "" if moved["fvu"] is None else f" and FVU by {moved['fvu']:+.2%}"
    last = "step" if moved["steps"] == 1 else f"{moved['steps']:,} steps"
    return (
        f"The ratio has {'' if moved['settled'] else 'not '}settled: over the last {last} of the training it moved by "
        f"{moved['ratio']:+.2%}{fvu}, on a sample of held-out tokens (settled: below {SETTLED:.0%}, FVU below "
        f"{FVU_SETTLED:.0%}, over {LEAST_STEPS} steps or more)."
    )
