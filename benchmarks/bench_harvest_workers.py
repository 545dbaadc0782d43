"""Harvest by worker processes: tokens per second of one and of two, and what kill -9 of a worker or the command does.

    python benchmarks/bench_harvest_workers.py [--only speed workers commands] [--kills N] [--rounds N] [--seed N]

How: a random Llama (8 blocks, d_model 512; 128 for kills) is harvested into small shards by forks of this process,
which has loaded all that is slow. Each worker has one torch thread, however many cores there are.

speed: tokens per second of `--n-workers 1` and `--n-workers 2`, which take turns; from when each worker has
done its first task to the end, so that the start of processes and the loading of the model are left out (their seconds
are printed). On a busy machine the tokens per second of processors say what they would be on a free one.
workers: `--scheduler`, of a Dask LocalCluster of two workers that stays; at a random moment one of them is killed.
commands: `--n-workers 2`; the command is killed at a random moment, and then run again, with 2, 1 or no workers.

Exit code 1 where a store has not the bytes of one that a single process filled, a process is left over, or two workers
are less than 1.7 times as fast as one.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Its threads would be missing in our forks, which would wait for them.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
import torch
import transformers

import harvest.cli
import harvest.run
import harvest.settings
from harvest.filling import workers
from residscope import cluster
from store.activations import ActivationStore
from store.shards import PutShard
from tests.support.models import tiny_tokenizer

ROOT = Path(__file__).parent.parent
CLUSTER = """
import sys, dask, residscope
from distributed import LocalCluster
from residscope.cluster import PRELOAD

if __name__ == "__main__":
    dask.config.set({"distributed.scheduler.allowed-failures": 0})
    with LocalCluster(n_workers=2, threads_per_worker=1, preload=PRELOAD, dashboard_address=":0") as local:
        print(local.scheduler_address, flush=True)
        sys.stdin.read()
"""


class Command:
    """A harvest in a fork of this process."""

    def __init__(self, bench: "Bench", out: str, tokens: int, flags: list[str], n_cores: int) -> None:
        folder, self.times = bench.folder, bench.folder / "times"
        self.words, self.manifest = folder / "words", folder / out / "manifest/0.jsonl"
        self.times.write_text("", encoding="utf-8")
        self.words.write_text("", encoding="utf-8")
        model = folder / ("large" if out == "speed.zarr" else "small")
        words = [f"--model={model}", f"--dataset={folder / 'texts'}", f"--out={folder / out}", *flags]
        words += ["--context-length=256", "--batch-size=1", "--device=cpu", f"--max-tokens={tokens}"]
        self.pid = os.fork()
        if self.pid == 0:
            stderr = os.open(self.words, os.O_WRONLY)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(stderr, 2)
            cluster.n_cores = lambda: n_cores
            commit, groups = ActivationStore.commit_shard, workers.shard_groups
            sizes: list[int] = []

            def noted(*given: Any) -> list[list[int]]:
                found = groups(*given)
                sizes.append(len(found[0]))
                return found

            workers.shard_groups = noted

            def timed(store: ActivationStore, put: PutShard) -> None:
                commit(store, put)
                used = [sum(child.cpu_times()[:2]) for child in psutil.Process().children()]
                with self.times.open("a", encoding="utf-8") as file:
                    file.write(f"{time.perf_counter()} {sum(used)} {put.record.tokens} {sizes[0]}\n")

            ActivationStore.commit_shard = timed  # type: ignore[method-assign]
            code = 99
            try:
                code = harvest.cli.main(words)
            finally:
                os._exit(code)

    def running(self) -> bool:
        return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE

    def wait_for(self, word: str, shards: int = 0) -> None:
        """Until it has said this, and committed so many shards, or has ended."""
        while self.running() and (word not in self.words.read_text(encoding="utf-8") or self.committed() < shards):
            time.sleep(0.02)

    def committed(self) -> int:
        """Shards that count; -1 where there is no store yet."""
        return len(self.manifest.read_bytes().splitlines()) - 1 if self.manifest.exists() else -1

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def rate(self, n_workers: int) -> tuple[float, float, float]:
        """When the first shard was committed; and once each worker has done a group of shards (all are of one size),
        tokens per second, and per second of processors."""
        lines = [[float(word) for word in line.split()] for line in self.times.read_text(encoding="utf-8").splitlines()]
        first, lines = lines[0][0], lines[n_workers * int(lines[0][3]) - 1 :]
        tokens = sum(line[2] for line in lines[1:])
        return first, tokens / (lines[-1][0] - lines[0][0]), tokens / (lines[-1][1] - lines[0][1])


class Bench:
    """A model, a text, and what went wrong."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.failures = folder, random.Random(seed), list[str]()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        harvest.settings.chunk_and_shard_tokens = lambda *sizes: (64, 320)
        for name, d_model in (("large", 512), ("small", 128)):
            sizes: dict[str, Any] = {"hidden_size": d_model, "intermediate_size": 3 * d_model, "num_hidden_layers": 8}
            ids: dict[str, Any] = {"vocab_size": 260, "bos_token_id": 257, "eos_token_id": 256}
            config = transformers.LlamaConfig(**sizes, **ids, num_attention_heads=8, max_position_embeddings=256)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
            tiny_tokenizer(bos=True).save_pretrained(folder / name)
        (folder / "texts").mkdir()
        for i in range(40):
            text = "".join(chr(97 + (i * 7 + j * j) % 26) for j in range(10_000))
            (folder / "texts" / f"{i:02}.txt").write_text(text, encoding="utf-8")

    def start(self, out: str, tokens: int, *flags: str, n_cores: int = 1) -> Command:
        return Command(self, out, tokens, list(flags), n_cores)

    def must(self, command: Command, what: str) -> None:
        if code := command.end():
            self.failures.append(f"{what}: exit code {code}: {command.words.read_text(encoding='utf-8')[-300:]}")

    def compare(self, out: str, whole: str, what: str) -> bool:
        """Whether two stores have the same files; the first is removed."""
        found, expected = files(self.folder / out), files(self.folder / whole)
        differing = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
        if differing:
            self.failures.append(f"{what}: other bytes in {differing[:4]}")
        shutil.rmtree(self.folder / out)
        return not differing


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def speed(bench: Bench, tokens: int, rounds: int) -> None:
    rates: dict[int, list[float]] = {1: [], 2: []}
    by_cpu: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for n in (1, 2):
            began = time.perf_counter()
            command = bench.start("speed.zarr", tokens, f"--n-workers={n}", n_cores=n)
            bench.must(command, f"{n} workers")
            first, rate, cpu = command.rate(n)
            rates[n].append(rate)
            by_cpu[n].append(cpu)
            after = f"first shard after {first - began:.0f} s, load {os.getloadavg()[0]:.1f}"
            print(
                f"round {number}: --n-workers {n} {rate:6,.0f} tok/s, {cpu:6,.0f} tok/s of processors, {after}",
                flush=True,
            )
            if (bench.folder / "one.zarr").exists():
                bench.compare("speed.zarr", "one.zarr", f"{n} workers")
            else:
                (bench.folder / "speed.zarr").rename(bench.folder / "one.zarr")
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print(f"2 workers over 1: {', '.join(f'{r:.2f}' for r in ratios)}; median {statistics.median(ratios):.2f}")
    free = 2 * statistics.median(by_cpu[2]) / statistics.median(by_cpu[1])
    print(f"by the processors' seconds: {free:.2f}, where each worker has a core to itself")
    if statistics.median(ratios) < 1.7:
        bench.failures.append("2 workers are less than 1.7 times as fast as 1")


