"""How fast a whole training step is: beside the bare encoder product, the plain torch path, and other trainers.

    python benchmarks/bench_step.py [--json] [--store acts.zarr] [--rows 8192] [--latents 9216 36864] [--device cpu]

In one run, on the same vectors, in alternating rounds of which the median counts, a second of each in a round, step
after step as in a training: our step with the kernels that `--kernels auto` picks and with plain torch's, AuxK off;
ours with AuxK on and a tenth of the latents dead; the encoder's product alone, in float32 and bfloat16; dense autograd,
sparsify, SAELens and dictionary-learning, each in every mode it has, of which the faster counts. The peers live in an
environment of their own, which `make bench-peers` makes; without it they are left out, and a line says so. Further
`--latents` are timed for ours and the product alone.
Each kernel of the step is timed on its own as well, compiled and plain.

Then each trains for `--fvu-steps` steps of `--fvu-rows` vectors from the same weights with the same learning rate, an
encoder bias and gradients clipped to norm 1 (what SAELens and dictionary-learning cannot do without), and reconstructs
vectors that none has seen: FVU, lower is better. Method differs in one thing: SAELens' decoder rows are free, the
others' of unit norm. Ours is measured both ways, and without bias and clipping, as the reference recipe has it. Keys
are of the last number of steps: `fvu_ours` with `--decoder-norm free`, `fvu_fixed` without it, `fvu_peers` by name.

Vectors are SmolLM2-135M's residual stream over all layers, standardised and shuffled; without `--store` it is harvested
into a temporary folder first. Times in milliseconds, lower is better. Not measured: reading the store, and memory.
"""
# ruff: noqa: E402  (torch reads its environment once, when it is loaded)

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads of ten processes help nobody

import numpy as np
import torch
from step_peers import CLIP, CONTENDERS, HELD_OUT, batches, fvu_after, timed
from torch import Tensor

from store.activations import ActivationStore
from train.config import ObjectiveConfig
from train.hardware import resolve_product_dtype
from train.kernels.choose import choose_kernels
from train.kernels.encode import ReadyEncoder
from train.kernels.interface import AdamStep, Kernels, WeightGradients
from train.model import MLSAE, SAEConfig, standardize
from train.objective.losses import DeadLatents, row_weights
from train.objective.optimizer import SphereAdam
from train.objective.step import training_step
from train.objective.variants import StepOptions, TopK

