"""KL divergence, its gradient, and the training step, against autograd and a step written out."""

import pytest
import torch
from torch import Tensor

from harvest.lens import kl as lens_kl
from harvest.lens.config import FittingConfig
from harvest.lens.measure import mean_kl
from harvest.lens.translators import TunedLens
from harvest.model.load import LoadedModel, load_model
from harvest.model.names import resolve_model
from tests.support.harvesting import ModelFolder
from tests.support.models import ARCHITECTURES, D_MODEL

L, N, V = 2, 12, 260


def naive_kl(final: Tensor, lens: Tensor) -> Tensor:
    """Forward KL, nats per token, in float64 [n]."""
    p, q = final.double().softmax(-1), lens.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, model_folder: ModelFolder) -> LoadedModel:
    return load_model(resolve_model(str(model_folder(request.param))))


def vectors(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, D_MODEL, generator=generator) * 3 for _ in range(L + 1)]


def translators() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(L, D_MODEL, D_MODEL, generator=generator) / 20, torch.randn(L, D_MODEL, generator=generator)


def naive_gradients(model: LoadedModel, weights: Tensor, biases: Tensor, batch: list[Tensor]) -> list[Tensor]:
    """By autograd all the way, mean KL of each translator."""
    w, b = weights.clone().requires_grad_(), biases.clone().requires_grad_()
    loss = sum(
        naive_kl(model.logits(batch[-1]), model.logits(batch[i] + batch[i] @ w[i].T + b[i])).mean() for i in range(L)
    )
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, (w, b)))


def test_gradients_equal_autograd(model: LoadedModel) -> None:
    batch, (weights, biases) = vectors(), translators()
    expected_w, expected_b = naive_gradients(model, weights, biases, batch)
    to = lens_kl.target(model.logits(batch[-1]))
    for i in range(L):
        loss, dw, db = lens_kl.gradients(batch[i], weights[i], biases[i], to, model.logits)
        lens = model.logits(batch[i] + batch[i] @ weights[i].T + biases[i])
        assert loss.item() == pytest.approx(naive_kl(model.logits(batch[-1]), lens).sum().item(), rel=1e-4)
        torch.testing.assert_close(dw / N, expected_w[i], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(db / N, expected_b[i], rtol=1e-3, atol=1e-5)


def test_steps_are_nesterov_momentum_with_decay_and_a_clip_per_translator(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lens_kl, "tile_tokens", lambda vocabulary: 5)  # Tiles that do not divide a batch.
    model = load_model(resolve_model(str(model_folder("gpt2"))))
    weights, biases = translators()
    expected = [weights.clone(), biases.clone()]
    velocity = [torch.zeros_like(weights), torch.zeros_like(biases)]
    batches = [vectors(0), vectors(1)]
    lr, decay, clip = 0.8, 0.01, 0.0
    for step, batch in enumerate(batches):
        grads = naive_gradients(model, expected[0], expected[1], batch)
        norms = [torch.cat([grads[0][i].flatten(), grads[1][i]]).norm().item() for i in range(L)]
        clip = clip or sum(norms) / L  # So that one of the two is clipped.
        for k, (value, grad) in enumerate(zip(expected, grads, strict=True)):
            grad = torch.stack([grad[i] * min(clip / norms[i], 1.0) for i in range(L)]) + decay * value
            velocity[k] = grad if step == 0 else 0.9 * velocity[k] + grad
            value -= lr * 0.1 * (1 - step / 2) * (grad + 0.9 * velocity[k])
    monkeypatch.setattr(lens_kl, "CLIP", clip)
    seen: list[list[float]] = []
    options = FittingConfig(kl_steps=2, lr=lr, weight_decay=decay)
    lens_kl.train(weights, biases, batches, model.logits, options, vocabulary=V, after_step=seen.append)
    assert [len(kls) for kls in seen] == [L, L]
    torch.testing.assert_close(weights, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(biases, expected[1], rtol=1e-4, atol=1e-6)


def test_measured_kl_equals_the_formula_and_is_zero_at_the_last_layer(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harvest.lens.measure.tile_tokens", lambda vocabulary: 5)
    batches, (weights, biases) = [vectors(0), vectors(1)], translators()
    counts: list[int] = []
    lenses = {"lens": TunedLens(weights, biases)}
    found = mean_kl(batches, lenses, model.logits, vocabulary=V, watch=counts.append)
    assert sum(counts) == 2 * N
    both = [torch.cat(pair) for pair in zip(*batches, strict=True)]
    final = model.logits(both[-1])
    for i in range(L):
        plain = naive_kl(final, model.logits(both[i])).mean().item()
        mapped = naive_kl(final, model.logits(both[i] + both[i] @ weights[i].T + biases[i])).mean().item()
        assert found["logit lens"][i] == pytest.approx(plain, rel=1e-4)
        assert found["lens"][i] == pytest.approx(mapped, rel=1e-4)
    assert found["logit lens"][L] == found["lens"][L] == 0.0


def test_logits_that_are_minus_infinity_count_nothing() -> None:
    final, lens = torch.tensor([[1.0, 2.0, -1e9]]), torch.tensor([[0.0, 0.5, -1e9]])
    found, gradient = lens_kl.kl(lens, lens_kl.target(final))
    torch.testing.assert_close(found, naive_kl(final[:, :2], lens[:, :2]).float())
    torch.testing.assert_close(gradient, lens.softmax(-1) - final.softmax(-1))
