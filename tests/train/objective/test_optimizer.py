"""Learning rates by hand, and the optimiser's promises."""

from typing import Any

import pytest
import torch
from torch import Tensor

from residscope.errors import IncompatibleError
from tests.support.training import step_options
from train.kernels.choose import choose_kernels
from train.kernels.interface import AdamStep
from train.kernels.plain import TORCH
from train.model import MLSAE, SAEConfig
from train.objective.losses import DeadLatents, row_weights
from train.objective.optimizer import SphereAdam, WeightAverage, gradient_norm, learning_rate
from train.objective.recipes import Recipe
from train.objective.step import training_step
from train.objective.variants import TopK
from train.objective.weights import TRAINED, Weights


def make_optimizer(**options: Any) -> SphereAdam:
    sae = MLSAE(SAEConfig(d_model=4, n_latents=6, k=2))
    sae.initialize(0)
    return SphereAdam(sae, TORCH, **options)


def recipe(lr: float, warmup: float, decay: float) -> Recipe:
    return Recipe(recipe="gao", batch_size=1, lr=lr, warmup_fraction=warmup, decay_fraction=decay)


def random_gradients(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return Weights(*(torch.randn(shape, generator=generator) for shape in ((6, 4), (6, 4), (4,))))


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [learning_rate(s, 10, recipe(1.0, 0.3, 0.4)) for s in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 399])
def test_the_rate_is_the_formula_of_method_md(steps: int) -> None:
    w, d = round(0.02 * steps), round(0.2 * steps)
    expected = [3e-4 * min((s + 1) / (w + 1), 1, (steps - s) / (d + 1)) for s in range(steps)]
    rates = [learning_rate(s, steps, recipe(3e-4, 0.02, 0.2)) for s in range(steps)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_no_step_has_a_rate_of_zero(steps: int) -> None:
    rates = [learning_rate(s, steps, recipe(2.0, 0.05, 1.0)) for s in range(steps)]
    assert min(rates) > 0
    assert max(rates) <= 2.0


def test_decoder_rows_have_unit_norm_after_every_step() -> None:
    """Mistake 3: the decoder normalised before the optimiser's step, so that what is saved is off the sphere."""
    optimizer = make_optimizer()
    for step in range(1, 8):
        optimizer.step(random_gradients(step), lr=0.1, step=step)
        norms = optimizer.weights.W_dec.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(6), rtol=0, atol=1e-6)
    assert not torch.allclose(optimizer.weights.W_enc.norm(dim=1), torch.ones(6), atol=1e-2)  # the encoder is free


def test_steps_change_the_autoencoder_in_place() -> None:
    sae = MLSAE(SAEConfig(d_model=4, n_latents=6, k=2))
    sae.initialize(0)
    before = [p.clone() for p in sae.parameters()]
    SphereAdam(sae, TORCH).step(random_gradients(0), lr=0.1, step=1)
    assert all(not torch.equal(a, b) for a, b in zip(before, sae.parameters(), strict=True))


@pytest.mark.parametrize("variance", [None, torch.ones(4)])
def test_state_goes_through_a_checkpoint_unchanged(variance: Tensor | None) -> None:
    one, two = make_optimizer(variance=variance), make_optimizer(variance=variance)
    one.step(random_gradients(1), lr=0.1, step=1)
    two.step(random_gradients(1), lr=0.1, step=1)
    fresh = make_optimizer(variance=variance)
    fresh.load_state_dict(one.state_dict())
    for name in TRAINED[:3]:
        getattr(fresh.weights, name).copy_(getattr(one.weights, name))
    fresh.step(random_gradients(2), lr=0.1, step=2)
    two.step(random_gradients(2), lr=0.1, step=2)
    assert all(torch.equal(a, b) for a, b in zip(fresh.weights[:3], two.weights[:3], strict=True))


