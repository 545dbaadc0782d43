"""Adam on the trained tensors, with the decoder kept on the unit sphere; a mean of the weights; the learning rate.

The decoder's rows have unit norm after every step. Either the gradient's component along them is dropped (Gao et al.
2024), or they are trained as free rows d = n W_dec, whose norm scales their latent's pre-activations: with free w
and b, the autoencoder is

    z = n (w x + b)    x_hat = sum z d / n    that is    W_enc = n w, b_enc = n b, W_dec = d / n

Adam moves w, b and d, with gradients n dW_enc, n db_enc and dW_dec / n; all other code sees the right-hand side. So a
latent finds its scale in two ways at once. The update of one row: `train.kernels.interface.Kernels.adam_rows`.

Adam keeps its mean squares for each weight or for each latent: the gradients of a latent share their scale, and a
single weight gets few gradients if its latent is rarely active. The encoder's gradients are sums of inputs, and are
first divided by the root mean squares of the inputs. This is Adafactor (Shazeer & Stern 2018) with fixed columns.

Shapes: D d_model, M n_latents.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from residscope.errors import IncompatibleError
from train.kernels.interface import AdamStep, Kernels
from train.model import MLSAE
from train.objective.recipes import Recipe
from train.objective.weights import BY_LATENT, TRAINED, Weights
from train.parallel.ranks import ALONE, Ranks

THRESHOLD_LR_FACTOR = 10
"""log_threshold's learning rate as a multiple of --lr. Adam moves each number by about the rate: a pre-activation sums
d_model such moves, and a threshold, which is one number, would lag behind in runs of some thousand steps."""

_LEAST_VARIANCE = 1e-2
"""Lower limit of a dimension's variance over the mean: one that hardly varies in the sample may do so in a batch."""


