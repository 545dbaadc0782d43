"""The hand-written backward pass against dense autograd in float64, and what AuxK must and must not do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.training import step_options, with_options
from train.kernels.choose import choose_kernels
from train.kernels.interface import Kernels
from train.kernels.plain import TORCH
from train.model_config import SAEConfig
from train.objective.losses import DeadLatents, RowWeights, row_weights
from train.objective.step import StepResult, training_step
from train.objective.variants import StepOptions, TopK
from train.objective.weights import Weights

NAMES = ("W_enc", "W_dec", "b_pre")
OPTIONS = step_options(
    TopK(SAEConfig(d_model=1, n_latents=1, k=1)),
    k=3,
    aux_k=4,
    aux_coef=1 / 32,
    product_dtype=torch.float64,
    tile_bytes=2**20,
)


def dense_step(weights: Weights, x: Tensor, rows: RowWeights, dead: Tensor, options: StepOptions) -> StepResult:
    """The same step with dense codes and autograd: what the fast path must equal."""
    W_enc, W_dec, b_pre = (w.clone().requires_grad_() for w in weights[:3])
    z = (x - b_pre) @ W_enc.T
    values, indices = torch.topk(z, options.k)
    x_hat = torch.zeros_like(z).scatter(1, indices, values.relu()) @ W_dec + b_pre
    loss = (rows.total * (x - x_hat).square().sum(1)).sum()
    aux = torch.zeros((), dtype=x.dtype)
    if options.objective.aux_coef > 0 and len(dead) > 0:
        e = (x - x_hat).detach() * rows.scale[:, None]
        k_aux = min(options.aux_k, len(dead))
        values, indices = torch.topk(z[:, dead], k_aux)
        active = torch.zeros(len(x), len(dead), dtype=x.dtype).scatter(1, indices, values.relu())
        e_hat = (active @ W_dec[dead]) * rows.scale[:, None]
        mean = (rows.share[:, None] * e).sum(0) / rows.share.sum()
        variance = (rows.share * (e - mean).square().sum(1)).sum()
        if variance > 1e-15 * (rows.share * e.square().sum(1)).sum():  # more than rounding
            aux = (rows.share * (e - e_hat).square().sum(1)).sum() / variance
    (loss + options.objective.aux_coef * aux).backward()
    grads = Weights(*(torch.zeros_like(w) if w.grad is None else w.grad for w in (W_enc, W_dec, b_pre)))
    error, active = (x - x_hat).detach(), (values > 0).sum()
    return StepResult(grads, error.square().sum(1), loss.detach(), aux.detach(), active, torch.tensor(0.0))


def planted(n_latents: int, dead: list[int]) -> DeadLatents:
    """A counter in which the latents `dead` have been silent for long."""
    counter = DeadLatents(n_latents, threshold=10**6)
    counter.silent[dead] = 10**9
    return counter


def random_case(n: int, d: int, m: int, seed: int, raw: bool) -> tuple[Weights, Tensor, RowWeights]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = torch.randint(0, 3, (n,), generator=generator)
    rows = row_weights(layer, randn(n, 1).abs() + 0.1, randn(3).abs() + 0.5, raw=raw)
    return Weights(randn(m, d), randn(m, d), randn(d)), randn(n, d), rows


def check(
    weights: Weights, x: Tensor, rows: RowWeights, dead: list[int], options: StepOptions, kernels: Kernels = TORCH
) -> StepResult:
    counter = planted(len(weights.W_enc), dead)
    fast = training_step(weights, x, rows, counter, options, kernels)
    slow = dense_step(weights, x, rows, counter.dead_latents(), options)  # after the counter saw this batch
    torch.testing.assert_close(fast.loss, slow.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast.auxk, slow.auxk, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast.squared_error, slow.squared_error, rtol=1e-10, atol=1e-10)
    for name, ours, theirs in zip(NAMES, fast.gradients, slow.gradients, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    return fast


@pytest.mark.parametrize("name", ["torch", "numba"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), raw=st.booleans(), aux=st.booleans(), seed=st.integers(0, 2**31))
def test_gradients_equal_dense_autograd(data: st.DataObject, name: str, raw: bool, aux: bool, seed: int) -> None:
    kernels = choose_kernels(torch.empty(0, dtype=torch.float64), name)
    n, d, m = (data.draw(st.integers(low, 12), label=name) for name, low in (("N", 1), ("D", 2), ("M", 1)))
    k = data.draw(st.sampled_from([1, max(1, m // 2), m]), label="k")
    dead = data.draw(st.lists(st.integers(0, m - 1), unique=True), label="dead") if aux else []
    aux_k = data.draw(st.integers(1, m), label="aux_k")
    tile_bytes = data.draw(st.sampled_from([1, 300, 2**20]), label="tile_bytes")
    weights, x, rows = random_case(n, d, m, seed, raw)
    check(weights, x, rows, dead, with_options(OPTIONS, k=k, aux_k=aux_k, aux_coef=0.5, tile_bytes=tile_bytes), kernels)


def test_gradients_where_every_pre_activation_is_negative() -> None:
    weights, x, rows = random_case(5, 4, 6, seed=1, raw=False)
    x = x.abs() + 5
    weights = weights._replace(W_enc=-weights.W_enc.abs(), b_pre=torch.zeros_like(weights.b_pre))
    result = check(weights, x, rows, [0, 1], OPTIONS)
    assert result.active == 0
    assert result.gradients.W_enc.count_nonzero() == 0


def test_gradients_with_tied_pre_activations() -> None:
    weights, x, rows = random_case(5, 4, 6, seed=2, raw=True)
    weights = weights._replace(W_enc=weights.W_enc[:1].expand(6, -1).clone(), W_dec=weights.W_dec[:1].expand(6, -1))
    # Which of the tied latents are taken is free, so only what does not depend on it is compared.
    fast = training_step(weights, x, rows, planted(6, []), OPTIONS, TORCH)
    slow = dense_step(weights, x, rows, torch.tensor([], dtype=torch.int64), OPTIONS)
    torch.testing.assert_close(fast.loss, slow.loss)
    torch.testing.assert_close(fast.gradients.b_pre, slow.gradients.b_pre)
    torch.testing.assert_close(fast.gradients.W_enc.sum(0), slow.gradients.W_enc.sum(0))
    torch.testing.assert_close(fast.gradients.W_dec.sum(0), slow.gradients.W_dec.sum(0))


def test_a_step_by_hand() -> None:
    """D = 2, one row, two latents, k = 1: every number worked out on paper."""
    weights = Weights(
        W_enc=torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64),
        W_dec=torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64),
        b_pre=torch.tensor([1.0, 0.0], dtype=torch.float64),
    )
    x = torch.tensor([[4.0, 1.0]], dtype=torch.float64)
    rows = row_weights(torch.tensor([0]), torch.tensor([[2.0]]).double(), torch.tensor([5.0]).double(), raw=True)
    assert rows.total.tolist() == [2.0**2 / 5]  # one row: std^2 / denominator
    got = training_step(weights, x, rows, planted(2, []), with_options(OPTIONS, k=1), TORCH)
    # z = (3, 1): latent 0 with value 3; x_hat = 3 (0, 1) + (1, 0) = (1, 3); e = (3, -2); |e|^2 = 13; c = 0.8
    assert got.loss.item() == pytest.approx(0.8 * 13)
    # G = -2 c e = (-4.8, 3.2); g = <G, (0, 1)> = 3.2
    assert got.gradients.W_dec.flatten().tolist() == pytest.approx([3 * -4.8, 3 * 3.2, 0, 0])
    assert got.gradients.W_enc.flatten().tolist() == pytest.approx([3.2 * 3, 3.2 * 1, 0, 0])
    assert got.gradients.b_pre.tolist() == pytest.approx([-4.8 - 3.2, 3.2])


def test_auxk_is_zero_and_costs_nothing_when_nothing_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake 2: AuxK active when nothing is dead."""
    weights, x, rows = random_case(4, 3, 5, seed=3, raw=False)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("AuxK was computed although no latent is dead")

    monkeypatch.setattr("train.objective.step.auxk", refuse)
    result = training_step(weights, x, rows, planted(5, []), OPTIONS, TORCH)
    assert result.auxk.item() == 0.0