def kill_workers(bench: Bench, tokens: int, kills: int) -> None:
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = bench.folder / "cluster.py"
    script.write_text(CLUSTER, encoding="utf-8")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    local: Any = subprocess.Popen([sys.executable, str(script)], env=environment, text=True, **pipes)
    address = f"--scheduler={local.stdout.readline().strip()}"
    same, moments = 0, []
    try:
        bench.must(bench.start("first.zarr", tokens, address), "a cluster's first harvest")
        bench.compare("first.zarr", "whole.zarr", "a cluster")
        for number in range(kills):
            began = time.monotonic()
            command = bench.start("killed.zarr", tokens, address)
            command.wait_for("Dask dashboard", shards=bench.rng.choice([0, 1, 10, 20, 30, 40]))
            time.sleep(bench.rng.uniform(0, 2))
            children = [p for p in psutil.Process(local.pid).children() if "spawn_main" in " ".join(p.cmdline())]
            moments.append(command.committed())
            bench.rng.choice(children).kill()
            bench.must(command, f"worker killed, run {number}")
            same += bench.compare("killed.zarr", "whole.zarr", f"worker killed, run {number}")
            print(f"worker killed after {moments[-1]} shards, {time.monotonic() - began:.0f} s", flush=True)
    finally:
        local.communicate("")
    print(f"a worker killed with -9, after {sorted(moments)} shards: {same} of {kills} stores have the same bytes")


def kill_commands(bench: Bench, tokens: int, kills: int) -> None:
    same, moments, left = 0, [], 0
    for number in range(kills):
        command = bench.start("killed.zarr", tokens, "--n-workers=2", n_cores=2)
        if number % 4:
            command.wait_for("Dask dashboard", shards=bench.rng.choice([0, 0, 1, 10, 30]))
        time.sleep(bench.rng.uniform(0, 2))
        children = psutil.Process(command.pid).children(recursive=True)
        moments.append(command.committed())
        os.kill(command.pid, signal.SIGKILL)
        command.end()
        psutil.wait_procs(children, timeout=20)
        left += len(alive(children))
        flags, n = bench.rng.choice([([], 1), (["--n-workers=1"], 1), (["--n-workers=2"], 2)])
        bench.must(bench.start("killed.zarr", tokens, *flags, n_cores=n), f"continued, run {number}")
        same += bench.compare("killed.zarr", "whole.zarr", f"command killed, run {number}")
        print(
            f"command killed after {moments[-1]} shards, with {len(children)} processes; went on: {flags}", flush=True
        )
    print(f"the command killed with -9, after {sorted(moments)} shards: {same} of {kills} stores have the same bytes")
    if left:
        bench.failures.append(f"{left} processes were left over")


def main() -> int:
    parser = argparse.ArgumentParser(description="Harvest by worker processes.")
    parser.add_argument("--only", nargs="+", default=["speed", "workers", "commands"])
    parser.add_argument("--kills", type=int, default=20, help="of workers; half as many of commands")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=80_000, help="for speed; kills take a quarter")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), args.seed)
        if "speed" in args.only:
            speed(bench, args.tokens, args.rounds)
        few = args.tokens // 4
        bench.must(bench.start("whole.zarr", few), "one process")
        if "workers" in args.only:
            kill_workers(bench, few, args.kills)
        if "commands" in args.only:
            kill_commands(bench, few, args.kills // 2)
        for failure in bench.failures:
            print("FAILED", failure)
        return bool(bench.failures)


if __name__ == "__main__":
    raise SystemExit(main())
