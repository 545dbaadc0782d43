"""Everything that a GPU can tell, in one command and one table: harvest, loading, a training step, peers, correctness.

    python benchmarks/bench_gpu.py [--sizes pythia-1b pythia-160m] [--device cuda] [--json]      (`make bench-gpu`)

Needs no network: models have random weights and SmolLM2's tokenizer, text is Python's documentation. For each size:
whole harvest over bare forward passes (bench_harvest.py); GB/s of the loader alone and of batches that arrive as
float32 on the GPU, and of a bare copy from pinned memory, which is the ceiling; a training step over the time of its
encoder product in bfloat16 plus one pass of the optimiser's traffic (three reads and three writes of both weights'
numbers, one read of the gradients) at the GPU's measured copy speed; sparsify and SAELens on the same vectors where
`make bench-peers` has made their environment, and the FVU of all (bench_step.py). Ratios: higher is better for
harvest and loading, lower for the step. Before that, every test of CUDA and Triton code runs on the GPU.
Exit code 1 where a test fails. Not measured: several GPUs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from harvest.model.load import load_tokenizer
from harvest.model.names import resolve_model
from store.activations import ActivationStore
from store.loader import WindowLoader
from train.data import VectorSource

ROOT = Path(__file__).parent.parent
TESTS = [
    "tests/analysis/test_tiles.py",
    "tests/train/kernels/cuda",
    "tests/train/kernels/test_encode.py",
    "tests/train/objective",
]


class Size(NamedTuple):
    """A model of GPT-NeoX's architecture, and how it is trained on."""

    n_layers: int
    d_model: int
    n_heads: int
    n_latents: int
    rows: tuple[int, ...]
    """Vectors in a step."""
    context: int
    tokens: int
    """Of a harvest."""
    vocabulary: int = 50_304


SIZES = {
    "pythia-1b": Size(16, 2048, 8, 131_072, (16_384, 65_536), 2048, 131_072),
    "pythia-160m": Size(12, 768, 12, 49_152, (16_384, 65_536), 2048, 131_072),
    "tiny": Size(3, 64, 4, 1024, (512,), 64, 4096),
}
"""By name; `tiny` is to see that the benchmark itself runs."""


def make_model(size: Size, folder: Path) -> Path:
    """A model's folder without weights: configuration and tokenizer."""
    load_tokenizer(resolve_model("smollm2-135m")).backend.save_pretrained(folder)
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": size.d_model,
        "intermediate_size": 4 * size.d_model,
        "num_hidden_layers": size.n_layers,
        "num_attention_heads": size.n_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def last_json(*command: str) -> dict[str, Any]:
    """The last line that a benchmark prints, as JSON; what it says before goes to stderr."""
    done = subprocess.run([sys.executable, *command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    *words, line = done.stdout.strip().splitlines()
    print(*words, sep="\n", file=sys.stderr)
    return json.loads(line)


def loading(path: Path, device: torch.device, rows: int) -> dict[str, float]:
    """GB/s of stored numbers: from the loader alone, and as float32 on the device; and of a bare copy to it."""
    found = {}
    with ActivationStore.open(path) as store:
        source = VectorSource(range(store.meta.n_layers), store.meta.stored_dtype, device)
        for name, arrive in (("loader", False), ("loader_to_device", True)):
            loader = WindowLoader(store, store.tokens.keep, rows, 0, epochs=4)
            done, began = 0, 0.0
            for number, batch in enumerate(loader):
                if number == 1:  # the first waits for the first window
                    done, began = 0, time.perf_counter()
                if arrive:
                    source(batch)
                done += batch.rows.nbytes
            _wait(device)
            found[f"{name}_gbs"] = done / (time.perf_counter() - began) / 1e9
        block = torch.empty(rows * store.meta.d_model, dtype=torch.bfloat16)
    block = block.pin_memory() if device.type == "cuda" else block
    began, copies = time.perf_counter(), 20
    for _ in range(copies):
        block.to(device, non_blocking=True, copy=True)
    _wait(device)
    return {**found, "copy_gbs": copies * block.nbytes / (time.perf_counter() - began) / 1e9}


def copy_speed(device: torch.device) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    block = torch.empty(2**26, device=device)
    other = torch.empty_like(block)
    other.copy_(block)
    _wait(device)
    began, times = time.perf_counter(), 10
    for _ in range(times):
        other.copy_(block)
    _wait(device)
    return 2 * times * block.nbytes / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(size: Size, device: torch.device, folder: Path, peers: Path) -> dict[str, float]:
    """All numbers of one size."""
    model = make_model(size, folder / "model")
    given = ["--model", str(model), "--random-init", "--dataset", "pydoc", "--device", str(device)]
    given += ["--context-length", str(size.context)]
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    harvest = last_json("benchmarks/bench_harvest.py", *given, "--dtypes", dtype, "--tokens", str(size.tokens))
    found = {key: value for key, value in harvest.items() if isinstance(value, float)}
    out = folder / "acts.zarr"
    given += ["--max-tokens", str(size.tokens), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "residscope", "harvest", *given], cwd=ROOT, check=True)
    found |= loading(out, device, size.rows[0])
    traffic = 7 * 2 * size.n_latents * size.d_model * 4 / copy_speed(device)
    for rows in size.rows:
        flags = ["--store", str(out), "--rows", str(rows), "--latents", str(size.n_latents), "--device", str(device)]
        step = last_json("benchmarks/bench_step.py", *flags, "--peers", str(peers), "--rounds", "3")
        ours, product = step["milliseconds"]["ours"], step["milliseconds"]["encoder product, bfloat16"]
        found[f"step_{rows}_ms"] = ours
        found[f"step_{rows}_over_product_and_traffic"] = ours / (product + 1000 * traffic)
        found |= {f"step_{rows}_{key}": value for key, value in step.items() if isinstance(value, float)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Harvest, loading and training on a GPU, in one table.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["pythia-1b", "pythia-160m"])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that the benchmark runs")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python", help="python that has the peers")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_gpu: torch finds no CUDA device here (`--device cpu --sizes tiny` tries the benchmark itself)")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    tests = [sys.executable, "-m", "pytest", "-q", *TESTS]
    with_gpu = {**os.environ, "RESIDSCOPE_TEST_GPU": "1"}
    passed = options.skip_tests or subprocess.run(tests, cwd=ROOT, env=with_gpu).returncode == 0
    results: dict[str, Any] = {
        "gpu": gpu,
        "torch": torch.__version__,
        "tests_passed": passed and not options.skip_tests,
    }
    for name in options.sizes:
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
            results[name] = measure(SIZES[name], device, Path(folder), options.peers)
    keys = list(dict.fromkeys(key for name in options.sizes for key in results[name]))
    verdict = "skipped" if options.skip_tests else "passed" if passed else "FAILED"
    print(f"{gpu}, torch {torch.__version__}, tests {verdict}")
    print(f"{'':<60}", *(f"{name:>14}" for name in options.sizes))
    for key in keys:
        print(f"{key:<60}", *(f"{results[name].get(key, np.nan):14.4g}" for name in options.sizes))
    if options.json:
        print(json.dumps(results))
    if not passed:
        sys.exit("bench_gpu: a test failed on this GPU")


if __name__ == "__main__":
    main()