def test_auxk_by_hand_in_raw_space() -> None:
    """Mistake 2: AuxK reconstructing in one space and compared in another. The rows' scales are 1 and 3."""
    weights = Weights(  # latent 0 fires on both rows; latent 1 is dead and always just below it
        W_enc=torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64),
        W_dec=torch.tensor([[0.0, 1.0], [0.5, 0.0]], dtype=torch.float64),
        b_pre=torch.zeros(2, dtype=torch.float64),
    )
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    std = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    rows = row_weights(torch.tensor([0, 0]), std, torch.tensor([1.0]).double(), raw=True)
    got = training_step(weights, x, rows, planted(2, [1]), with_options(OPTIONS, k=1, aux_k=1), TORCH)
    # e = (1, 0) and (3, 0), in raw space (1, 0) and (9, 0); e_hat = (0.5, 0) and (4.5, 0) there
    # error about its mean 5: (16 + 16) / 2 = 16; missed: (0.25 + 20.25) / 2 = 10.25
    assert got.auxk.item() == pytest.approx(10.25 / 16)


def test_the_error_of_auxk_is_detached() -> None:
    """Mistake 2: the gradients of AuxK reach the dead latents and b_pre's centring, and no live latent."""
    weights, x, rows = random_case(6, 4, 8, seed=4, raw=False)
    dead = [5, 6, 7]
    weights.W_enc[dead] = -1e-3 * weights.W_enc[dead]
    off = training_step(weights, x, rows, planted(8, dead), with_options(OPTIONS, aux_coef=0), TORCH)
    on = training_step(weights, x, rows, planted(8, dead), with_options(OPTIONS, aux_coef=1.0), TORCH)
    live = [j for j in range(8) if j not in planted_after(weights, x, dead)]
    assert on.auxk > 0
    torch.testing.assert_close(on.gradients.W_enc[live], off.gradients.W_enc[live], rtol=0, atol=0)
    torch.testing.assert_close(on.gradients.W_dec[live], off.gradients.W_dec[live], rtol=0, atol=0)


