"""Measures lenses by layer: KL divergence to the model's final logits, and how well each map can be inverted.

Shapes: n tokens, D = d_model, L = n_layers translators.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from harvest.lens.kl import Logits, kl, target, tile_tokens
from harvest.lens.translators import TunedLens

TOLERANCE = 1e-4
"""Largest relative error of inverse(apply(x)) that gives no warning."""


@torch.no_grad()
def mean_kl(
    batches: Iterable[list[Tensor]],
    lenses: Mapping[str, TunedLens],
    logits: Logits,
    *,
    vocabulary: int,
    watch: Callable[[int], object] = lambda n: None,
) -> dict[str, list[float]]:
    """Mean KL(model's own prediction || lens's), nats per token, of "logit lens" (unchanged vectors) and of each lens,
    for the inputs of the L blocks and the last block's output, L + 1 numbers each; lower is better.

    batches: L + 1 tensors [n, D] each. watch: called with the number of tokens of each finished tile.
    """
    tile = tile_tokens(vocabulary)
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        for start in range(0, len(batch[-1]), tile):
            vectors = [v[start : start + tile] for v in batch]
            to = target(logits(vectors[-1]))
            for name, lens in (("logit lens", None), *lenses.items()):
                found = sums.setdefault(name, torch.zeros(len(vectors), dtype=torch.float64))
                for i, x in enumerate(vectors):
                    if lens is not None and i < len(lens.weights):
                        x = x + x @ lens.weights[i].T + lens.biases[i]
                    found[i] += kl(logits(x), to)[0].double().sum().cpu()
            count += len(vectors[-1])
            watch(len(vectors[-1]))
    return {name: (found / count).tolist() for name, found in sums.items()}


def round_trip(lens: TunedLens, x: Tensor, layer: int) -> float:
    """The worst |inverse(apply(x)) - x| / |x| over vectors [n, D] of a block's output, mapped as `harvest` does."""
    back = lens.invert(lens.apply(x, layer), layer)
    return ((back - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)).max().item()


def condition(weight: Tensor) -> float:
    """Condition number of I + W, weight [D, D]: how much the inverse may enlarge relative errors; 1 is best."""
    values = torch.linalg.svdvals(torch.eye(len(weight), dtype=torch.float64) + weight.cpu().double())
    return (values[0] / values[-1].clamp_min(torch.finfo(values.dtype).tiny)).item()


def limit_condition(weight: Tensor, bias: Tensor, mean: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Weight [D, D] and bias [D] (float64) changed so that no singular value of I + W is below the largest divided by
    `limit` (0: no limit). The bias compensates for this at the inputs' mean [D], whose image does not change."""
    if not limit:
        return weight, bias
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    left, values, right = torch.linalg.svd(identity + weight)
    raised = (left * values.clamp_min(values[0] / limit)) @ right - identity
    return raised, bias + (weight - raised) @ mean
