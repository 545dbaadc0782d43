"""AuxK by tiles in 16-bit integers, against a dense version in float64 whose choice of latents it is given."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from train.kernels.cpu.int16 import integer_products_run

if not integer_products_run():
    pytest.skip("this processor has no fast products of integers (AVX512-VNNI)", allow_module_level=True)

from train.kernels.cpu import auxk_loops as kernels_auxk
from train.kernels.cpu.compiling import compiled
from train.kernels.cpu.tiled_auxk import TiledAuxK, tiled_auxk
from train.kernels.interface import choose_kernels
from train.objective.losses import auxk, row_weights

TOLERANCE = 0.02
"""Of a gradient's norm. (Of a single product of nearly orthogonal vectors it would not hold.)"""


class Case:
    """Inputs of AuxK. Pre-activations are whole numbers times powers of two, exact in 16 bits, so that which are the
    largest is no close call; rows and latents differ in scale by up to 2^spread."""

    def __init__(self, n: int, d: int, n_dead: int, seed: int = 0, spread: int = 0, *, bias: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)

        def whole(*shape: int) -> Tensor:
            return torch.randint(-2, 3, shape, generator=generator).float()

        def power(n: int) -> Tensor:
            return torch.exp2(torch.randint(-spread, 1, (n, 1), generator=generator).float())

        rows = power(n)
        self.inputs, self.error = rows * whole(n, d), rows * (torch.randn(n, d, generator=generator) + 0.3)
        self.weight, self.scale = torch.rand(n, generator=generator) / n, torch.rand(n, generator=generator) + 0.5
        self.W_enc = power(n_dead) * whole(n_dead, d)
        self.W_dec = torch.randn(n_dead, d, generator=generator) / d
        self.b_enc = whole(n_dead) if bias else None

    def tiled(self, k: int, tile_bytes: int = 2**20) -> TiledAuxK:
        given = (self.inputs, self.error, self.weight, self.scale, self.W_enc, self.W_dec)
        return tiled_auxk(*given, b_enc=self.b_enc, k=k, tile_bytes=tile_bytes)

    def dense(self, k: int) -> tuple[Tensor, ...]:
        """squared, and the gradients of the loss before it is normalised, by autograd in float64."""
        z = self.inputs @ self.W_enc.T
        z = z if self.b_enc is None else z + self.b_enc
        largest = z.sort(dim=1, descending=True, stable=True).indices[:, :k]  # of equal ones, the lowest latents
        kept = torch.zeros_like(z).scatter_(1, largest, 1) * (z > 0)
        inputs, error, weight, scale = (x.double() for x in (self.inputs, self.error, self.weight, self.scale))
        W_enc, W_dec = (w.double().requires_grad_() for w in (self.W_enc, self.W_dec))
        bias = torch.zeros(len(W_enc)) if self.b_enc is None else self.b_enc
        bias = bias.double().requires_grad_()
        missed = error - ((inputs @ W_enc.T + bias) * kept) @ W_dec
        squared = missed.square().sum(dim=1)
        (weight * scale.square() * squared).sum().backward()
        return squared.detach(), *(grad for grad in (W_enc.grad, W_dec.grad, bias.grad) if grad is not None)


@settings(max_examples=25, deadline=None)
@example(n=1, d=1, n_dead=1, k=1, seed=0, spread=0, bias=False)
@example(n=141, d=33, n_dead=31, k=31, seed=0, spread=3, bias=True)
@given(
    n=st.sampled_from([13, 14, 139, 140, 141, 290]),
    d=st.sampled_from([31, 32, 64, 145]),
    n_dead=st.sampled_from([14, 15, 28, 31, 32, 33, 100, 300]),
    k=st.integers(5, 80),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0, 3]),
    bias=st.booleans(),
)
def test_gradients_against_autograd(n: int, d: int, n_dead: int, k: int, seed: int, spread: int, bias: bool) -> None:
    case = Case(n, d, n_dead, seed, spread, bias=bias)
    tiled, expected = case.tiled(min(k, n_dead)), case.dense(min(k, n_dead))
    for found, exact in zip(tiled[2:], expected, strict=True):
        assert (found - exact).norm() <= TOLERANCE * exact.norm()
    weight, scaled = case.weight.double(), case.error.double() * case.scale.double().unsqueeze(1)
    mean = weight @ scaled / weight.sum()
    second_moment = weight @ scaled.square().sum(dim=1)
    rounding = 1e-6 * second_moment.item()
    variance = weight @ (scaled - mean).square().sum(dim=1)
    torch.testing.assert_close(tiled.variance, variance, rtol=1e-4, atol=rounding)
    torch.testing.assert_close(tiled.second_moment, second_moment, rtol=1e-4, atol=rounding)