OURS = {"ours": "auto", "ours, plain torch": "torch"}
"""Name -> kernels."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and FVU of our training step beside other trainers'.")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--store", type=Path, help="store of activations; default: SmolLM2-135M's are harvested")
    parser.add_argument("--rows", type=int, default=8192, help="vectors in a step")
    parser.add_argument("--latents", type=int, nargs="+", default=[9216, 36864], help="sizes of the dictionary")
    parser.add_argument("--k", type=int, default=32, help="active latents on a vector")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate, constant")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median counts")
    parser.add_argument(
        "--fvu-steps", type=int, nargs="*", default=[100], help="steps after which FVU is compared; 0: it is not"
    )
    parser.add_argument("--fvu-rows", type=int, default=1024, help="vectors in each of them")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "int8"], help="of our product"
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], help="beside ours")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python", help="python that has the peers")
    options = parser.parse_args()
    options.fvu_steps = sorted(filter(None, options.fvu_steps))
    options.dtype = resolve_product_dtype(options.dtype, torch.device(options.device))
    with tempfile.TemporaryDirectory(prefix="bench-step-") as name, ExitStack() as stack:
        folder = Path(name)
        data = vectors(options, folder)
        results: dict[str, Any] = {}
        for n_latents in options.latents:
            compared = n_latents == options.latents[0]
            init = initial_weights(data, n_latents, folder, options.device)
            workers = start_peers(stack, options, folder) if compared else {}
            times = measure(options, data, init, workers)
            print_table(options, data.shape[1], n_latents, times)
            print_parts(measure_parts(options, data, init))
            if compared:
                results |= {"milliseconds": times, **ratios(times)}
                results |= compare_fvu(options, data, init, workers) if options.fvu_steps else {}
            else:
                results[f"step_over_encoder_product_{n_latents}"] = ratios(times)["step_over_encoder_product"]
            stack.close()
    for key, value in results.items():
        print(f"{key:<40} {value if isinstance(value, dict | str) else round(value, 4)}")
    if options.json:
        print(json.dumps(results))


def vectors(options: argparse.Namespace, folder: Path) -> np.ndarray[Any, Any]:
    """Standardised vectors of all layers, shuffled, float32 [V, D], also written to `folder`/x.npy."""
    path = options.store
    if path is None:
        path = folder / "acts.zarr"
        command = [sys.executable, "-m", "residscope", "harvest", "--model", "smollm2-135m", "--dataset", "pydoc"]
        command += ["--max-tokens", "4096", "--context-length", "256", "--batch-size", "8", "--out", str(path)]
        subprocess.run(command, check=True, cwd=ROOT)
    with ActivationStore.open(path) as store:
        raw = store.read(slice(0, min(store.meta.n_tokens, 8192)))  # [T, L, D]
        keep = store.tokens.keep[: len(raw)]
        x = raw[keep].reshape(-1, raw.shape[-1])
    np.random.default_rng(0).shuffle(x)
    x = standardize(torch.from_numpy(x)).x.numpy()
    np.save(folder / "x.npy", x)
    return x


def initial_weights(data: np.ndarray[Any, Any], n_latents: int, folder: Path, device: str) -> dict[str, Tensor]:
    """The weights that all start from, also written to `folder`/init.npz."""
    sae = MLSAE(SAEConfig(d_model=data.shape[1], n_latents=n_latents, k=1))
    sae.initialize(0, b_pre=torch.from_numpy(data[:HELD_OUT].mean(axis=0)))
    init = {name: weight.detach() for name, weight in sae.named_parameters()}
    np.savez(folder / "init.npz", W_enc=init["W_enc"].numpy(), W_dec=init["W_dec"].numpy(), b_pre=init["b_pre"].numpy())
    return {name: weight.to(device) for name, weight in init.items()}


class Ours:
    """Our step on standardised vectors, as the training loop makes it."""

    def __init__(
        self,
        init: dict[str, Tensor],
        k: int,
        lr: float,
        dtype: str,
        kernels: Kernels,
        *,
        dead: Tensor | None = None,
        clip: float | None = None,
        encoder_bias: bool = False,
        free_norms: bool = False,
    ) -> None:
        """`dead`: latents that AuxK always takes for dead; None turns it off. `clip`: largest norm of the gradients."""
        self.clip = clip
        m, d = init["W_enc"].shape
        device = init["W_enc"].device
        self.sae = MLSAE(SAEConfig(d_model=d, n_latents=m, k=k, encoder_bias=encoder_bias)).to(device)
        self.sae.load_state_dict(init, strict=False)  # without a bias, which starts at 0
        self.kernels, self.lr, self.steps = kernels, lr, 0
        self.optimizer = SphereAdam(self.sae, kernels, free_norms=free_norms)
        self.options = StepOptions(
            variant=TopK(self.sae.config),
            k=k,
            aux_k=2 ** round(np.log2(d / 2)),
            objective=ObjectiveConfig(aux_coef=0.0 if dead is None else 1 / 32),
            product_dtype=getattr(torch, dtype),
            tile_bytes=16_000_000 if device.type == "cpu" else 2**30,
        )
        self.latents = DeadLatents(m, 10**9, device)
        if dead is not None:
            self.latents.dead_latents = lambda: dead  # type: ignore[method-assign]
        self.denominators = torch.ones(1, device=device)
        self.memory = WeightGradients(
            W_enc=torch.empty_like(init["W_enc"]),
            W_dec=torch.empty_like(init["W_dec"]),
            latent_sums=torch.empty(m, device=device),
        )

    def step(self, x: Tensor) -> None:
        """One step on [N, D]."""
        rows = row_weights(
            torch.zeros(len(x), dtype=torch.int64, device=x.device), x.new_ones(len(x), 1), self.denominators, raw=False
        )
        result = training_step(
            self.optimizer.weights, x, rows, self.latents, self.options, self.kernels, out=self.memory
        )
        self.steps += 1
        self.optimizer.step(result.gradients, lr=self.lr, step=self.steps, clip=self.clip)

    def reconstruct(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D], with a float32 product; already standardised vectors stay as they are."""
        codes = self.sae.encode_standardized(x)
        return self.sae.decode(codes, x.new_zeros(len(x), 1), x.new_ones(len(x), 1))


