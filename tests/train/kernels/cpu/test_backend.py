"""The compiled kernels against short dense versions, and what they promise beyond values: bits, threads, errors."""

import multiprocessing
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.codes import dense
from train.config import ObjectiveConfig
from train.kernels.cpu.backend import NUMBA
from train.kernels.interface import AdamStep, Kernels, Reconstruction, SparseCodes, WeightGradients
from train.kernels.plain import TORCH
from train.model_config import SAEConfig
from train.objective.losses import DeadLatents, row_weights
from train.objective.step import training_step
from train.objective.variants import StepOptions, TopK
from train.objective.weights import Weights

FLOATS = {torch.float32: 1e-4, torch.float64: 1e-11}  # type -> relative tolerance of sums
BOTH = pytest.mark.parametrize("kernels", [TORCH, NUMBA], ids=lambda kernels: kernels.name)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives torch its number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sparse_case(n: int, d: int, m: int, k: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Codes with zeros and, over the rows, with duplicates; and everything else that the kernels take."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    indices = torch.stack([torch.randperm(m, generator=generator)[:k] for _ in range(n)])
    return {
        "values": randn(n, k).relu(),
        "value_grads": randn(n, k) * (randn(n, k) > 0),
        "indices": indices,
        "W_dec": randn(m, d),
        "grad_out": randn(n, d),
        "x": randn(n, d),
        "weight": randn(n).abs(),
    }


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float, name: str = "") -> None:
    """Equal type, shape and, to `tolerance` relative and absolute, values."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name} {text}")


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 30))


@BOTH
@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=SHAPES, dtype=st.sampled_from(list(FLOATS)), seed=st.integers(0, 2**31))
def test_sparse_products_equal_dense_ones(
    kernels: Kernels, data: st.DataObject, shape: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    n, d, m = shape
    k = data.draw(st.one_of(st.sampled_from([1, m]), st.integers(1, m)), label="k")
    case = sparse_case(n, d, m, k, dtype, seed)
    values, indices, W_dec = case["values"], case["indices"], case["W_dec"]
    grad_out, x, value_grads = case["grad_out"], case["x"], case["value_grads"]

    assert_near(kernels.decode(values, indices, W_dec), dense(values, indices, m) @ W_dec, FLOATS[dtype])
    expected = (grad_out @ W_dec.T).gather(1, indices)
    assert_near(kernels.activation_gradient(grad_out, indices, W_dec), expected, FLOATS[dtype])

    codes, memory = SparseCodes(values, indices), WeightGradients.zeros_like(W_dec)
    got = kernels.weight_gradients(codes, value_grads, grad_out, x, memory)
    assert_near(got.W_dec, dense(values, indices, m).T @ grad_out, FLOATS[dtype])
    assert_near(got.W_enc, dense(value_grads, indices, m).T @ x, FLOATS[dtype])
    assert_near(got.latent_sums, dense(value_grads, indices, m).sum(dim=0), FLOATS[dtype])


@BOTH
@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, k=st.integers(1, 5), dtype=st.sampled_from(list(FLOATS)), seed=st.integers(0, 2**31))
def test_reconstruct_equals_autograd(
    kernels: Kernels, shape: tuple[int, int, int], k: int, dtype: torch.dtype, seed: int
) -> None:
    n, d, m = shape
    case = sparse_case(n, d, m, min(k, m), dtype, seed)
    z = case["value_grads"].clone().requires_grad_()  # of either sign, some zero
    decoded = dense(z.relu(), case["indices"], m) @ case["W_dec"]
    decoded.retain_grad()
    error = case["x"] - decoded
    (case["weight"] * error.square().sum(dim=1)).sum().backward()
    got = kernels.reconstruct(SparseCodes(z.relu(), case["indices"]), case["W_dec"], case["x"], case["weight"])
    expected = Reconstruction(error, decoded.grad, error.square().sum(dim=1), z.grad)  # type: ignore[arg-type]
    for name, ours, theirs in zip(Reconstruction._fields, got, expected, strict=True):
        assert_near(ours, theirs.detach(), 10 * FLOATS[dtype], name)


def weight_gradient(coefficients: Tensor, indices: Tensor, rows: Tensor, n_latents: int) -> Tensor:
    """That of W_enc alone."""
    memory = WeightGradients.zeros_like(torch.full((n_latents, rows.shape[1]), torch.nan))
    return NUMBA.weight_gradients(SparseCodes(coefficients, indices), coefficients, rows, rows, memory).W_enc


def test_latents_named_twice_in_a_row_count_twice() -> None:
    indices = torch.tensor([[2, 2, 0], [2, 0, 0]])
    coefficients = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    got = weight_gradient(coefficients, indices, rows, 4)
    assert got.tolist() == [[4, 48], [0, 0], [3, 8], [0, 0]]
    assert NUMBA.decode(coefficients, indices, got).tolist() == [[3 * 3 + 4 * 4, 3 * 8 + 4 * 48], [216, 2368]]


def test_pairs_without_a_coefficient_are_not_read() -> None:
    """Rows that no pair uses may hold anything."""
    rows = torch.tensor([[torch.nan, torch.inf], [1.0, 2.0]])
    got = weight_gradient(torch.tensor([[0.0], [3.0]]), torch.tensor([[1], [1]]), rows, 2)
    assert got.tolist() == [[0, 0], [3, 6]]


def test_no_rows() -> None:
    codes = NUMBA.topk_relu(torch.empty(0, 5), 2)
    x, W_dec = torch.empty(0, 3), torch.randn(5, 3)
    assert codes.values.shape == codes.indices.shape == (0, 2)
    assert NUMBA.decode(*codes, W_dec).shape == (0, 3)
    assert NUMBA.reconstruct(codes, W_dec, x, torch.empty(0)).value_grads.shape == (0, 2)
    memory = WeightGradients.zeros_like(W_dec)
    assert NUMBA.weight_gradients(codes, codes.values, x, x, memory).W_enc.tolist() == [[0] * 3] * 5


def test_given_memory_is_used() -> None:
    case = sparse_case(6, 5, 7, 2, torch.float32, seed=0)
    codes = SparseCodes(case["values"], case["indices"])
    args = (codes, case["value_grads"], case["grad_out"], case["x"], WeightGradients.zeros_like(case["W_dec"]))
    out = NUMBA.weight_gradients(*args)
    expected = [t.clone() for t in out]
    for tensor in out:
        tensor.fill_(torch.nan)
    again = NUMBA.weight_gradients(*args)
    assert all(a is b for a, b in zip(again, out, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("unit_rows", [True, False])
def test_adam_equals_torchs_with_projection_and_normalisation(
    kernels: Kernels, dtype: torch.dtype, unit_rows: bool
) -> None:
    weight = torch.nn.functional.normalize(torch.randn(300, 37, dtype=dtype))
    theirs = torch.nn.Parameter(weight.clone())
    adam = torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, 0.999), eps=6.25e-10)
    exp_avg, exp_avg_sq = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 8):
        grad = torch.randn_like(weight) * (torch.rand(300, 1) > 0.3)  # latents without a gradient move too
        adam.param_groups[0]["lr"] = lr = 1e-2 / step
        along = (grad * theirs.detach()).sum(dim=1, keepdim=True) * theirs.detach() if unit_rows else 0
        theirs.grad = grad - along
        adam.step()
        if unit_rows:
            theirs.data /= theirs.data.norm(dim=1, keepdim=True)
        kernels.adam_rows(weight, grad.clone(), exp_avg, exp_avg_sq, AdamStep(lr=lr, step=step, unit_rows=unit_rows))
    assert_near(weight, theirs.data, FLOATS[dtype])
    if unit_rows:
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(300, dtype=dtype), rtol=1e-6, atol=0)


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("unit_rows", [True, False])
def test_adam_with_mean_squares_by_row_equals_a_naive_one(
    kernels: Kernels, dtype: torch.dtype, unit_rows: bool
) -> None:
    weight = torch.nn.functional.normalize(torch.randn(300, 37, dtype=dtype))
    columns, naive = torch.rand(37, dtype=dtype) + 0.5, weight.clone()
    m, v = torch.zeros_like(weight), weight.new_zeros(300, 1)
    mean, square = torch.zeros_like(weight), weight.new_zeros(300, 1)
    for step in range(1, 8):
        grad = torch.randn_like(weight) * (torch.rand(300, 1) > 0.3)
        how = AdamStep(lr=0.01, step=step, unit_rows=unit_rows, grad_scale=0.5, betas=(0.8, 0.95), columns=columns)
        kernels.adam_rows(weight, grad.clone(), m, v, how)
        g = 0.5 * grad - (0.5 * grad * naive).sum(1, keepdim=True) * naive * unit_rows
        mean, square = 0.8 * mean + 0.2 * g, 0.95 * square + 0.05 * (g / columns).square().mean(1, keepdim=True)
        root = (square / (1 - 0.95**step)).sqrt() * columns + AdamStep.EPSILON
        naive = naive - 0.01 * mean / (1 - 0.8**step) / root
        naive = naive / naive.norm(dim=1, keepdim=True) if unit_rows else naive
    for found, expected in ((weight, naive), (m, mean), (v, square)):
        assert_near(found, expected, FLOATS[dtype])


def test_adam_scales_the_gradient_and_leaves_it() -> None:
    grad = torch.randn(20, 9)
    results = []
    for unscaled, scale in ((grad.clone(), 0.25), (0.25 * grad, 1.0)):
        weight, before = torch.ones(20, 9) / 3, unscaled.clone()
        how = AdamStep(lr=0.1, step=1, unit_rows=True, grad_scale=scale)
        NUMBA.adam_rows(weight, unscaled, *torch.zeros(2, 20, 9), how=how)
        assert torch.equal(unscaled, before)
        results.append(weight)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    torch.set_num_threads(1)
    x, W = torch.randn(700, 64), torch.randn(1500, 64)
    z = x @ W.T  # torch's product is not ours to promise anything about
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        codes = NUMBA.topk_relu(z, 16)
        parts = NUMBA.reconstruct(codes, W, x, torch.ones(700))
        memory = WeightGradients.zeros_like(W)
        grads = NUMBA.weight_gradients(codes, parts.value_grads, parts.grad_out, x, memory)
        moved, m, v = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
        NUMBA.adam_rows(moved, grads.W_dec, m, v, AdamStep(lr=0.01, step=1, unit_rows=True))
        decoded = NUMBA.decode(*codes, W)
        value_grads = NUMBA.activation_gradient(parts.grad_out, codes.indices, W)
        results.append([*codes, *parts, *grads, moved, m, v, decoded, value_grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("threads")
def test_kernels_may_be_called_from_several_threads() -> None:
    torch.set_num_threads(2)
    W = torch.randn(1500, 64)
    codes = NUMBA.topk_relu(torch.randn(700, 1500), 16)
    expected = NUMBA.decode(*codes, W)
    found: list[bool] = []

    def call() -> None:
        found.extend(torch.equal(NUMBA.decode(*codes, W), expected) for _ in range(20))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [True] * 80


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # what is tested is a fork with threads
def test_kernels_work_after_a_fork() -> None:
    """The pool's threads do not exist in the child, which must start its own."""
    torch.set_num_threads(2)
    z = torch.randn(700, 1500)
    NUMBA.topk_relu(z, 4)
    child = multiprocessing.get_context("fork").Process(target=NUMBA.topk_relu, args=(z, 4))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0


