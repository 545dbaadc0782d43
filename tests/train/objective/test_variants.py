"""Each variant's loss and gradients against dense autograd in float64, and its codes in inference by hand."""

from typing import Any, NamedTuple, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.codes import dense, exact_draws
from tests.support.training import step_options, with_options
from train.formats import hub, saelens
from train.kernels.choose import choose_kernels
from train.kernels.interface import Kernels
from train.kernels.plain import TORCH
from train.model import MLSAE
from train.model_config import THRESHOLDED, Activation, SAEConfig, default_prefixes
from train.objective.losses import DeadLatents, RowWeights, row_weights
from train.objective.step import training_step
from train.objective.variants import THRESHOLD_RATE, VARIANTS, StepOptions, variant_of
from train.objective.weights import TRAINED, Weights

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class JumpReLU(torch.autograd.Function):
    """z where z > threshold, with the straight-through gradients of Rajamanoharan et al. 2024, eq. 11 and 12."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        z, threshold = ctx.saved_tensors
        kernel = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype)
        return grad * (z > threshold), (-(threshold / ctx.bandwidth) * kernel * grad).sum(0), None


class Step(torch.autograd.Function):
    """1 where z > threshold, whose gradient reaches the threshold only."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        z, threshold = ctx.saved_tensors
        kernel = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype)
        return None, (-kernel / ctx.bandwidth * grad).sum(0), None


class Dense(NamedTuple):
    """What the step must give."""

    loss: Tensor
    sparsity: Tensor
    auxk: Tensor
    gradients: dict[str, Tensor]
    error: Tensor
    active: int


def largest(z: Tensor, k: int) -> Tensor:
    """[n, k] the k largest of each row of `z`, of equal ones the first."""
    return z.sort(dim=1, descending=True, stable=True).indices[:, :k]


def dense_step(weights: Weights, x: Tensor, rows: RowWeights, dead: Tensor, options: StepOptions) -> Dense:
    """The step with dense codes and autograd, written from the formulas."""
    config = options.variant.config
    w = {name: t.clone().requires_grad_() for name in TRAINED if (t := getattr(weights, name)) is not None}
    inputs = x - w["b_pre"] if config.apply_b_dec_to_input else x
    z = inputs @ w["W_enc"].T + w.get("b_enc", torch.zeros(()))
    n, m = z.shape
    kind, sparsity = config.activation, torch.zeros((), dtype=x.dtype)

    def kept(chosen: Tensor) -> Tensor:
        return z * torch.zeros_like(z).scatter(1, chosen, 1.0) * (z > 0)

    def error_of(code: Tensor) -> Tensor:
        return x - (code @ w["W_dec"] + w["b_pre"])

    def square(code: Tensor) -> Tensor:
        return (rows.total * error_of(code).square().sum(1)).sum()

    if kind == "topk":
        h = kept(largest(z, options.k))
        loss = square(h)
        if options.objective.multi_topk:
            loss = loss + square(kept(largest(z, min(4 * options.k, m)))) / 8
    elif kind in ("batchtopk", "matryoshka"):
        flat = z.reshape(1, -1)
        h = (flat * torch.zeros_like(flat).scatter(1, largest(flat, options.k * n), 1.0) * (flat > 0)).view(n, m)
        loss = square(h)
        for size in config.prefixes[:-1]:
            loss = loss + square(h * (torch.arange(m) < size))
    elif kind == "jumprelu":
        threshold = w["log_threshold"].exp()
        h = JumpReLU.apply(z, threshold, options.objective.bandwidth)
        loss, l0 = square(h), Step.apply(z, threshold, options.objective.bandwidth).sum(1)
        if options.objective.sparsity_loss == "target":
            sparsity = options.sparsity_coef * (l0.mean() / options.k - 1) ** 2
        else:
            sparsity = options.sparsity_coef * (rows.total * l0).sum()
    else:
        assert kind == "relu", f"the step of {kind} is to be written from its formula here"
        h = z.relu()
        loss, sparsity = square(h), options.sparsity_coef * (rows.total * h.sum(1)).sum()

    aux, error = torch.zeros((), dtype=x.dtype), error_of(h).detach()
    if options.objective.aux_coef > 0 and len(dead) > 0:
        e, near = error * rows.scale[:, None], z[:, dead]
        chosen = torch.zeros_like(near).scatter(1, largest(near, options.aux_k), 1.0)
        e_hat = ((near * chosen).relu() @ w["W_dec"][dead]) * rows.scale[:, None]
        mean = (rows.share[:, None] * e).sum(0) / rows.share.sum()
        variance = (rows.share * (e - mean).square().sum(1)).sum()
        if variance > 1e-15 * (rows.share * e.square().sum(1)).sum():
            aux = (rows.share * (e - e_hat).square().sum(1)).sum() / variance
    (loss + sparsity + options.objective.aux_coef * aux).backward()
    gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in w.items()}
    return Dense(loss.detach(), sparsity.detach(), aux.detach(), gradients, error, int((h > 0).sum()))