def measure(
    options: argparse.Namespace, data: np.ndarray[Any, Any], init: dict[str, Tensor], workers: "dict[str, Worker]"
) -> dict[str, float]:
    """Median milliseconds of everything, in alternating rounds."""
    W = init["W_enc"]
    m = len(W)
    dead = torch.randperm(m, generator=torch.Generator().manual_seed(0))[: m // 10].sort().values.to(W.device)
    x = batches(data, options.rows, options.device)
    fastest, plain = (choose_kernels(W, name) for name in OURS.values())
    tasks: dict[str, Callable[[Tensor], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        tasks[f"encoder product, {str(dtype)[6:]}"] = _product(x(0), W, dtype)
    for name, kernels in zip(OURS, (fastest, plain), strict=True):
        tasks[name] = Ours(init, options.k, options.lr, options.dtype, kernels).step
    tasks["ours, AuxK, 10 % dead"] = Ours(init, options.k, options.lr, options.dtype, fastest, dead=dead).step
    seconds: dict[str, list[float]] = {name: [] for name in (*tasks, *workers)}
    for i in range(options.rounds + 1):  # the first one warms up
        for name, task in tasks.items():
            seconds[name].append(timed(task, x(i)))
        for name, worker in workers.items():
            seconds[name].append(worker.ask("time"))
    return {name: 1000 * median(values[1:]) for name, values in seconds.items()}


def measure_parts(
    options: argparse.Namespace, data: np.ndarray[Any, Any], init: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each kernel of a step, by implementation."""
    x = batches(data, options.rows, options.device)(0)
    n, (m, _) = len(x), init["W_enc"].shape
    W_enc, W_dec = init["W_enc"].clone(), init["W_dec"].clone()
    weight = x.new_full((n,), 1 / n)
    tile = (x[: max(1, min(n, 2**28 // m))] @ W_enc.T).to(torch.bfloat16 if x.is_cuda else torch.float32)
    found: dict[str, dict[str, float]] = {}
    for name in OURS.values():
        kernels = choose_kernels(W_enc, name)
        codes = ReadyEncoder(choose_kernels(W_enc, "torch"), W_enc).topk(x, options.k)
        main = kernels.reconstruct(codes, W_dec, x, weight)
        gradients = (codes, main.value_grads, main.grad_out, x, WeightGradients.zeros_like(W_dec))
        out = kernels.weight_gradients(*gradients)
        moments = [torch.zeros_like(W_enc) for _ in range(2)]
        tasks: dict[str, Callable[[Tensor], object]] = {
            f"top-k of {len(tile)} rows, {str(tile.dtype)[6:]}": lambda _, k=kernels: k.topk_relu(tile, options.k),
            "decoder, error and its gradients": lambda _, k=kernels, c=codes: k.reconstruct(c, W_dec, x, weight),
            "weight gradients": lambda _, k=kernels, g=gradients: k.weight_gradients(*g),
            "Adam on the sphere, one weight": lambda _, k=kernels, g=out, mv=moments: k.adam_rows(
                W_dec, g.W_dec, *mv, how=AdamStep(lr=1e-9, step=9, unit_rows=True)
            ),
        }
        for task in tasks.values():
            task(x)
        found[kernels.name] = {
            part: 1000 * median(timed(task, x) for _ in range(options.rounds)) for part, task in tasks.items()
        }
    return found


def _product(x: Tensor, W: Tensor, dtype: torch.dtype) -> Callable[[Tensor], object]:
    """x @ W^T alone, its operands cast beforehand, a tile of rows at a time into the same memory."""
    left, right = x.to(dtype), W.to(dtype).t()
    rows = max(1, (16_000_000 if x.device.type == "cpu" else 2**30) // (len(W) * left.element_size()))
    out = torch.empty(rows, len(W), dtype=dtype, device=x.device)

    def run(_: Tensor) -> None:
        for part in left.split(rows):
            torch.mm(part, right, out=out[: len(part)])

    return run


class Worker:
    """A contender in a process of its own, which waits for requests."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def ask(self, request: str) -> Any:
        """Send a request and wait for its answer, a number or several."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            print(request, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"bench_step: {self.log.stem} failed:\n{self.log.read_text()[-2000:]}")
        return json.loads(answer)


@contextmanager
def _worker(command: list[str], log: Path) -> Iterator[Worker]:
    worker = Worker(command, log)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()


def start_peers(stack: ExitStack, options: argparse.Namespace, folder: Path) -> dict[str, Worker]:
    """A process for each contender and mode; of peers, only where their environment is."""
    workers = {}
    for name in options.contenders:
        modes, python = CONTENDERS[name][1], Path(sys.executable) if name == "dense" else options.peers
        if not python.exists():
            print(f"{name}: left out, {python} is not there: `make bench-peers` makes it", file=sys.stderr)
            continue
        for mode in modes:
            if mode.endswith("sparse") and options.device == "cpu":
                continue  # torch 2.13 has no backward pass for it on a CPU
            command = [str(python), str(ROOT / "benchmarks/step_peers.py"), name, mode]
            command += ["--data", str(folder / "x.npy"), "--init", str(folder / "init.npz")]
            command += ["--rows", str(options.rows), "--k", str(options.k), "--lr", str(options.lr)]
            command += ["--device", options.device, "--threads", str(torch.get_num_threads())]
            label = f"{name}, {mode}"
            workers[label] = stack.enter_context(_worker(command, folder / f"{label}.log"))
    return workers


def faster(times: dict[str, float], name: str) -> float:
    """Milliseconds of a contender in its faster mode; NaN where it was left out, or ran out of memory."""
    found = (value for key, value in times.items() if key.startswith(f"{name}, ") and not math.isnan(value))
    return min(found, default=math.nan)


def ratios(times: dict[str, float]) -> dict[str, float]:
    """What the issue asks about, from one run's times."""
    ours = times["ours"]
    return {
        "step_over_encoder_product": ours / times["encoder product, bfloat16"],
        "step_over_faster_encoder_product": ours / faster(times, "encoder product"),
        "plain_step_over_encoder_product": times["ours, plain torch"] / times["encoder product, bfloat16"],
        "speedup_over_dense": faster(times, "dense") / ours,
        "speedup_over_sparsify": faster(times, "sparsify") / ours,
        "speedup_over_saelens": faster(times, "saelens") / ours,
        "speedup_over_dictionary_learning": faster(times, "dictionary_learning") / ours,
        "auxk_overhead": times["ours, AuxK, 10 % dead"] / ours - 1,
    }


ALIKE: dict[str, Any] = {"clip": CLIP, "encoder_bias": True}
"""Hyperparameters of ours in the comparison of FVU, which are those of all others there."""

COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "ours, free decoder norms": ("auto", {**ALIKE, "free_norms": True}),
    "ours, fixed decoder norms": ("auto", ALIKE),
    "ours, fixed, plain torch": ("torch", ALIKE),
    "ours, fixed, no bias, unclipped": ("auto", {}),
}
"""Name -> kernels, and what differs from the defaults of `Ours`."""


def compare_fvu(
    options: argparse.Namespace, data: np.ndarray[Any, Any], init: dict[str, Tensor], workers: dict[str, Worker]
) -> dict[str, Any]:
    """FVU of held-out vectors after the same steps from the same weights."""
    batch = batches(data, options.fvu_rows, options.device)
    held_out = torch.from_numpy(data[-HELD_OUT:]).to(options.device)
    steps, rows = options.fvu_steps, options.fvu_rows
    found: dict[str, list[float]] = {}
    for name, (kernels, settings) in COMPARED.items():
        chosen = choose_kernels(init["W_enc"], kernels)
        ours = Ours(init, options.k, options.lr, options.dtype, chosen, **settings)
        found[name] = fvu_after(steps, ours.step, ours.reconstruct, batch, held_out)
    peers = {
        name: worker.ask(f"fvu {rows} {' '.join(map(str, steps))}")
        for name, worker in workers.items()
        if name.endswith(", float32")
    }
    print(f"\nFVU after {' '.join(map(str, steps))} steps of {rows}, lr {options.lr:g}; lower is better")
    for name, values in {**found, **peers}.items():
        print(f"  {name:<40} " + " ".join(f"{value:9.5f}" for value in values))
    free, fixed, plain, reference = (values[-1] for values in found.values())
    return {
        "fvu_ours": free,
        "fvu_fixed": fixed,
        "fvu_plain": plain,
        "fvu_reference_recipe": reference,
        "fvu_peers": {name: values[-1] for name, values in peers.items()},
    }


def print_table(options: argparse.Namespace, d_model: int, n_latents: int, times: dict[str, float]) -> None:
    kernels = choose_kernels(torch.empty(0, device=options.device)).name
    print(
        f"\nN {options.rows}, d_model {d_model}, n_latents {n_latents}, k {options.k}; {options.device}, "
        f"{torch.get_num_threads()} threads; ours: {kernels} kernels, {options.dtype} product; ms, and over ours"
    )
    for name, value in times.items():
        print(f"  {name:<40} {value:9.1f} {value / times['ours']:8.2f}")


def print_parts(found: dict[str, dict[str, float]]) -> None:
    print(f"  {'kernels; ms':<40} " + " ".join(f"{name:>9}" for name in found))
    for part in next(iter(found.values())):
        print(f"  {part:<40} " + " ".join(f"{parts[part]:9.1f}" for parts in found.values()))


if __name__ == "__main__":
    main()
