"""Trains translators by the tuned-lens recipe: gradient descent on the KL divergence from the model's final logits to
the lens's (Belrose et al. 2023, arXiv 2303.08112).

How: for each translator the loss is the mean over kept tokens of

    KL(p || q) = sum_v p_v (log p_v - log q_v)    p = softmax of the model's logits, q = softmax of those of x + W x + b

in nats per token, both with the model's own final norm and unembedding, which are not trained. The gradient with
respect to the lens's logits is (q - p) / n; autograd propagates it through unembedding and norm to the vector, from
which two products give dW and db. The optimiser is SGD with Nesterov momentum and linear decay; each translator's
gradient is clipped to norm 1. Tokens are processed in tiles, so that only one tile's logits are in memory; all
translators share p.

Shapes: n tokens of a tile, D = d_model, V = vocabulary, L = n_layers translators.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from harvest.lens.config import FittingConfig

MOMENTUM = 0.9
CLIP = 1.0
_TILE_BYTES = 64 << 20

Logits = Callable[[Tensor], Tensor]
"""Final norm and unembedding: [n, D] -> [n, V]."""


class Target(NamedTuple):
    """The model's own prediction for a tile."""

    p: Tensor
    """float32 [n, V]: probabilities."""
    log_p: Tensor
    """float32 [n, V]."""


def tile_tokens(vocabulary: int) -> int:
    """Tokens in a tile: their logits take 64 MiB of float32; at least 16."""
    return max(_TILE_BYTES // (4 * vocabulary), 16)


@torch.no_grad()
def target(logits: Tensor) -> Target:
    """The prediction given by logits [n, V]."""
    log_p = logits.float().log_softmax(-1)
    return Target(log_p.exp(), log_p)


@torch.no_grad()
def kl(logits: Tensor, to: Target) -> tuple[Tensor, Tensor]:
    """KL(p || q) in nats, float32 [n], and its gradient with respect to the logits, q - p, [n, V]."""
    log_q = logits.float().log_softmax(-1)
    # Differences are exactly 0 for equal logits; sum p log p - sum p log q would have rounding errors of 1e-4.
    found = torch.linalg.vecdot(to.p, to.log_p - log_q)
    return found, log_q.exp_().sub_(to.p)


def gradients(x: Tensor, weight: Tensor, bias: Tensor, to: Target, logits: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """The KL summed over x [n, D], and its gradients with respect to weight [D, D] and bias [D]."""
    transformed = (x + x @ weight.T + bias).requires_grad_()
    with torch.enable_grad():
        found = logits(transformed)
    loss, gradient = kl(found.detach(), to)
    (g,) = torch.autograd.grad(found, transformed, gradient.to(found.dtype))  # [n, D]
    return loss.double().sum(), g.T @ x, g.sum(0)


def train(
    weights: Tensor,
    biases: Tensor,
    batches: Iterable[list[Tensor]],
    logits: Logits,
    options: FittingConfig,
    *,
    vocabulary: int,
    after_step: Callable[[list[float]], object],
) -> None:
    """Train weights [L, D, D] and biases [L, D] (float32) in place, with one step for each batch.

    batches: L + 1 tensors [n, D] each, the inputs of the blocks and the last block's output. The learning rate (divided
    by the sum of the momentum's series) decays linearly to zero over the steps. after_step: called with each
    translator's mean KL before the step, in nats per token.
    """
    lr, decay, steps = options.first_lr * (1 - MOMENTUM), options.weight_decay, options.kl_steps
    optimizer = torch.optim.SGD([weights, biases], lr=lr, momentum=MOMENTUM, nesterov=True, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - min(step, steps) / steps)
    tile = tile_tokens(vocabulary)
    for batch in batches:
        n = len(batch[-1])
        weights.grad, biases.grad = torch.zeros_like(weights), torch.zeros_like(biases)
        losses = torch.zeros(len(weights), dtype=torch.float64)
        for start in range(0, n, tile):
            *inputs, last = (vectors[start : start + tile] for vectors in batch)
            with torch.no_grad():
                to = target(logits(last))
            for i, x in enumerate(inputs):
                loss, dw, db = gradients(x, weights[i], biases[i], to, logits)
                losses[i] += loss.cpu()
                weights.grad[i].add_(dw, alpha=1 / n)
                biases.grad[i].add_(db, alpha=1 / n)
        _clip(weights.grad, biases.grad)
        optimizer.step()
        schedule.step()
        after_step((losses / n).tolist())
    weights.grad = biases.grad = None


def _clip(dw: Tensor, db: Tensor) -> None:
    """Clip each translator's gradient (dW [L, D, D] and db [L, D] together) to a norm of at most `CLIP`."""
    norm = (dw.square().sum((1, 2)) + db.square().sum(1)).sqrt()  # [L]
    factor = (CLIP / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(max=1)
    dw.mul_(factor[:, None, None])
    db.mul_(factor[:, None])