def make_options(config: SAEConfig, **changes: Any) -> StepOptions:
    fields = {"k": config.k, "aux_k": 4, "aux_coef": 0.5, "product_dtype": torch.float64, "tile_bytes": 300}
    return step_options(variant_of(config), **{**fields, "sparsity_coef": 0.3, "bandwidth": 1.5, **changes})


def make_case(config: SAEConfig, n: int, seed: int, how: str) -> tuple[Weights, Tensor, RowWeights]:
    """Random weights and rows; "grid": small whole numbers, so that many pre-activations tie exactly; "twins": rows and
    latents in equal pairs, of numbers whose products are exact; "negative": no pre-activation is positive."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if how == "grid":
            return torch.randint(-1, 2, shape, generator=generator).double()
        if how == "twins":
            return exact_draws(*shape, generator=generator, dtype=torch.float64)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    d, m = config.d_model, config.n_latents
    weights = Weights(draw(m, d), draw(m, d), draw(d), b_enc=draw(m) if config.encoder_bias else None)
    x = draw(n, d)
    if how == "twins":
        x, weights = x[torch.arange(n) // 2], weights._replace(W_enc=weights.W_enc[torch.arange(m) // 2])
    if how == "negative":
        weights = weights._replace(W_enc=-weights.W_enc.abs(), b_pre=torch.zeros(d).double())
        x = x.abs()
        weights = weights._replace(b_enc=None if weights.b_enc is None else -weights.b_enc.abs())
    for name, value in variant_of(config).extra_state().items():
        if name == "log_threshold":
            value = 0.3 * torch.randn(value.shape, generator=generator) - 0.7
        weights = weights._replace(**{name: value.double()})
    layer = torch.randint(0, 3, (n,), generator=generator)
    std = torch.rand(n, 1, generator=generator).double() + 0.5
    return weights, x, row_weights(layer, std, torch.tensor([1.0, 2.0, 0.5]).double(), raw=bool(seed % 2))


def check(
    config: SAEConfig,
    case: tuple[Weights, Tensor, RowWeights],
    dead: list[int],
    options: StepOptions,
    kernels: Kernels,
    device: str = "cpu",
) -> None:
    weights, x, rows = case
    counter = DeadLatents(config.n_latents, threshold=10**6, device=torch.device(device))
    counter.silent[dead] = 10**9
    there = weights._replace(**{name: t.to(device) for name, t in weights._asdict().items() if t is not None})
    fast = training_step(there, x.to(device), RowWeights(*(t.to(device) for t in rows)), counter, options, kernels)
    slow = dense_step(weights, x, rows, counter.dead_latents().cpu(), options)  # after the counter saw this batch
    for name in ("loss", "sparsity", "auxk"):
        torch.testing.assert_close(getattr(fast, name).cpu(), getattr(slow, name), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(fast.squared_error.cpu(), slow.error.square().sum(1), rtol=1e-10, atol=1e-10)
    assert fast.active == slow.active
    for name, expected in slow.gradients.items():
        found = getattr(fast.gradients, name).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert fast.gradients.threshold is None


VARIANT_OPTIONS = [
    *((activation, {}) for activation in get_args(Activation)),
    ("topk", {"multi_topk": True}),
    ("jumprelu", {"sparsity_loss": "penalty"}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("activation", "changes"), VARIANT_OPTIONS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_gradients_equal_dense_autograd(data: st.DataObject, activation: Any, changes: dict, device: str) -> None:
    n, d, m = (data.draw(st.integers(low, 9), label=name) for name, low in (("N", 1), ("D", 2), ("M", 1)))
    how = data.draw(st.sampled_from(["random", "grid", "twins", "negative"]), label="how")
    config = SAEConfig(
        d_model=d,
        n_latents=m,
        k=data.draw(st.sampled_from([1, max(1, m // 2), m]), label="k"),
        activation=activation,
        encoder_bias=data.draw(st.booleans(), label="encoder bias"),
        apply_b_dec_to_input=data.draw(st.booleans(), label="b_dec"),
        prefixes=data.draw(st.sets(st.integers(1, m)).map(lambda sizes: tuple(sorted(sizes | {m}))), label="prefixes")
        if activation == "matryoshka"
        else (),
    )
    dead = data.draw(st.lists(st.integers(0, m - 1), unique=True), label="dead")
    aux_k = data.draw(st.integers(1, m), label="aux_k")
    tile_bytes = data.draw(st.sampled_from([1, 300, 2**20]), label="tile_bytes")
    case = make_case(config, n, data.draw(st.integers(0, 2**31), label="seed"), how)
    options = make_options(config, aux_k=aux_k, tile_bytes=tile_bytes, **changes)
    # Of equal pre-activations the dense step takes the first; torch takes any, and in float64 so do those for CUDA.
    compiled, exact_ties = "triton" if device == "cuda" else "numba", how in ("grid", "twins")
    assume(device == "cpu" or not exact_ties)
    for name in [compiled] if exact_ties else [compiled, "torch"]:
        kernels = choose_kernels(torch.empty(0, dtype=torch.float64, device=device), name)
        check(config, case, dead, options, kernels, device)


def test_a_matryoshka_step_by_hand() -> None:
    """D = 2, one row, two latents, prefixes 1 and 2: the first latent's gradient is of both losses."""
    config = SAEConfig(d_model=2, n_latents=2, k=2, activation="matryoshka", prefixes=(1, 2))
    weights = Weights(
        W_enc=torch.eye(2).double(),
        W_dec=torch.tensor([[1.0, 0.0], [0.6, 0.8]]).double(),
        b_pre=torch.zeros(2).double(),
        threshold=torch.zeros(()).double(),
    )
    x = torch.tensor([[3.0, 1.0]]).double()
    rows = row_weights(torch.tensor([0]), torch.ones(1, 1).double(), torch.ones(1).double(), raw=False)
    found = training_step(weights, x, rows, DeadLatents(2, 99), make_options(config, aux_coef=0.0), TORCH)
    # h = (3, 1); first: e = (3, 1) - 3 (1, 0) = (0, 1); both: e = (0, 1) - (0.6, 0.8) = (-0.6, 0.2)
    assert found.loss.item() == pytest.approx(1.0 + 0.4)
    assert found.squared_error.tolist() == pytest.approx([0.4])  # of the whole code
    # G = (0, -2) and (1.2, -0.4); the first latent's is their sum (1.2, -2.4), the second's the last alone
    assert found.gradients.W_dec.flatten().tolist() == pytest.approx([3 * 1.2, 3 * -2.4, 1.2, -0.4])
    assert found.gradients.W_enc.flatten().tolist() == pytest.approx([1.2 * 3, 1.2 * 1, 0.4 * 3, 0.4 * 1])
    assert weights.threshold.item() == 1.0  # type: ignore[union-attr]


