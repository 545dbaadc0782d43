"""How fast the variance job of `analyze` is: beside the dense formulation and the encoder's product, in one run.

    python benchmarks/bench_analysis.py [--json] [--latents 9216 36864] [--tokens 256] [--rounds 3] [--dtype auto]

The job is `analysis.task.measure`: read shards, standardise, encode, decode, and sum moments, persistence and
reconstruction; without the PCA baseline, and without the null models, which are timed on their own. Dense is the same
variances the plain way: float32 product, torch.topk, a scatter to layers x tokens x latents, and sums over it. The
product is x_std @ W_enc^T alone, in bfloat16 and in float32. In float32 the job screens in 8 bits where the processor
can (`train.kernels.cpu.screen`): its codes are those of the float32 product.

One-thread times count the processor's seconds of this process, which other processes' turns are not part of; rounds
alternate and the least counts. Two workers against one goes by the clock, so it says little on a machine with other
work. Memory is the peak of a process that does the job and nothing else, its imports included; once more with four
times the tokens, which must not matter. Not measured: training, harvesting, and a cold disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from analysis import jobs
from analysis.config import StatisticsOptions, TokenOptions
from analysis.inputs import TaskSpec
from analysis.task import Sums, measure
from store.activations import ActivationStore
from store.arrays import TokenTable
from store.meta import StoreMeta, config_hash
from train.checkpoint import save_checkpoint
from train.formats.files import read_sae
from train.model import MLSAE, SAEConfig, sae_hash, standardize

N_LAYERS, D_MODEL, K = 30, 576, 32
CHUNK = 64
BATCH_TOKENS = 64
"""Tokens of the dense formulation at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the variance job against the dense formulation.")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--latents", type=int, nargs="+", default=[9216, 36864], help="sizes of the dictionary")
    parser.add_argument("--tokens", type=int, default=256, help="tokens that the job is timed on, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each measurement; the least counts")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the job's product")
    parser.add_argument("--probe", nargs=3, metavar=("STORE", "SAE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.probe:
        probe(*options.probe)
        return
    has_amx = torch.backends.cpu.get_cpu_capability() == "AVX512" and "amx_bf16" in Path("/proc/cpuinfo").read_text()
    dtype = options.dtype if options.dtype != "auto" else ("bfloat16" if has_amx else "float32")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-analysis-") as folder:
        store = make_store(Path(folder) / "acts.zarr", options.tokens)
        longer = make_store(Path(folder) / "longer.zarr", 4 * options.tokens)
        for n_latents in options.latents:
            sae = make_sae(Path(folder) / f"{n_latents}.pt", n_latents)
            kept = make_store(Path(folder) / f"kept-{n_latents}.zarr", options.tokens)
            measure(work_of(kept, sae, dtype, save_latents=True), range(options.tokens // CHUNK))
            found = time_one_thread(store, kept, sae, dtype, options.rounds)
            found |= time_workers(longer, sae, dtype, options.rounds)  # four shards are over too soon
            found["peak_gb"], found["peak_gb_of_4x_tokens"] = (
                peak_memory(path, sae, dtype) for path in (store, longer)
            )
            print_results(n_latents, options.tokens, dtype, found)
            results[str(n_latents)] = {name: round(value, 3) for name, value in found.items()}
    each = list(results.values())
    keys = {
        "speedup_over_dense": min(found["dense"] / found["job"] for found in each),
        "two_workers_over_one": min(found["two_workers_over_one"] for found in each),
        "peak_memory_gb": max(found["peak_gb_of_4x_tokens"] for found in each),
        "time_over_encoder_product": max(found["job"] / found["product_bfloat16"] for found in each),
        "time_over_float32_product": max(found["job"] / found["product_float32"] for found in each),
    }
    print("  ".join(f"{name} {value:.2f}" for name, value in keys.items()))
    if options.json:
        rounded = {name: round(value, 3) for name, value in keys.items()}
        print(json.dumps({**rounded, "dtype": dtype, "by_n_latents": results}))


def make_store(path: Path, n_tokens: int) -> Path:
    """Random activations whose layers resemble each other, as bfloat16."""
    layers = tuple(range(N_LAYERS))
    meta = StoreMeta(
        n_tokens=n_tokens,
        layers=layers,
        n_model_layers=N_LAYERS,
        d_model=D_MODEL,
        stored_dtype="bfloat16",
        codec="none",
        chunk_tokens=CHUNK,
        shard_tokens=CHUNK,
        context_length=CHUNK,
        lens=None,
        provenance={"model": "random"},
        config_hash=config_hash({"n_tokens": n_tokens}),
    )
    index = np.arange(n_tokens, dtype=np.int32)
    keep = np.ones(n_tokens, bool)
    table = TokenTable(token_id=index, document=index // CHUNK, position=index % CHUNK, keep=keep)
    rng = np.random.default_rng(0)
    with ActivationStore.create(path, meta, table) as store:
        for shard in range(meta.n_shards):
            start, stop = meta.shard_bounds(shard)
            common = rng.normal(size=(stop - start, 1, D_MODEL))
            data = (common + rng.normal(size=(stop - start, N_LAYERS, D_MODEL))).astype(np.float32)
            store.write_shard(shard, data, keep[start:stop])
        store.finalize()
    return path


def make_sae(path: Path, n_latents: int) -> Path:
    sae = MLSAE(SAEConfig(d_model=D_MODEL, n_latents=n_latents, k=K))
    sae.initialize(0)
    save_checkpoint(path, sae, store={}, trainer={})
    return path


def work_of(store: Path, sae: Path, dtype: str, *, nulls: bool = False, save_latents: bool = False) -> TaskSpec:
    return TaskSpec(
        store=str(store),
        content_hash=ActivationStore.open(store).content_hash,
        sae=str(sae),
        sae_hash=sae_hash(read_sae(sae)[0]),
        layers=tuple(range(N_LAYERS)),
        tokens=TokenOptions(),
        statistics=StatisticsOptions(dtype=dtype, nulls=nulls),  # type: ignore[arg-type]
        validation=(),
        pca=False,
        save_latents=save_latents,
    )


def time_one_thread(store_path: Path, kept: Path, sae_path: Path, dtype: str, rounds: int) -> dict[str, float]:
    """Least processor milliseconds per 64 tokens of the job, with nulls, from kept codes, dense, and the products."""
    store = ActivationStore.open(store_path)
    shards = range(store.meta.n_shards)
    weights = torch.load(sae_path, weights_only=True)["state_dict"]["W_enc"]  # [M, D]
    x = torch.from_numpy(store.read(slice(0, BATCH_TOKENS), None))
    x_std = standardize(x.view(-1, D_MODEL)).x
    bf16, weights_bf16 = x_std.bfloat16(), weights.bfloat16()
    tasks: dict[str, tuple[float, Callable[[], object]]] = {
        "job": (len(shards), lambda: measure(work_of(store_path, sae_path, dtype), shards)),
        "job_with_nulls": (len(shards), lambda: measure(work_of(store_path, sae_path, dtype, nulls=True), shards)),
        "job_from_kept_codes": (len(shards), lambda: measure(work_of(kept, sae_path, dtype), shards)),
        "dense": (1, lambda: dense(x, weights)),
        "product_bfloat16": (1, lambda: bf16 @ weights_bf16.T),
        "product_float32": (1, lambda: x_std @ weights.T),
    }
    for _, task in tasks.values():
        task()
    least = dict.fromkeys(tasks, float("inf"))
    for _ in range(rounds):
        for name, (batches, task) in tasks.items():
            start = time.process_time()
            task()
            least[name] = min(least[name], 1000 * (time.process_time() - start) / batches)
    return least


def dense(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The three variances by mass of tokens x [T, L, D], on dense activations [L, T, M]."""
    n_tokens, n_layers, _ = x.shape
    z = standardize(x.view(-1, D_MODEL)).x @ weights.T
    values, indices = torch.topk(z, K, dim=-1)
    activations = torch.zeros(n_tokens * n_layers, len(weights)).scatter_(1, indices, values.relu_())
    activations = activations.view(n_tokens, n_layers, -1).transpose(0, 1)  # [L, T, M]
    layer = (torch.arange(n_layers) - (n_layers - 1) / 2).view(-1, 1, 1)
    mass = activations.sum(dim=0)  # [T, M]
    first, second = (layer * activations).sum(dim=0), (layer**2 * activations).sum(dim=0)
    squared = torch.where(mass > 0, first**2 / mass, 0)
    return torch.stack([mass, first, second, squared]).double().sum(dim=1)


def time_workers(store: Path, sae: Path, dtype: str, rounds: int) -> dict[str, float]:
    """Seconds by the clock of one one-thread worker, of two, and of two processes with and without their start."""
    meta = ActivationStore.open(store).meta
    tokens = dict.fromkeys(range(meta.n_shards), CHUNK)
    work = "bench", measure, (work_of(store, sae, dtype),), Sums.merged, tokens
    seconds = {1: float("inf"), 2: float("inf")}
    for _ in range(rounds):
        for n_workers in seconds:
            start = time.perf_counter()
            jobs.run(jobs.Threads(n_workers), *work)
            seconds[n_workers] = min(seconds[n_workers], time.perf_counter() - start)
    start = time.perf_counter()
    with jobs.open_pool("processes", 2, meta.n_shards) as pool:
        jobs.run(pool, *work)  # loads torch and compiled code, and the weights
        warm = time.perf_counter()
        jobs.run(pool, *work)
        warm = time.perf_counter() - warm
    return {
        "two_workers_over_one": seconds[1] / seconds[2],
        "two_threads_s": seconds[2],
        "two_processes_s": warm,
        "two_processes_first_s": time.perf_counter() - start - warm,
    }


def peak_memory(store: Path, sae: Path, dtype: str) -> float:
    """GB that a process takes at its peak that does the job and nothing else."""
    command = [sys.executable, __file__, "--probe", str(store), str(sae), dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def probe(store: str, sae: str, dtype: str) -> None:
    """Do the job, a shard a task, and print this process's peak memory in GB."""
    shards = range(ActivationStore.open(store).meta.n_shards)
    work = work_of(Path(store), Path(sae), dtype)
    reduce(lambda sums, shard: Sums.merged([sums, measure(work, [shard])]), shards[1:], measure(work, shards[:1]))
    # Not getrusage: its maximum begins with what the process that started this one had.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024 / 1e9)


def print_results(n_latents: int, n_tokens: int, dtype: str, found: dict[str, float]) -> None:
    print(f"n_latents {n_latents}, {N_LAYERS} layers, d_model {D_MODEL}, k {K}, {n_tokens} tokens, job in {dtype}")
    for name in ("job", "job_with_nulls", "job_from_kept_codes", "dense", "product_bfloat16", "product_float32"):
        rate = 1000 * BATCH_TOKENS / found[name]
        print(f"  {name:<20} {found[name]:9.1f} ms of one thread per 64 tokens {rate:9.0f} tokens/s")
    print(f"  two workers over one {found['two_workers_over_one']:9.2f} (by the clock)")
    print(
        f"  two threads {found['two_threads_s']:.2f} s; two processes {found['two_processes_s']:.2f} s, "
        f"the first time {found['two_processes_first_s']:.2f} s with their start"
    )
    print(
        f"  peak memory          {found['peak_gb']:9.2f} GB; with 4x the tokens {found['peak_gb_of_4x_tokens']:.2f} GB"
    )


if __name__ == "__main__":
    main()