def test_mean_squares_by_latent_stand_in_the_encoder_as_its_inputs_variances() -> None:
    """With variances 4, 1, 1, 2 (mean 2) the shares are 2, 1/2, 1/2, 1. One gradient of 3 everywhere has the mean
    square 9 (1/2 + 2 + 2 + 1) / 4 over them, and the first step of an encoder's weight is the rate times 3 over the
    roots of that and of its share. The decoder's are all the rate, before rows are normalised."""
    sae = MLSAE(SAEConfig(d_model=4, n_latents=6, k=2))
    sae.initialize(0)
    sae.W_dec.data[:] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    before = sae.W_enc.data.clone()
    optimizer = SphereAdam(sae, TORCH, encoder_lr=0.5, variance=torch.tensor([4.0, 1.0, 1.0, 2.0]))
    gradients = Weights(*(torch.full_like(t, 3.0) for t in sae.weights[:3]))
    optimizer.step(gradients, lr=0.1, step=1)
    moved = 0.05 / (5.5 / 4 * torch.tensor([2.0, 0.5, 0.5, 1.0])).sqrt()
    torch.testing.assert_close(before - sae.W_enc, moved.expand(6, 4))
    row = torch.tensor([1.0, *[-0.1 * (4 / 3) ** 0.5] * 3])  # of the gradient (0, 3, 3, 3)
    torch.testing.assert_close(sae.W_dec.data, (row / row.norm()).expand(6, 4))
    assert [len(t[0]) for t in optimizer.exp_avg_sq[:2]] == [1, 1]


def test_an_input_that_hardly_varies_is_not_moved_a_thousandfold() -> None:
    sae = MLSAE(SAEConfig(d_model=4, n_latents=6, k=2))
    optimizer = SphereAdam(sae, TORCH, variance=torch.tensor([4.0, 0.0, 0.0, 0.0]))
    optimizer.step(Weights(*(torch.ones_like(t) for t in sae.weights[:3])), lr=0.1, step=1)
    shares, mean = torch.tensor([4.0, 0.01, 0.01, 0.01]), (1 / 4 + 3 * 100) / 4
    torch.testing.assert_close(sae.W_enc.data[0], -0.1 / (mean * shares).sqrt())


def test_state_of_another_shape_is_refused() -> None:
    state = make_optimizer().state_dict()
    state["exp_avg"]["W_dec"] = torch.zeros(3, 3)
    with pytest.raises(IncompatibleError, match=r"exp_avg\.W_dec: expected \[6, 4\], found \[3, 3\]"):
        make_optimizer().load_state_dict(state)


@pytest.mark.parametrize("name", ["torch", "numba"])
def test_clipping_scales_all_gradients_by_their_norm_together(name: str) -> None:
    """By the norm of what Adam sees: W_dec's component along its own rows is out of it."""
    kernels = choose_kernels(torch.empty(0), name)
    ends = []
    for clip, scale in ((None, None), (0.7, "by hand"), (1e9, None)):
        sae = MLSAE(SAEConfig(d_model=4, n_latents=6, k=2, encoder_bias=True))
        sae.initialize(0)
        gradients = random_gradients(3)._replace(b_enc=torch.arange(6.0))
        along = (gradients.W_dec * sae.W_dec).sum(1, keepdim=True)
        parts = [gradients.W_enc, gradients.W_dec - along * sae.W_dec, gradients.b_pre, gradients.b_enc]
        norm = torch.cat([part.flatten() for part in parts]).norm()  # type: ignore[union-attr]
        optimizer = SphereAdam(sae, kernels)
        twin = MLSAE(sae.config)
        twin.initialize(0)
        other = SphereAdam(twin, kernels)
        if scale is not None:
            assert gradient_norm(gradients, sae.W_dec) == pytest.approx(norm.item(), rel=1e-5)
            clipped = Weights(*(None if g is None else g * 0.7 / norm for g in gradients))  # type: ignore[arg-type]
            other.step(clipped, lr=0.1, step=1)
        optimizer.step(gradients, lr=0.1, step=1, clip=clip)
        if scale is not None:
            for ours, theirs in zip(sae.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(optimizer.exp_avg.W_enc, other.exp_avg.W_enc)
        ends.append((sae, optimizer))
    for ours, theirs in zip(ends[0][0].parameters(), ends[2][0].parameters(), strict=True):
        assert torch.equal(ours, theirs)  # a norm that is never reached changes nothing


class FreeDecoder:
    """What `free_norms` must equal: the decoder's own rows are trained, by autograd and torch's Adam, dense."""

    def __init__(self, sae: MLSAE, lr: float, k: int, clip: float | None) -> None:
        weights = [t for t in sae.weights[:4] if t is not None]
        self.trained = [t.clone().requires_grad_() for t in weights]
        self.adam = torch.optim.Adam(self.trained, lr=lr, betas=(0.9, 0.999), eps=AdamStep.EPSILON)
        self.k, self.clip = k, clip

    def step(self, x: torch.Tensor) -> None:
        W_enc, d, b_pre, *bias = self.trained
        z = (x - b_pre) @ W_enc.T + (bias[0] if bias else 0)
        norms = d.norm(dim=1)
        values, indices = torch.topk(z * norms, self.k)
        active = torch.zeros_like(z).scatter(1, indices, values.relu())
        (x - (active / norms) @ d - b_pre).square().sum(1).mean().backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip, error_if_nonfinite=True)
        self.adam.step()
        self.adam.zero_grad()

    def folded(self) -> list[torch.Tensor]:
        W_enc, d, b_pre, *bias = (t.detach() for t in self.trained)
        n = d.norm(dim=1)
        return [W_enc * n[:, None], d / n[:, None], b_pre, *(b * n for b in bias)]