def test_a_jumprelu_step_by_hand() -> None:
    """Two latents with threshold 1, bandwidth 1: z = 1.2 is active and near, z = 0.8 is near only."""
    config = SAEConfig(d_model=2, n_latents=2, k=1, activation="jumprelu")
    weights = Weights(
        W_enc=torch.eye(2).double(),
        W_dec=torch.eye(2).double(),
        b_pre=torch.zeros(2).double(),
        log_threshold=torch.zeros(2).double(),
    )
    x = torch.tensor([[1.2, 0.8]]).double()
    rows = row_weights(torch.tensor([0]), torch.ones(1, 1).double(), torch.ones(1).double(), raw=False)
    options = make_options(config, aux_coef=0.0, bandwidth=1.0, sparsity_loss="penalty", sparsity_coef=0.5)
    found = training_step(weights, x, rows, DeadLatents(2, 99), options, TORCH)
    # h = (1.2, 0); e = (0, 0.8); d loss / d h = -2 e = (0, -1.6)
    assert found.loss.item() == pytest.approx(0.64)
    assert found.sparsity.item() == pytest.approx(0.5)
    assert found.active == 1
    # d / d log threshold = -threshold / bandwidth (threshold d loss / d h + coefficient)
    assert found.gradients.log_threshold.tolist() == pytest.approx([-(0 + 0.5), -(-1.6 + 0.5)])  # type: ignore[union-attr]
    target = with_options(options, sparsity_loss="target", sparsity_coef=2.0, k=2)
    found = training_step(weights, x, rows, DeadLatents(2, 99), target, TORCH)
    assert found.sparsity.item() == pytest.approx(2 * (1 / 2 - 1) ** 2)  # one active, two aimed at
    slope = 2 * 2 * (1 / 2 - 1) / 2  # of the term by the number of active ones
    assert found.gradients.log_threshold.tolist() == pytest.approx([-slope, -(-1.6 + slope)])  # type: ignore[union-attr]


