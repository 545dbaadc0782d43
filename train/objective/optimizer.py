"""Adam on the trained tensors, with the decoder kept on the unit sphere; a mean of the weights; the learning rate.

Rows of the decoder are of unit norm after every step. Either the gradient's component along them is left out (Gao et
al. 2024), or they are trained as free rows d = n W_dec, whose norm scales their latent's pre-activations: with free w
and b, one autoencoder is

    z = n (w x + b)    x_hat = sum z d / n    that is    W_enc = n w, b_enc = n b, W_dec = d / n

Adam moves w, b and d, with gradients n dW_enc, n db_enc and dW_dec / n; everybody else sees the right-hand side. So a
latent finds its scale by two ways at once.

The optimiser's state is two tensors for each of them, and n; the step number is the trainer's. Not here: how a row is
stepped (`train.kernels.interface.Kernels.adam_rows`).

Shapes: D d_model, M n_latents.
"""

import copy

import torch
from torch import Tensor

from residscope.errors import IncompatibleError
from train.config import OptimizerConfig
from train.kernels.interface import AdamStep, Kernels
from train.model import MLSAE
from train.objective.weights import TRAINED, Weights

THRESHOLD_LR_FACTOR = 10
"""log_threshold's learning rate over the others'. Adam moves each number by about the rate: a pre-activation sums
d_model such moves, and a threshold that took one would come too late in runs of some thousand steps."""


class SphereAdam:
    """Adam for an autoencoder's trained tensors; W_dec's rows stay on the unit sphere."""

    def __init__(self, sae: MLSAE, kernels: Kernels, *, free_norms: bool = False) -> None:
        self._kernels = kernels
        self.weights = sae.weights
        """The autoencoder's own tensors, which `step` changes in place."""
        self.exp_avg = _zeros(self.weights)
        self.exp_avg_sq = _zeros(self.weights)
        self.norms = torch.ones_like(self.weights.W_dec[:, 0]) if free_norms else None
        """[M] n, where the decoder's rows are trained free."""

    def step(self, gradients: Weights, *, lr: float, step: int, clip: float | None = None) -> None:
        """Move the weights by one step; `step` counts from 1; the gradients are used up.

        W_dec: unless norms are free, the gradient's component along each row goes before the step; the rows are of unit
        norm after it. clip: the largest norm that all gradients of what is trained may have together, that component
        left out; larger ones are scaled down.
        """
        if self.norms is not None:
            _rescale(gradients, self.norms)
            _rescale(self.weights, 1 / self.norms)
        scale = 1.0
        if clip is not None:
            norm = gradient_norm(gradients, self.weights.W_dec if self.norms is None else None)
            scale = clip / norm if norm > clip else 1.0
        for name, weight in _trained(self.weights).items():
            grad, m, v = (getattr(tensors, name) for tensors in (gradients, self.exp_avg, self.exp_avg_sq))
            rows = [t.view(-1, t.shape[-1]) for t in (weight, grad, m, v)]  # b_pre [D] as one row
            rate = lr * THRESHOLD_LR_FACTOR if name == "log_threshold" else lr
            unit_rows = name == "W_dec" and self.norms is None
            self._kernels.adam_rows(*rows, how=AdamStep(lr=rate, step=step, unit_rows=unit_rows, grad_scale=scale))
        if self.norms is not None:
            torch.linalg.vector_norm(self.weights.W_dec, dim=1, out=self.norms)
            _rescale(self.weights, self.norms)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The moments by parameter, and free norms, for a checkpoint."""
        moments = {
            "exp_avg": {name: t.cpu() for name, t in _trained(self.exp_avg).items()},
            "exp_avg_sq": {name: t.cpu() for name, t in _trained(self.exp_avg_sq).items()},
        }
        return moments if self.norms is None else moments | {"norms": {"W_dec": self.norms.cpu()}}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take the moments back; raises `IncompatibleError` if they are of another shape."""
        expected = {"exp_avg": _trained(self.exp_avg), "exp_avg_sq": _trained(self.exp_avg_sq)}
        if self.norms is not None:
            expected["norms"] = {"W_dec": self.norms}
        for kind, ours in expected.items():
            for name, tensor in ours.items():
                found = state.get(kind, {}).get(name)
                if found is None or found.shape != tensor.shape:
                    shown = None if found is None else list(found.shape)
                    raise IncompatibleError(
                        f"optimiser state {kind}.{name}: expected {list(tensor.shape)}, found {shown}"
                    )
                tensor.copy_(found)


def gradient_norm(gradients: Weights, W_dec: Tensor | None) -> float:
    """The norm of all gradients together, without the component of W_dec's along its own unit rows [M, D], if given."""
    squares = [torch.linalg.vector_norm(grad).double().square() for grad in _trained(gradients).values()]
    total = torch.stack(squares).sum()
    if W_dec is not None:
        total -= (gradients.W_dec * W_dec).sum(dim=1).double().square().sum()
    return total.clamp(min=0).sqrt().item()


def _rescale(tensors: Weights, factor: Tensor) -> None:
    """Take weights or gradients from a decoder with rows of one norm to one with another, in place: factor [M]."""
    tensors.W_enc.mul_(factor.unsqueeze(1))
    tensors.W_dec.div_(factor.unsqueeze(1))
    if tensors.b_enc is not None:
        tensors.b_enc.mul_(factor)


def _trained(tensors: Weights) -> dict[str, Tensor]:
    """Those that the optimiser moves, by name."""
    return {name: tensor for name in TRAINED if (tensor := getattr(tensors, name)) is not None}


def _zeros(like: Weights) -> Weights:
    return Weights(**{name: torch.zeros_like(tensor) for name, tensor in _trained(like).items()})


class WeightAverage:
    """A running mean of the weights, as an autoencoder: steadier than the weights while the learning rate is high.

    With decay b, after step t the mean is sum_i b^(t - i) w_i / sum_i b^(t - i), the exponential mean without a memory
    of the initial weights (the bias correction that Adam makes to its moments). The decoder's rows are brought back to
    unit norm after each update.
    """

    def __init__(self, sae: MLSAE, decay: float) -> None:
        """sae: where the mean starts; its tensors are copied."""
        self.sae = copy.deepcopy(sae)
        """The autoencoder of mean weights, to be validated and saved."""
        self._decay = decay

    @torch.no_grad()
    def update(self, live: MLSAE, step: int) -> None:
        """Count the weights after step number `step`, which counts from 1."""
        rate = (1 - self._decay) / (1 - self._decay**step)
        for name, mean in self.sae.state_dict().items():
            value = getattr(live, name)
            if name in TRAINED and step > 1:  # the first may follow upon infinities, which are not to be mixed in
                mean.lerp_(value, rate)
            else:
                mean.copy_(value)
        self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))


def scaling_law_lr(n_latents: int) -> float:
    """After Gao et al. 2024, figure 3: the best learning rate falls with the square root of the dictionary's size."""
    return 2e-4 / (n_latents / 2**14) ** 0.5


def learning_rate(step: int, steps: int, peak: float, shares: OptimizerConfig) -> float:
    """Rate of step number `step` (from 0) of `steps`: a linear rise to `peak`, flat, then a linear fall towards zero.

    The first step already moves and so does the last: the rise ends and the fall starts on whole steps.
    """
    warmup, decay = round(shares.warmup_fraction * steps), round(shares.decay_fraction * steps)
    rise = (step + 1) / (warmup + 1) if step < warmup else 1.0
    fall = (steps - step) / (decay + 1) if step >= steps - decay else 1.0
    return peak * min(rise, fall)
