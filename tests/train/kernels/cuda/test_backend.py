"""The CUDA kernels against the plain torch ones and float64: on a GPU where there is one, else under the interpreter.

Triton reads TRITON_INTERPRET when it is first imported, so without a GPU the tests below run in a process of their
own, which `test_under_the_interpreter` starts.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
HERE = Path(__file__)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: it exists for Linux only", allow_module_level=True)

if DEVICE == "cpu" and not INTERPRETED:

    def test_under_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE)]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parents[4])}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[4])
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
        assert " passed" in run.stdout
        assert "skipped" not in run.stdout

else:
    from train.config import ObjectiveConfig
    from train.kernels.choose import choose_kernels
    from train.kernels.cuda.backend import TRITON, _group_size
    from train.kernels.interface import AdamStep, Kernels, SparseCodes, WeightGradients
    from train.kernels.plain import TORCH
    from train.model_config import SAEConfig
    from train.objective.losses import DeadLatents, row_weights
    from train.objective.step import training_step
    from train.objective.variants import StepOptions, TopK
    from train.objective.weights import Weights

    def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)

    def kinds(n: int, m: int) -> Tensor:
        """Rows with something that a selection can get wrong, one of each kind after another."""
        z = randn(n, m)
        z[1::8].mul_(2).round_()
        z[2::8] = -z[2::8].abs()
        z[3::8] = 1
        z[4::8] = z[4::8].sort(dim=1).values
        z[5::8] = torch.where(z[5::8] > 1.5, z[5::8], 0.0)
        z[6::8] = torch.where(z[6::8] > 1, torch.inf, -torch.inf)
        z[7::8] = torch.where(z[7::8] > 0.5, 0.0, -0.0)
        return z

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("m", "k"), [(1, 1), (70, 1), (300, 5), (1000, 32), (257, 33), (64, 64), (4100, 100)])
    def test_topk_is_the_start_of_a_stable_sort(dtype: torch.dtype, m: int, k: int) -> None:
        z = kinds(9, m).to(dtype)
        ordered, order = torch.sort(z, dim=1, descending=True, stable=True)
        values, indices = TRITON.topk_relu(z, k)
        assert values.dtype == torch.float32
        assert torch.equal(values, ordered[:, :k].relu().float())
        if _group_size(m, k) is not None:  # torch's has an order of its own among equals
            assert torch.equal(indices, order[:, :k])
        assert torch.equal(z.gather(1, indices).relu().float(), values)

    def test_shapes_of_a_real_run_go_through_the_groups() -> None:
        sizes = {(m, k): _group_size(m, k) for m in (9216, 131072) for k in (32, 64, 256)}
        assert sizes == {
            (9216, 32): 64,
            (9216, 64): 64,
            (9216, 256): 16,
            (131072, 32): 64,
            (131072, 64): 64,
            (131072, 256): 16,
        }
        assert _group_size(9216, 2000) is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_topk_does_not_hide_nan(dtype: torch.dtype) -> None:
        z = randn(4, 4000).to(dtype)
        z[1, [7, 399]] = torch.nan
        z[3] = torch.nan  # more than k of them: the first k, and nothing is written beyond
        values, indices = TRITON.topk_relu(z, 5)
        assert values.isnan().sum(dim=1).tolist() == [0, 2, 0, 5]
        assert indices[1, :2].tolist() == [7, 399]
        assert indices[3].tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(z[:3].gather(1, indices[:3]).relu().float().nan_to_num(), values[:3].nan_to_num())

    @pytest.mark.parametrize(("n", "d", "m", "k"), [(1, 1, 1, 1), (7, 5, 9, 9), (40, 24, 50, 6), (150, 3, 4, 2)])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
    def test_sparse_parts_equal_torch_ones(
        n: int, d: int, m: int, k: int, dtype: torch.dtype, tolerance: float
    ) -> None:
        """Also latents without pairs, and with pairs in one, two and many chunks."""
        z = randn(n, m)
        if m > 8:
            z[:, 3], z[:, 4] = -9, 9  # never and, for k < m, always active
        values, indices = (t.to(dtype) if t.is_floating_point() else t for t in TORCH.topk_relu(z, k))
        W_dec, x, grad, weight = (randn(*s, seed=1, dtype=dtype) for s in ((m, d), (n, d), (n, d), (n,)))

        def close(found: object, expected: object) -> None:
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

        close(TRITON.decode(values, indices, W_dec), TORCH.decode(values, indices, W_dec))
        slopes = TORCH.activation_gradient(grad, indices, W_dec)
        close(TRITON.activation_gradient(grad, indices, W_dec), slopes)
        found, expected = (kern.reconstruct(SparseCodes(values, indices), W_dec, x, weight) for kern in (TRITON, TORCH))
        close(tuple(found), tuple(expected))
        codes = SparseCodes(values, indices)
        found, expected = (
            kern.weight_gradients(codes, slopes, grad, x, WeightGradients.zeros_like(W_dec)) for kern in (TRITON, TORCH)
        )
        close(tuple(found), tuple(expected))
        again = TRITON.weight_gradients(codes, slopes, grad, x, found)
        assert again is found
        close(tuple(found), tuple(expected))

    @pytest.mark.parametrize("by_row", [True, False])
    @pytest.mark.parametrize("unit_rows", [True, False])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
    def test_adam_equals_torch_one(by_row: bool, unit_rows: bool, dtype: torch.dtype, tolerance: float) -> None:
        state = [torch.nn.functional.normalize(randn(6, 5, dtype=dtype)), *(randn(6, 5, dtype=dtype) * 0 for _ in "mv")]
        state[2] = state[2][:, :1].clone() if by_row else state[2]
        columns = randn(5, seed=9, dtype=dtype).abs() if by_row else None
        other = [t.clone() for t in state]
        for step in (1, 2, 3):
            grad = randn(6, 5, seed=step, dtype=dtype)
            for kernels, (w, m, v) in ((TRITON, state), (TORCH, other)):
                how = AdamStep(lr=0.01, step=step, unit_rows=unit_rows, columns=columns)
                kernels.adam_rows(w, grad.clone(), m, v, how)
        for found, expected in zip(state, other, strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("shape", [(1, 3000), (7, 700), (1, 1)])
    def test_adam_without_unit_rows_takes_rows_of_any_length(shape: tuple[int, int]) -> None:
        state = [randn(*shape, seed=seed) for seed in (1, 2)] + [randn(*shape, seed=3).abs()]
        other = [t.clone() for t in state]
        for kernels, (w, m, v) in ((TRITON, state), (TORCH, other)):
            kernels.adam_rows(w, randn(*shape), m, v, AdamStep(lr=0.01, step=9, unit_rows=False, grad_scale=0.5))
        for found, expected in zip(state, other, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_whole_steps_equal_torch_ones() -> None:
        n, d, m = 20, 8, 48
        W = torch.nn.functional.normalize(randn(m, d))
        x = randn(n, d, seed=3)
        rows = row_weights(torch.zeros(n, dtype=torch.int64, device=DEVICE), x.new_ones(n, 1), x.new_ones(1), raw=False)

        def step(kernels: Kernels) -> tuple[Tensor, ...]:
            dead = DeadLatents(m, 1, DEVICE)
            dead.silent += 1
            options = StepOptions(
                variant=TopK(SAEConfig(d_model=d, n_latents=m, k=4)),
                k=4,
                aux_k=8,
                objective=ObjectiveConfig(aux_coef=0.5),
                product_dtype=torch.float32,
                tile_bytes=2000,
            )
            result = training_step(Weights(W, W.clone(), x[0]), x, rows, dead, options, kernels)
            return result.loss, result.auxk, *result.gradients[:3]

        first, again, plain = step(TRITON), step(TRITON), step(TORCH)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        for found, expected in zip(first, plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_they_are_what_a_gpu_gets() -> None:
        if DEVICE == "cuda":
            assert choose_kernels(torch.empty(0, device="cuda")).name == "triton"
        assert choose_kernels(torch.empty(0), "torch").name == "torch"
