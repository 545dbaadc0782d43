"""The plain torch kernels against a few lines of naive code."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.kernels.interface import AdamStep, SparseCodes, WeightGradients
from train.kernels.plain import TORCH as kernels


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    d=st.integers(1, 5),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_sparse_parts_equal_naive_loops(n: int, m: int, d: int, data: st.DataObject, dtype: torch.dtype) -> None:
    k = data.draw(st.integers(1, m), label="k")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    z, W, rows, grad = (
        torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((n, m), (m, d), (n, d), (n, d))
    )
    values, indices = kernels.topk_relu(z, k)
    for i in range(n):
        assert values[i].tolist() == sorted(z[i].clamp_min(0).tolist(), reverse=True)[:k]
        assert len(set(indices[i].tolist())) == k
        assert values[i].tolist() == [max(0.0, z[i, j].item()) for j in indices[i].tolist()]
    decoded = torch.stack([sum(v * W[j] for v, j in zip(values[i], indices[i], strict=True)) for i in range(n)])  # type: ignore[arg-type, misc]
    torch.testing.assert_close(kernels.decode(values, indices, W), decoded)
    by_pair = torch.tensor([[torch.dot(grad[i], W[j]) for j in indices[i]] for i in range(n)], dtype=dtype)
    torch.testing.assert_close(kernels.activation_gradient(grad, indices, W), by_pair)
    summed, decoder = torch.zeros(2, m, d, dtype=dtype)
    sums = torch.zeros(m, dtype=dtype)
    for i in range(n):
        for v, c, j in zip(values[i], by_pair[i], indices[i], strict=True):
            summed[j] += c * rows[i]
            decoder[j] += v * grad[i]
            sums[j] += c
    both = kernels.weight_gradients(SparseCodes(values, indices), by_pair, grad, rows, WeightGradients.zeros_like(W))
    torch.testing.assert_close(both.W_enc, summed)
    torch.testing.assert_close(both.latent_sums, sums)
    torch.testing.assert_close(both.W_dec, decoder)


def test_negative_pre_activations_are_never_active() -> None:
    """Mistake 7: top-k values used without ReLU."""
    values, indices = kernels.topk_relu(torch.tensor([[-3.0, 2.0, -1.0, 0.5]]), 3)
    assert values.tolist() == [[2.0, 0.5, 0.0]]
    assert indices.tolist() == [[1, 3, 2]]


def test_weight_gradients_are_the_same_bits_each_time() -> None:
    z, rows = torch.randn(200, 50), torch.randn(200, 7)
    codes, memory = kernels.topk_relu(z, 8), WeightGradients.zeros_like(torch.empty(50, 7))
    first, *others = [kernels.weight_gradients(codes, codes.values, rows, rows, memory) for _ in range(5)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_adam_equals_torch_adam() -> None:
    ours, theirs = torch.randn(5, 4, dtype=torch.float64).repeat(2, 1, 1)
    parameter = torch.nn.Parameter(theirs)
    reference = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.999), eps=AdamStep.EPSILON)
    m, v = torch.zeros_like(ours), torch.zeros_like(ours)
    for step in range(1, 6):
        grad = torch.randn(5, 4, dtype=torch.float64)
        parameter.grad = grad.clone()
        reference.step()
        kernels.adam_rows(ours, grad, m, v, AdamStep(lr=0.01, step=step, unit_rows=False))
    torch.testing.assert_close(ours, parameter.data)


def test_adam_with_mean_squares_by_row_by_hand() -> None:
    """Gradient (3, 4), of which the second column is taken to be twice as large: (3, 2) has the mean square 6.5, so the
    first step of rate 0.5 is 0.5 g / sqrt(6.5), and half of that in the second column. A gradient of 0 then leaves 0.8
    and 0.9 of the running means."""
    weight, m, v = torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 1)
    columns = torch.tensor([1.0, 2.0])
    how = AdamStep(lr=0.5, step=1, unit_rows=False, betas=(0.8, 0.9), columns=columns)
    kernels.adam_rows(weight, torch.tensor([[3.0, 4.0]]), m, v, how)
    root = 6.5**0.5
    assert weight.tolist() == [pytest.approx([-1.5 / root, -1 / root])]
    assert v.item() == pytest.approx(0.65)
    kernels.adam_rows(weight, torch.zeros(1, 2), m, v, how._replace(step=2))
    share = 0.8 * 0.2 / (1 - 0.8**2) / (0.9 * 0.1 / (1 - 0.9**2)) ** 0.5
    assert weight.tolist() == [pytest.approx([-1.5 / root * (1 + share), -1 / root * (1 + share)])]


def test_adam_on_the_sphere_by_hand() -> None:
    """Mistake 3: the gradient loses its parallel component before the step, and rows are normalised after it.

    Row (1, 0), gradient (5, 2): only (0, 2) is left. Adam's first step is lr * sign, so with lr = 0.75 the row is
    (1, -0.75), of norm 1.25.
    """
    weight, grad = torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0, 2.0]])
    m, v = torch.zeros(1, 2), torch.zeros(1, 2)
    kernels.adam_rows(weight, grad, m, v, AdamStep(lr=0.75, step=1, unit_rows=True))
    assert weight.tolist() == [pytest.approx([0.8, -0.6])]
    assert m.tolist() == [pytest.approx([0.0, 0.2])]
    assert v.tolist() == [pytest.approx([0.0, 0.004])]
    assert math.isclose(weight.norm().item(), 1.0, rel_tol=1e-6)
