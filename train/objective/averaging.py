"""A running mean of the weights: steadier than the weights themselves while the learning rate is high.

With decay b, after step t the mean is sum_i b^(t - i) w_i / sum_i b^(t - i), the exponential mean without a memory of
the initial weights (the bias correction that Adam makes to its moments). The decoder's rows are brought back to unit
norm after each update, so that what is saved is on the sphere as the weights are.

Shapes: M n_latents, D d_model.
"""

import copy

import torch

from train.model import MLSAE
from train.objective.weights import TRAINED


class WeightAverage:
    """The mean of one autoencoder's weights, as an autoencoder."""

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
