"""Adam on the trained tensors, with the decoder kept on the unit sphere, and the learning rate's course.

The optimiser's state is two tensors for each of them and nothing else; the step number is the trainer's. Not here: how
a row is stepped (`train.kernels.adam_rows`, or its compiled version).
"""

import torch
from torch import Tensor

from store.errors import IncompatibleError
from train.kernels import Kernels
from train.sae import MLSAE
from train.weights import TRAINED, Weights

THRESHOLD_LR_FACTOR = 10
"""log_threshold's learning rate over the others'. Adam moves each number by about the rate: a pre-activation sums
d_model such moves, and a threshold that took one would come too late in runs of some thousand steps."""


class SphereAdam:
    """Adam for an autoencoder's trained tensors; W_dec's rows stay on the unit sphere."""

    def __init__(self, sae: MLSAE, kernels: Kernels) -> None:
        self._kernels = kernels
        self.weights = sae.weights
        """The autoencoder's own tensors, which `step` changes in place."""
        self.exp_avg = _zeros(self.weights)
        self.exp_avg_sq = _zeros(self.weights)

    def step(self, gradients: Weights, *, lr: float, step: int, clip: float | None = None) -> None:
        """Move the weights by one step; `step` counts from 1; the gradients are used up.

        W_dec: the gradient's component along each row goes before the step, the rows are of unit norm after it. clip:
        the largest norm that all gradients together may have, that component left out; larger ones are scaled down.
        """
        scale = 1.0
        if clip is not None:
            norm = gradient_norm(gradients, self.weights.W_dec)
            scale = clip / norm if norm > clip else 1.0
        for name, weight in _trained(self.weights).items():
            grad, m, v = (getattr(tensors, name) for tensors in (gradients, self.exp_avg, self.exp_avg_sq))
            rows = [t.view(-1, t.shape[-1]) for t in (weight, grad, m, v)]  # b_pre [D] as one row
            rate = lr * THRESHOLD_LR_FACTOR if name == "log_threshold" else lr
            self._kernels.adam_rows(*rows, lr=rate, step=step, unit_rows=name == "W_dec", grad_scale=scale)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The moments by parameter, for a checkpoint."""
        return {
            "exp_avg": {name: t.cpu() for name, t in _trained(self.exp_avg).items()},
            "exp_avg_sq": {name: t.cpu() for name, t in _trained(self.exp_avg_sq).items()},
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take the moments back; raises `IncompatibleError` if they are of another shape."""
        for kind, ours in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for name, tensor in _trained(ours).items():
                found = state.get(kind, {}).get(name)
                if found is None or found.shape != tensor.shape:
                    shown = None if found is None else list(found.shape)
                    raise IncompatibleError(
                        f"optimiser state {kind}.{name}: expected {list(tensor.shape)}, found {shown}"
                    )
                tensor.copy_(found)


def gradient_norm(gradients: Weights, W_dec: Tensor) -> float:
    """The norm of all gradients together, without the component of W_dec's along its own unit rows [M, D]."""
    along = (gradients.W_dec * W_dec).sum(dim=1)
    squares = [torch.linalg.vector_norm(grad).double().square() for grad in _trained(gradients).values()]
    return (torch.stack(squares).sum() - along.double().square().sum()).clamp(min=0).sqrt().item()


def _trained(tensors: Weights) -> dict[str, Tensor]:
    """Those that the optimiser moves, by name."""
    return {name: tensor for name in TRAINED if (tensor := getattr(tensors, name)) is not None}


def _zeros(like: Weights) -> Weights:
    return Weights(**{name: torch.zeros_like(tensor) for name, tensor in _trained(like).items()})


def scaling_law_lr(n_latents: int) -> float:
    """Gao et al. 2024, section 2.4 and appendix A.3: the learning rate falls with the square root of the dictionary."""
    return 2e-4 / (n_latents / 2**14) ** 0.5


def learning_rate(step: int, steps: int, peak: float, *, warmup_fraction: float, decay_fraction: float) -> float:
    """Rate of step number `step` (from 0) of `steps`: a linear rise to `peak`, flat, then a linear fall towards zero.

    The first step already moves and so does the last: the rise ends and the fall starts on whole steps.
    """
    warmup, decay = round(warmup_fraction * steps), round(decay_fraction * steps)
    rise = (step + 1) / (warmup + 1) if step < warmup else 1.0
    fall = (steps - step) / (decay + 1) if step >= steps - decay else 1.0
    return peak * min(rise, fall)