def planted_after(weights: Weights, x: Tensor, dead: list[int]) -> list[int]:
    """Which of `dead` are still dead once the batch has been seen."""
    counter = planted(len(weights.W_enc), dead)
    values, indices = torch.topk((x - weights.b_pre) @ weights.W_enc.T, OPTIONS.k)
    fired = set(indices[values > 1e-3].tolist())
    return [j for j in counter.dead_latents().tolist() if j not in fired]


def test_auxk_trains_the_encoder() -> None:
    """Mistake 11: a sparse encoder backward that ignores other users of the pre-activations."""
    weights, x, rows = random_case(6, 4, 8, seed=4, raw=False)
    weights.W_enc[5:] *= 1e-3  # too small for the top k, yet positive somewhere
    result = training_step(weights, x, rows, planted(8, [5, 6, 7]), OPTIONS, TORCH)
    assert result.gradients.W_enc[5:].count_nonzero() > 0


def test_a_perfect_reconstruction_gives_no_nan() -> None:
    """NaN becomes zero: with no error there is no variance to divide by."""
    weights, _, _ = random_case(4, 3, 5, seed=5, raw=False)
    x = weights.b_pre.expand(4, -1).clone()
    rows = row_weights(torch.zeros(4, dtype=torch.int64), torch.ones(4, 1).double(), torch.ones(1).double(), raw=False)
    result = training_step(weights, x, rows, planted(5, [0, 1, 2, 3, 4]), OPTIONS, TORCH)
    assert result.auxk.item() == 0
    assert all(g.isfinite().all() for g in result.gradients[:3])
