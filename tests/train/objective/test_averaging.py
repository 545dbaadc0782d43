"""The running mean of the weights, against the sum that defines it."""

import torch

from train.model import MLSAE, SAEConfig
from train.objective.averaging import WeightAverage


def test_the_mean_is_the_bias_corrected_exponential_one() -> None:
    """sum_i b^(t - i) w_i / sum_i b^(t - i): nothing of the initial weights is left after the first step."""
    generator = torch.Generator().manual_seed(0)
    sae = MLSAE(SAEConfig(d_model=3, n_latents=4, k=2, activation="batchtopk", encoder_bias=True))
    sae.initialize(0)
    average = WeightAverage(sae, 0.8)
    history = []
    for step in range(1, 6):
        for parameter in sae.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        sae.threshold.copy_(torch.tensor(float(step)))
        history.append({name: p.detach().clone() for name, p in sae.named_parameters()})
        average.update(sae, step)
    weights = [0.8 ** (5 - i) for i in range(1, 6)]
    for name in ("W_enc", "b_pre", "b_enc"):
        expected = sum(w * past[name] for w, past in zip(weights, history, strict=True)) / sum(weights)
        torch.testing.assert_close(getattr(average.sae, name), expected)
    torch.testing.assert_close(average.sae.W_dec.norm(dim=1), torch.ones(4))
    assert average.sae.threshold == 5  # measured, not trained: the last one


def test_after_one_step_the_mean_is_the_weights() -> None:
    sae = MLSAE(SAEConfig(d_model=3, n_latents=4, k=2))
    average = WeightAverage(sae, 0.999)  # of zeros
    sae.initialize(0)
    average.update(sae, 1)
    for name, tensor in sae.state_dict().items():
        torch.testing.assert_close(average.sae.state_dict()[name], tensor)
    sae.W_enc.data.zero_()
    assert average.sae.W_enc.count_nonzero() > 0  # it has tensors of its own