@pytest.mark.parametrize("activation", ["batchtopk", "matryoshka"])
def test_the_threshold_of_inference_is_the_running_mean_of_the_smallest_kept(activation: Any) -> None:
    """Bussmann et al. 2024: in training the k N largest of a batch, in inference all above the threshold."""
    prefixes = (3, 8) if activation == "matryoshka" else ()
    config = SAEConfig(d_model=4, n_latents=8, k=2, activation=activation, prefixes=prefixes)
    sae = MLSAE(config)
    sae.initialize(0)
    rows = row_weights(torch.zeros(6, dtype=torch.int64), torch.ones(6, 1), torch.ones(1), raw=False)
    options = make_options(config, product_dtype=torch.float32, aux_coef=0.0)
    expected = None
    for seed in range(4):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        smallest = (x @ sae.W_enc.T).flatten().sort(descending=True).values[2 * 6 - 1].item()
        rate = THRESHOLD_RATE
        expected = smallest if expected is None else (1 - rate) * expected + rate * smallest
        training_step(sae.weights, x, rows, DeadLatents(8, 99), options, TORCH)
        assert sae.threshold.item() == pytest.approx(expected, rel=1e-6)
    x = torch.randn(50, 4)
    z = (sae.standardize(x).x - sae.b_pre) @ sae.W_enc.T
    torch.testing.assert_close(dense(*sae.encode(x), 8), z * (z > sae.threshold))


def test_the_first_batch_gives_jumprelu_its_thresholds() -> None:
    """Until then thresholds are 0. The first batch sets them to let k latents per row through; others train them."""
    config = SAEConfig(d_model=4, n_latents=8, k=2, activation="jumprelu")
    sae = MLSAE(config)
    sae.initialize(0)
    assert sae.log_threshold.exp().tolist() == [0.0] * 8
    x = torch.randn(6, 4)
    rows = row_weights(torch.zeros(6, dtype=torch.int64), torch.ones(6, 1), torch.ones(1), raw=False)
    options = make_options(config, product_dtype=torch.float32, aux_coef=0.0)
    found = training_step(sae.weights, x, rows, DeadLatents(8, 99), options, TORCH)
    smallest = (x @ sae.W_enc.T).flatten().sort(descending=True).values[2 * 6 - 1].item()
    assert sae.log_threshold.exp().tolist() == pytest.approx([smallest] * 8)
    assert found.active in (11, 12)  # the smallest itself is not above its threshold, but for rounding
    training_step(sae.weights, 3 * x, rows, DeadLatents(8, 99), options, TORCH)
    assert sae.log_threshold.exp().tolist() == pytest.approx([smallest] * 8)


def test_inference_of_jumprelu_and_relu() -> None:
    for activation in ("jumprelu", "relu"):
        sae = MLSAE(SAEConfig(d_model=4, n_latents=8, k=2, activation=activation, encoder_bias=True))  # type: ignore[arg-type]
        sae.initialize(0)
        sae.b_enc.data.uniform_(-1, 1)
        threshold = torch.zeros(8)
        if activation == "jumprelu":
            sae.log_threshold.data.uniform_(-1, 0.5)
            threshold = sae.log_threshold.exp()
        x = torch.randn(50, 4)
        z = (sae.standardize(x).x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
        torch.testing.assert_close(dense(*sae.encode(x), 8), z * (z > threshold))


def test_without_subtraction_the_encoder_sees_the_vector_itself() -> None:
    sae = MLSAE(SAEConfig(d_model=4, n_latents=8, k=3, apply_b_dec_to_input=False))
    sae.initialize(0, b_pre=torch.tensor([1.0, -2.0, 0.5, 3.0]))
    x = torch.randn(9, 4)
    x_std, mean, std = sae.standardize(x)
    z = x_std @ sae.W_enc.T
    h = torch.zeros_like(z).scatter(1, z.topk(3).indices, 1.0) * z.relu()
    torch.testing.assert_close(sae(x).x_hat, (h @ sae.W_dec + sae.b_pre) * std + mean)


def test_every_activation_has_a_variant_and_a_name_for_other_tools() -> None:
    names = set(get_args(Activation))
    assert set(VARIANTS) == set(saelens._ARCHITECTURES) == set(hub._NAMES) == names
    assert set(THRESHOLDED) < names
    assert default_prefixes(3200) == (100, 300, 700, 1500, 3200)
    assert default_prefixes(2) == (1, 2)
    assert default_prefixes(1) == (1,)