class SphereAdam:
    """Adam for an autoencoder's trained tensors; W_dec's rows stay on the unit sphere."""

    def __init__(
        self,
        sae: MLSAE,
        kernels: Kernels,
        *,
        free_norms: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        encoder_lr: float = 1.0,
        variance: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """encoder_lr: W_enc's rate over lr; variance: [D] mean squares of its inputs, to keep one for each latent."""
        self._kernels, self._betas, self._encoder_lr, self._ranks = kernels, betas, encoder_lr, ranks
        self.weights = sae.weights
        """The autoencoder's own tensors, which `step` changes in place."""
        self._own = _by_latent(self.weights, lambda t: t[ranks.rows.own(len(t))])
        """The part that this rank updates: its share of the latents, and b_pre."""
        self._n_latents = len(self.weights.W_enc) * ranks.latents.size
        self._columns: dict[str, Tensor] = {}  # for tensors with mean squares by latent
        if variance is not None:
            columns = (variance / variance.mean()).clamp_min(_LEAST_VARIANCE).sqrt().to(self._own.W_enc)
            self._columns = {"W_enc": columns, "W_dec": torch.ones_like(columns)}
        own = _trained(self._own)
        self.exp_avg = Weights(**{name: torch.zeros_like(t) for name, t in own.items()})
        squares = {name: t[:, :1] if name in self._columns else t for name, t in own.items()}
        self.exp_avg_sq = Weights(**{name: torch.zeros_like(t) for name, t in squares.items()})
        self.norms = torch.ones_like(self._own.W_dec[:, 0]) if free_norms else None
        """[M] n for this rank's latents, if the decoder's norms are free."""

    def step(self, gradients: Weights, *, lr: float, step: int, clip: float | None = None) -> None:
        """Move the weights by one step; `step` counts from 1. Overwrites the gradients, which are of this rank's rows.

        clip: the largest joint norm of all gradients, without the component along W_dec's rows unless norms are free;
        gradients above it are scaled down.
        """
        ranks, own = self._ranks.rows, self._own
        ranks.sum_(gradients.b_pre)
        gradients = _by_latent(gradients, ranks.sum_rows_)
        if self.norms is not None:
            _rescale(gradients, self.norms)
            _rescale(own, 1 / self.norms)
        scale = 1.0
        if clip is not None:
            norm = gradient_norm(gradients, own.W_dec if self.norms is None else None, self._ranks)
            scale = clip / norm if norm > clip else 1.0
        for name, weight in _trained(own).items():
            grad, m, v = (getattr(tensors, name) for tensors in (gradients, self.exp_avg, self.exp_avg_sq))
            rows = [t.view(-1, t.shape[-1]) for t in (weight, grad, m, v)]  # b_pre [D] as one row
            how = AdamStep(
                lr=lr * {"log_threshold": THRESHOLD_LR_FACTOR, "W_enc": self._encoder_lr}.get(name, 1),
                step=step,
                unit_rows=name == "W_dec" and self.norms is None,
                grad_scale=scale,
                betas=self._betas,
                columns=self._columns.get(name),
            )
            self._kernels.adam_rows(*rows, how=how)
        if self.norms is not None:
            torch.linalg.vector_norm(own.W_dec, dim=1, out=self.norms)
            _rescale(own, self.norms)
        ranks.share_rows_(*(tensor for name, tensor in _trained(self.weights).items() if name in BY_LATENT))
        self._ranks.latents.same_(self.weights.b_pre)  # equal but for rounding

    def _state(self) -> dict[str, dict[str, Tensor]]:
        found = {"exp_avg": _trained(self.exp_avg), "exp_avg_sq": _trained(self.exp_avg_sq)}
        return found if self.norms is None else found | {"norms": {"W_dec": self.norms}}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The moments by parameter, and free norms, for a checkpoint; with several ranks it is written in pieces."""
        pieces = partial(self._ranks.pieces, m=self._n_latents, moved=True)
        return {
            kind: {name: pieces(t) if name in BY_LATENT else t for name, t in tensors.items()}
            for kind, tensors in self._state().items()
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore the moments, removing them from `state`; raises `IncompatibleError` if a shape is wrong."""
        for kind, tensors in self._state().items():
            for name, tensor in tensors.items():
                found = state.get(kind, {}).pop(name, None)  # popped, so that each is freed once copied
                whole = [self._n_latents, *tensor.shape[1:]] if name in BY_LATENT else list(tensor.shape)
                if found is None or list(found.shape) != whole:
                    shown = None if found is None else list(found.shape)
                    raise IncompatibleError(f"optimiser state {kind}.{name}: expected {whole}, found {shown}")
                if name in BY_LATENT:
                    found = found[self._ranks.latents.own(len(found))][self._ranks.rows.own(len(self.weights.W_enc))]
                tensor.copy_(found)


def gradient_norm(gradients: Weights, W_dec: Tensor | None, ranks: Ranks = ALONE) -> float:
    """The joint norm of all gradients, if W_dec [M, D] is given without the component along its unit rows. Counts the
    latents of all ranks, and b_pre, which every rank has, once."""
    squares = {n: torch.linalg.vector_norm(grad).double().square() for n, grad in _trained(gradients).items()}
    squares["b_pre"] *= ranks.first
    total = torch.stack([*squares.values()]).sum()
    if W_dec is not None:
        total -= (gradients.W_dec * W_dec).sum(dim=1).double().square().sum()
    ranks.sum_(total)
    return total.clamp(min=0).sqrt().item()


def _rescale(tensors: Weights, factor: Tensor) -> None:
    """Multiply weights or gradients of the encoder by `factor` [M], and divide the decoder's by it, in place."""
    tensors.W_enc.mul_(factor.unsqueeze(1))
    tensors.W_dec.div_(factor.unsqueeze(1))
    if tensors.b_enc is not None:
        tensors.b_enc.mul_(factor)


def _trained(tensors: Weights) -> dict[str, Tensor]:
    return {name: getattr(tensors, name) for name in TRAINED if getattr(tensors, name) is not None}


def _by_latent(tensors: Weights, change: Callable[[Tensor], Tensor]) -> Weights:
    """The trained tensors, with `change` applied to those that have a row for each latent."""
    return Weights(**{name: change(t) if name in BY_LATENT else t for name, t in _trained(tensors).items()})


class WeightAverage:
    """A running mean of the weights, as an autoencoder: steadier than the weights while the learning rate is high.

    With decay b, after step t it is sum_i b^(t - i) w_i / sum_i b^(t - i), without the initial weights (Adam's bias
    correction). The decoder's rows are brought back to unit norm after each update.
    """

    def __init__(self, sae: MLSAE, decay: float) -> None:
        self.sae = copy.deepcopy(sae)
        """The autoencoder with the mean weights, which is validated and saved."""
        self._decay = decay

    @torch.no_grad()
    def update(self, live: MLSAE, step: int) -> None:
        """Add the weights after step number `step` (from 1) to the mean."""
        rate = (1 - self._decay) / (1 - self._decay**step)
        for name, mean in self.sae.state_dict().items():
            value = getattr(live, name)
            if name in TRAINED and step > 1:  # initial thresholds may be infinite and must not enter the mean
                mean.lerp_(value, rate)
            else:
                mean.copy_(value)
        self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Rate of step number `step` (from 0) of `steps`: a linear rise to its peak, flat, then a linear fall towards zero.

    The first and the last step have a rate above 0; the rise ends and the fall starts on whole steps.
    """
    warmup, decay = round(recipe.warmup_fraction * steps), round(recipe.decay_fraction * steps)
    rise = (step + 1) / (warmup + 1) if step < warmup else 1.0
    fall = (steps - step) / (decay + 1) if step >= steps - decay else 1.0
    return recipe.lr * min(rise, fall)
