"""How fast the compiled kernels of a training step are: beside torch's, and beside the encoder's product, in one run.

    python benchmarks/bench_kernels.py [--json] [--rows 8192 2048] [--rounds 7] [--cpu] [--compile]

Times are milliseconds, the least of several rounds; in a round everything runs once, in the order of a step, so that
our threads and torch's take turns as they do in training and a busy machine hurts all alike. Lower is better. Ratios
are to the float32 product of the same run. `--compile` adds the seconds of the first call, with an empty cache and with
a full one. Run it with OMP_WAIT_POLICY=passive in the environment, or torch's threads spin on the cores that ours need.

Not measured: whole steps and other packages (bench_step.py).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F

from train.kernels.cpu.backend import NUMBA
from train.kernels.interface import AdamStep, Kernels, WeightGradients
from train.kernels.plain import TORCH

D_MODEL, N_LATENTS, K = 576, 9216, 32
OURS = ("topk", "reconstruct", "weight gradients", "adam")
"""What a step runs besides the product."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the compiled kernels against torch's and the bare product.")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 2048], help="batch sizes")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="size of the dictionary")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each measurement; the least counts")
    parser.add_argument("--cpu", action="store_true", help="processor time of all threads, steadier on a busy machine")
    parser.add_argument("--compile", action="store_true", help="also time the first call")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    results = {}
    for n_rows in options.rows:
        times = measure(n_rows, options.latents, options.rounds, clock)
        results[n_rows] = times
        print_table(n_rows, options.latents, times)
    ratios = {f"kernels_over_product_{n}": round(total(t) / t["product"], 3) for n, t in results.items()}
    ratios |= {f"topk_over_read_{n}": round(t["topk"] / t["read"], 2) for n, t in results.items()}
    if options.compile:
        ratios |= time_first_call()
    print("  ".join(f"{name} {value}" for name, value in ratios.items()))
    if options.json:
        print(json.dumps(ratios))


def measure(n: int, m: int, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Least milliseconds of each thing at N = n, M = m."""
    torch.manual_seed(0)
    x, grad_out, weight = torch.randn(n, D_MODEL), torch.randn(n, D_MODEL), torch.rand(n)
    W_enc, W_dec = F.normalize(torch.randn(m, D_MODEL)), F.normalize(torch.randn(m, D_MODEL))
    z = x @ W_enc.T
    z_bf16 = z.bfloat16()
    codes = NUMBA.topk_relu(z, K)
    v, i = codes
    value_grads = NUMBA.activation_gradient(grad_out, i, W_dec)
    grads = NUMBA.weight_gradients(codes, value_grads, grad_out, x, WeightGradients.zeros_like(W_dec))
    moments = [torch.zeros(m, D_MODEL) for _ in range(4)]
    parameters = [torch.nn.Parameter(w.clone()) for w in (W_enc, W_dec)]
    for parameter, grad in zip(parameters, grads[:2], strict=True):
        parameter.grad = grad.clone()
    fused_adam = torch.optim.Adam(parameters, lr=1e-6, fused=True)

    def adam(kernels: Kernels) -> None:
        for w, g, first, second, unit in (
            (W_enc, grads[0], *moments[:2], False),
            (W_dec, grads[1], *moments[2:], True),
        ):
            kernels.adam_rows(w, g, first, second, AdamStep(lr=1e-6, step=9, unit_rows=unit))

    def index_add() -> None:
        for coefficients, rows in ((v, grad_out), (value_grads, x)):
            products = coefficients.unsqueeze(2) * rows.unsqueeze(1)  # [N, k, D]
            torch.zeros(m, D_MODEL).index_add_(0, i.flatten(), products.flatten(0, 1))

    tasks: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(x, W_enc.T, out=z),
        "read": lambda: z.amax(dim=1),  # one pass over the pre-activations
        "topk": lambda: NUMBA.topk_relu(z, K),
        "topk, bfloat16": lambda: NUMBA.topk_relu(z_bf16, K),
        "topk, torch": lambda: torch.topk(z, K, dim=1),
        "decode": lambda: NUMBA.decode(v, i, W_dec),
        "decode, torch": lambda: TORCH.decode(v, i, W_dec),
        "activation gradient": lambda: NUMBA.activation_gradient(grad_out, i, W_dec),
        "activation gradient, torch": lambda: TORCH.activation_gradient(grad_out, i, W_dec),
        "reconstruct": lambda: NUMBA.reconstruct(codes, W_dec, x, weight),
        "reconstruct, torch": lambda: TORCH.reconstruct(codes, W_dec, x, weight),
        "weight gradients": lambda: NUMBA.weight_gradients(codes, value_grads, grad_out, x, grads),
        "weight gradients, torch": lambda: TORCH.weight_gradients(codes, value_grads, grad_out, x, grads),
        "weight gradients, index_add": index_add,
        "adam": lambda: adam(NUMBA),
        "adam, torch": lambda: adam(TORCH),
        "adam, torch fused": fused_adam.step,
    }
    least = dict.fromkeys(tasks, float("inf"))
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            start = clock()
            task()
            least[name] = min(least[name], 1000 * (clock() - start))
    return least


def total(times: dict[str, float]) -> float:
    """Milliseconds of all that a step runs besides the product."""
    return sum(times[name] for name in OURS)


def print_table(n: int, m: int, times: dict[str, float]) -> None:
    print(
        f"N {n}, d_model {D_MODEL}, n_latents {m}, k {K}, {torch.get_num_threads()} threads; ms, and over the product"
    )
    for name, value in {**times, " + ".join(OURS): total(times)}.items():
        print(f"  {name:<48} {value:9.1f} {value / times['product']:8.3f}")


def time_first_call() -> dict[str, float]:
    """Processor seconds of a first step's kernels in a fresh process, before and after their code is cached."""
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import torch
from train.kernels.cpu.backend import NUMBA
from train.kernels.interface import AdamStep, WeightGradients
x, W = torch.randn(64, 32), torch.randn(96, 32)
start = time.process_time()
codes = NUMBA.topk_relu(x @ W.T, 4)
r = NUMBA.reconstruct(codes, W, x, torch.ones(64))
g = NUMBA.weight_gradients(codes, r.value_grads, r.grad_out, x, WeightGradients.zeros_like(W))
NUMBA.adam_rows(W, g.W_dec, torch.zeros_like(W), torch.zeros_like(W), AdamStep(lr=0.1, step=1, unit_rows=True))
print(time.process_time() - start)
"""
    with tempfile.TemporaryDirectory(prefix="bench-kernels-") as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        seconds = [
            float(
                subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True).stdout
            )
            for _ in range(2)
        ]
    return {"first_call_seconds": round(seconds[0], 2), "cached_first_call_seconds": round(seconds[1], 2)}


if __name__ == "__main__":
    main()
