"""Each variant's loss and gradients against dense autograd in float64, and its codes in inference by hand."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.kernels import Kernels, choose_kernels
from train.losses import DeadLatents, RowWeights, row_weights
from train.sae_config import SAEConfig
from train.step import StepOptions, training_step
from train.variants import variant_of
from train.weights import TRAINED, Weights

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
        if options.multi_topk:
            loss = loss + square(kept(largest(z, min(4 * options.k, m)))) / 8
    elif kind in ("batchtopk", "matryoshka"):
        flat = z.reshape(1, -1)
        h = (flat * torch.zeros_like(flat).scatter(1, largest(flat, options.k * n), 1.0) * (flat > 0)).view(n, m)
        loss = square(h)
        for size in config.prefixes[:-1]:
            loss = loss + square(h * (torch.arange(m) < size))
    elif kind == "jumprelu":
        threshold = w["log_threshold"].exp()
        h = JumpReLU.apply(z, threshold, options.bandwidth)
        loss, l0 = square(h), Step.apply(z, threshold, options.bandwidth).sum(1)
        if options.sparsity_loss == "target":
            sparsity = options.sparsity_coef * (l0.mean() / options.k - 1) ** 2
        else:
            sparsity = options.sparsity_coef * (rows.total * l0).sum()
    else:
        h = z.relu()
        loss, sparsity = square(h), options.sparsity_coef * (rows.total * h.sum(1)).sum()

    aux, error = torch.zeros((), dtype=x.dtype), error_of(h).detach()
    if options.aux_coef > 0 and len(dead) > 0:
        e, near = error * rows.scale[:, None], z[:, dead]
        chosen = torch.zeros_like(near).scatter(1, largest(near, options.aux_k), 1.0)
        e_hat = ((near * chosen).relu() @ w["W_dec"][dead]) * rows.scale[:, None]
        mean = (rows.share[:, None] * e).sum(0) / rows.share.sum()
        variance = (rows.share * (e - mean).square().sum(1)).sum()
        if variance > 1e-15 * (rows.share * e.square().sum(1)).sum():
            aux = (rows.share * (e - e_hat).square().sum(1)).sum() / variance
    (loss + sparsity + options.aux_coef * aux).backward()
    gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in w.items()}
    return Dense(loss.detach(), sparsity.detach(), aux.detach(), gradients, error, int((h > 0).sum()))


def make_options(config: SAEConfig, **changes: Any) -> StepOptions:
    fields = {"k": config.k, "aux_k": 4, "aux_coef": 0.5, "product_dtype": torch.float64, "tile_bytes": 300}
    return StepOptions(variant=variant_of(config), **{**fields, "sparsity_coef": 0.3, "bandwidth": 1.5, **changes})


def make_case(config: SAEConfig, n: int, seed: int, how: str) -> tuple[Weights, Tensor, RowWeights]:
    """Random weights and rows; "grid": small whole numbers, so that many pre-activations tie exactly; "twins": rows and
    latents in equal pairs; "negative": no pre-activation is positive."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if how == "grid":
            return torch.randint(-1, 2, shape, generator=generator).double()
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
        noise = 0.3 * torch.randn(value.shape, generator=generator) if name == "log_threshold" else 0.0
        weights = weights._replace(**{name: (value + noise).double()})
    layer = torch.randint(0, 3, (n,), generator=generator)
    std = torch.rand(n, 1, generator=generator).double() + 0.5
    return weights, x, row_weights(layer, std, torch.tensor([1.0, 2.0, 0.5]).double(), raw=bool(seed % 2))


def check(
    config: SAEConfig, case: tuple[Weights, Tensor, RowWeights], dead: list[int], options: StepOptions, kernels: Kernels
) -> None:
    weights, x, rows = case
    counter = DeadLatents(config.n_latents, threshold=10**6, device=x.device)
    counter.silent[dead] = 10**9
    fast = training_step(weights, x, rows, counter, options, kernels)
    slow = dense_step(weights, x, rows, counter.dead_latents(), options)  # after the counter saw this batch
    for name in ("loss", "sparsity", "auxk"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(fast.squared_error, slow.error.square().sum(1), rtol=1e-10, atol=1e-10)
    assert fast.active == slow.active
    for name, expected in slow.gradients.items():
        found = getattr(fast.gradients, name)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert fast.gradients.threshold is None


VARIANT_OPTIONS = [
    ("topk", {}),
    ("topk", {"multi_topk": True}),
    ("batchtopk", {}),
    ("matryoshka", {}),
    ("jumprelu", {"sparsity_loss": "target"}),
    ("jumprelu", {"sparsity_loss": "penalty"}),
    ("relu", {}),
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
    # Of equal pre-activations the compiled kernels take the first, as the dense step does; torch takes any.
    exact_ties = how in ("grid", "twins")
    names = ["torch"] if device == "cuda" else ["numba"] if exact_ties else ["numba", "torch"]
    for name in names:
        check(config, case, dead, options, choose_kernels(torch.empty(0, dtype=torch.float64), name))