def test_what_the_loops_would_not_survive_is_refused() -> None:
    case = sparse_case(4, 3, 6, 2, torch.float32, seed=0)
    values, indices, W_dec = case["values"], case["indices"], case["W_dec"]
    with pytest.raises(IndexError, match=r"0 to 5, found .* to 6"):
        NUMBA.decode(values, indices.clone().fill_(6), W_dec)
    with pytest.raises(IndexError, match="found -1"):
        weight_gradient(values, indices.clone().fill_(-1), case["x"], 6)
    with pytest.raises(TypeError, match=r"int64, found torch.int32"):
        NUMBA.decode(values, indices.int(), W_dec)
    with pytest.raises(TypeError, match=r"values: expected torch.float32 .* found torch.float64"):
        NUMBA.decode(values.double(), indices, W_dec)
    with pytest.raises(ValueError, match=r"grad_out: expected shape \[4, 3\], found \[3, 3\]"):
        NUMBA.activation_gradient(case["grad_out"][:3], indices, W_dec)
    with pytest.raises(ValueError, match="k 7"):
        NUMBA.topk_relu(torch.randn(2, 6), 7)
    with pytest.raises(TypeError, match="float16; convert"):
        NUMBA.topk_relu(torch.randn(2, 6).half(), 2)
    with pytest.raises(ValueError, match="weight: expected contiguous memory"):
        NUMBA.adam_rows(torch.randn(3, 6).T, W_dec, W_dec, W_dec, AdamStep(lr=0.1, step=1, unit_rows=False))
    strided = torch.randn(3, 6).T  # what is only read may lie anyhow
    torch.testing.assert_close(NUMBA.decode(values, indices, strided), dense(values, indices, 6) @ strided)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_training_step_is_the_same_with_either_kernels(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec, x = (torch.randn(n, 24, generator=generator, dtype=dtype) for n in (100, 100, 50))
    weights = Weights(W_enc, W_dec, x.mean(dim=0))
    rows = row_weights(torch.zeros(50, dtype=torch.int64), torch.ones(50, 1, dtype=dtype), torch.ones(1), raw=False)
    variant = TopK(SAEConfig(d_model=24, n_latents=100, k=5))
    objective = ObjectiveConfig(aux_coef=0.5)
    options = StepOptions(variant=variant, objective=objective, k=5, aux_k=4, product_dtype=dtype, tile_bytes=5000)
    results = []
    for kernels in (TORCH, NUMBA):
        dead = DeadLatents(100, threshold=10)
        dead.silent[:30] = 100
        results.append(training_step(weights, x, rows, dead, options, kernels))
    for ours, theirs in zip(results[1].gradients[:3], results[0].gradients[:3], strict=True):
        assert_near(ours, theirs, FLOATS[dtype])