def test_bits_do_not_depend_on_threads() -> None:
    case = Case(450, 40, 70)
    whole = case.tiled(20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert all(torch.equal(a, b) for a, b in zip(case.tiled(20), whole, strict=True))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(case.tiled(20, tile_bytes=1), whole, strict=True):  # a tile at a time: added in another order
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@compiled
def _keep(start, stop, rows, bias, k, guesses, alive):
    """`_keep_largest` of each row, with a bound of its own to begin near; alive [rows, 16 latents a number]."""
    keys, near = np.zeros(rows.shape[1], np.int32), np.zeros(64, np.int32)
    for r in range(start, stop):
        kernels_auxk._keep_largest(rows[r], bias, k, guesses[r], keys, near, alive[r])


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([32, 64, 320]),
    k=st.integers(1, 320),
    levels=st.sampled_from([2, 5, 50, 10**6]),
    near=st.sampled_from(["bound", "a little off", "zero", "largest"]),
    seed=st.integers(0, 2**31),
)
def test_the_k_largest_are_kept_wherever_the_search_begins(n: int, k: int, levels: int, near: str, seed: int) -> None:
    k = min(k, n)
    rng = np.random.default_rng(seed)
    rows = (rng.integers(-levels, levels, (6, n)) / levels + 1e-3).astype(np.float32)  # few levels: ties
    rows[0] = -1
    bound = np.sort(np.maximum(rows, 0), axis=1)[:, n - k].copy().view(np.int32)
    far = np.full_like(bound, 2**31 - 2**22)
    guesses = {"bound": bound, "a little off": bound - 2_500_000, "zero": 0 * bound, "largest": far}
    expected = torch.zeros(rows.shape)
    for r, row in enumerate(rows):  # ties to the lowest: a stable sort
        best = np.argsort(-row, kind="stable")[:k]
        expected[r, best] = torch.from_numpy(row[best]).relu()
    alive = np.zeros((6, n // 16), np.uint16)
    _keep(0, 6, rows, np.zeros(n, np.float32), k, guesses[near].astype(np.int32), alive)
    assert torch.equal(torch.from_numpy(rows), expected)
    bits = np.unpackbits(alive.view(np.uint8), axis=1, bitorder="little")
    assert np.array_equal(bits.astype(bool), rows > 0)


def _loss(case: Case, kernels_name: str = "numba") -> tuple[Tensor, ...]:

    rows = row_weights(
        torch.zeros(len(case.inputs), dtype=torch.int64), torch.ones(len(case.inputs), 1), torch.ones(1), raw=False
    )
    return auxk(
        case.inputs,
        case.error,
        rows,
        case.W_enc,
        case.W_dec,
        k=90,  # all: `torch.topk` chooses among ties as it likes
        product_dtype=torch.int16,
        tile_bytes=2**20,
        kernels=choose_kernels(case.inputs, kernels_name),
    )


def test_the_loss_is_that_of_the_products_one_by_one() -> None:
    case = Case(300, 64, 90)
    for tiles, products in zip(_loss(case), _loss(case, "torch"), strict=True):
        assert (tiles - products).norm() < TOLERANCE * products.norm()


def test_equal_errors_have_no_variance_and_no_gradient() -> None:
    case = Case(300, 64, 90)
    case.error = torch.full_like(case.error, 0.3)
    assert all(not part.any() for part in _loss(case))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(broken: float) -> None:
    case = Case(300, 64, 90)
    case.error[150, 3] = broken
    assert not _loss(case)[0].isfinite()
    case = Case(300, 64, 90)
    case.inputs[150, 3] = broken
    assert not _loss(case)[0].isfinite()