@pytest.mark.parametrize("name", ["torch", "numba"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_free_norms_are_a_decoder_without_constraint(name: str, bias: bool, clip: float | None) -> None:
    """In float64, over steps in which norms come to differ: the same autoencoder as dense autograd and torch's Adam."""
    generator = torch.Generator().manual_seed(5)
    sae = MLSAE(SAEConfig(d_model=5, n_latents=9, k=3, encoder_bias=bias)).double()
    sae.initialize(1, b_pre=torch.full((5,), 0.1))
    sae.requires_grad_(False)
    slow = FreeDecoder(sae, 0.03, 3, clip)
    kernels = choose_kernels(sae.W_enc, name)
    fast = SphereAdam(sae, kernels, free_norms=True)
    options: dict[str, Any] = {"k": 3, "aux_k": 1, "aux_coef": 0.0, "product_dtype": torch.float64, "tile_bytes": 2**20}
    rtol, atol = (1e-7, 1e-9) if clip is None else (1e-5, 1e-6)  # torch's clipping divides by the norm + 1e-6
    for step in range(1, 16):
        x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
        rows = row_weights(torch.zeros(12, dtype=torch.int64), x.new_ones(12, 1), x.new_ones(1), raw=False)
        dead = DeadLatents(9, 10**6)
        found = training_step(fast.weights, x, rows, dead, step_options(TopK(sae.config), **options), kernels)
        fast.step(found.gradients, lr=0.03, step=step, clip=clip)
        slow.step(x)
        for ours, theirs in zip(fast.weights[:4], slow.folded(), strict=False):
            assert ours is not None
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    assert fast.norms is not None
    assert fast.norms.std() > 0.01
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(9, dtype=torch.float64))


def test_free_norms_go_through_a_checkpoint() -> None:
    def make() -> SphereAdam:
        sae = MLSAE(SAEConfig(d_model=4, n_latents=6, k=2))
        sae.initialize(0)
        return SphereAdam(sae, TORCH, free_norms=True)

    one, fresh = make(), make()
    one.step(random_gradients(1), lr=0.1, step=1)
    fresh.load_state_dict(one.state_dict())
    for name in TRAINED[:3]:
        getattr(fresh.weights, name).copy_(getattr(one.weights, name))
    for optimizer in (one, fresh):
        optimizer.step(random_gradients(2), lr=0.1, step=2)
    assert all(torch.equal(a, b) for a, b in zip(fresh.weights[:3], one.weights[:3], strict=True))
    with pytest.raises(IncompatibleError, match=r"norms\.W_dec: expected \[6\], found None"):
        fresh.load_state_dict(make_optimizer().state_dict())


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
