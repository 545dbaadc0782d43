"""Harvest by worker processes: tokens per second of one and of two, and what kill -9 of a worker or of the command does.

    python benchmarks/bench_harvest_workers.py [--only speed workers commands] [--kills N] [--rounds N] [--seed N]

How: a random Llama (8 blocks, d_model 512) is harvested into small shards by `harvest --n-workers N` in a process of its
own, with one torch thread a worker, however many cores there are.

speed: tokens per second of one worker and of two, which take turns; from the first shard that is committed to the last,
so that the start of processes and the loading of the model (their seconds stand beside it) are left out.
workers: at random moments between the start of the workers and the end, one of two is killed.
commands: at random moments of the whole run the command is killed; then the same command is run again.

Exit code 1 where a store has not the bytes of one that a single process filled, a process is left over, or two workers
are less than 1.7 times as fast as one.
"""

import argparse
import json
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

import psutil
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.models import tiny_tokenizer

CHILD = """
import json, sys, time
import harvest.run, residscope.cluster
from harvest.cli import main
from store.activations import ActivationStore

n_cores, n_shard, *words = sys.argv[1:]
harvest.run.chunk_and_shard_tokens = lambda *sizes: (64, int(n_shard))
residscope.cluster.n_cores = lambda: int(n_cores)
began, times = time.perf_counter(), []
commit = ActivationStore.commit_shard

def timed(store, put):
    commit(store, put)
    times.append((time.perf_counter(), put.record.tokens))

ActivationStore.commit_shard = timed
code = main(words)
if len(times) > 1:
    rate = sum(n for _, n in times[1:]) / (times[-1][0] - times[0][0])
    print(json.dumps({"rate": rate, "start": times[0][0] - began}))
sys.exit(code)
"""


class Bench:
    """A model, a text, and the store that one process made of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.failures = folder, random.Random(seed), list[str]()
        self.loading = self.filling = 0.0  # Seconds of an undisturbed run, from the start of its workers.
        config = transformers.LlamaConfig(
            vocab_size=260,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            max_position_embeddings=256,
            bos_token_id=257,
            eos_token_id=256,
        )
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        tiny_tokenizer(bos=True).save_pretrained(folder / "model")
        (folder / "texts").mkdir()
        for i in range(40):
            text = "".join(chr(97 + (i * 7 + j * j) % 26) for j in range(10_000))
            (folder / "texts" / f"{i:02}.txt").write_text(text, encoding="utf-8")

    def start(self, out: str, tokens: int, n_workers: int | None, n_cores: int = 1) -> subprocess.Popen[str]:
        flags = [f"--model={self.folder / 'model'}", f"--dataset={self.folder / 'texts'}", f"--max-tokens={tokens}"]
        flags += [f"--out={self.folder / out}", "--context-length=256", "--batch-size=2", "--device=cpu"]
        flags += [f"--n-workers={n_workers}"] if n_workers else []
        command = [sys.executable, "-c", CHILD, str(n_cores), "320", *flags]
        # Files, since a pipe would stay open in what is left over.
        with (self.folder / "out").open("w") as stdout, (self.folder / "err").open("w") as stderr:
            return subprocess.Popen(command, env=environment(), stdout=stdout, stderr=stderr, text=True)

    def end(self, process: subprocess.Popen[str]) -> int:
        """Wait; gives the exit code, and takes note of processes that are left over a few seconds later."""
        code = process.wait()
        deadline = time.monotonic() + 10
        while left := self.processes():
            if time.monotonic() > deadline:
                self.failures.append(f"left over: {left}")
                break
            time.sleep(0.2)
        return code

    def processes(self) -> list[int]:
        """Those that look at our folder: workers have its path in their environment."""
        mine = f"{MARK}={self.folder}"
        found = []
        for process in psutil.process_iter():
            try:
                if mine in "\0".join(f"{k}={v}" for k, v in process.environ().items()).split("\0"):
                    found.append(process.pid)
            except (psutil.Error, OSError):
                continue
        return [pid for pid in found if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]

    def workers(self, process: subprocess.Popen[str]) -> list[psutil.Process]:
        try:
            children = psutil.Process(process.pid).children()
            return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        except psutil.Error:
            return []

    def workers_started(self, process: subprocess.Popen[str]) -> None:
        while "Dask dashboard" not in self.words() and process.poll() is None:
            time.sleep(0.05)

    def committed(self) -> int:
        """Shards that count in the store that is killed; -1 where there is none yet."""
        manifest = self.folder / "killed.zarr/manifest/0.jsonl"
        return len(manifest.read_bytes().splitlines()) - 1 if manifest.exists() else -1

    def words(self) -> str:
        return (self.folder / "err").read_text()

    def result(self) -> dict[str, float]:
        return {k: v for line in (self.folder / "out").read_text().splitlines() if line.startswith("{")
                for k, v in json.loads(line).items()}  # fmt: skip

    def compare(self, out: str, whole: str, what: str) -> bool:
        found, expected = (
            {p.relative_to(self.folder / name).as_posix(): p.read_bytes()
             for p in (self.folder / name).rglob("*") if p.is_file()}
            for name in (out, whole)
        )  # fmt: skip
        if found != expected:
            differing = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
            self.failures.append(f"{what}: other bytes in {differing[:4]}")
        shutil.rmtree(self.folder / out)
        return found == expected

    def must(self, code: int, what: str) -> None:
        if code:
            self.failures.append(f"{what}: exit code {code}: {self.words()[-300:]}")


MARK = "RESIDSCOPE_BENCH"


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", MARK: FOLDER[0], "HF_HUB_OFFLINE": "1"}


FOLDER = [""]


def speed(bench: Bench, tokens: int, rounds: int) -> None:
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for n in (1, 2):
            bench.must(bench.end(bench.start("speed.zarr", tokens, n, n_cores=n)), f"{n} workers")
            found = bench.result()
            rates[n].append(found["rate"])
            load = os.getloadavg()[0]
            print(f"round {number}: {n} worker(s) {found['rate']:8,.0f} tok/s, first shard after {found['start']:.0f} s,"
                  f" load {load:.1f}", flush=True)  # fmt: skip
            if n == 1 and number == 0:
                (bench.folder / "speed.zarr").rename(bench.folder / "one.zarr")
            else:
                bench.compare("speed.zarr", "one.zarr", f"{n} workers")
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print(f"2 workers over 1: {', '.join(f'{r:.2f}' for r in ratios)}; median {statistics.median(ratios):.2f}")
    if max(ratios) < 1.7:
        bench.failures.append(f"2 workers are {max(ratios):.2f} times as fast as 1, at best")


def workers(bench: Bench, tokens: int, kills: int) -> None:
    same, moments = 0, []
    for number in range(kills):
        process = bench.start("killed.zarr", tokens, 2, n_cores=2)
        bench.workers_started(process)
        if number % 2:  # Most of the time is that of loading; so every second kill is after the first shards.
            while process.poll() is None and bench.committed() < 1:
                time.sleep(0.02)
        time.sleep(bench.rng.uniform(0, bench.filling if number % 2 else bench.loading))
        victims = bench.workers(process)
        while process.poll() is None and not victims:
            victims = bench.workers(process)
        if process.poll() is None:
            bench.rng.choice(victims).kill()
            moments.append(bench.committed())
        bench.must(bench.end(process), f"worker killed, run {number}")
        same += bench.compare("killed.zarr", "whole.zarr", f"worker killed, run {number}")
    print(f"a worker killed with -9, shards committed by then {moments}: {same} of {kills} stores have the same bytes")


def commands(bench: Bench, tokens: int, kills: int) -> None:
    same, moments = 0, []
    for number in range(kills):
        process = bench.start("killed.zarr", tokens, 2, n_cores=2)
        if number % 2:
            while process.poll() is None and bench.committed() < 1:
                time.sleep(0.02)
        time.sleep(bench.rng.uniform(0, bench.filling if number % 2 else bench.loading))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        bench.end(process)
        moments.append(bench.committed())
        n_workers = bench.rng.choice([None, 1, 2])
        bench.must(bench.end(bench.start("killed.zarr", tokens, n_workers, n_cores=1)), f"continued, run {number}")
        same += bench.compare("killed.zarr", "whole.zarr", f"command killed, run {number}")
    print(f"the command killed with -9, shards committed by then {moments}: {same} of {kills} have the same bytes")


def main() -> int:
    parser = argparse.ArgumentParser(description="Harvest by worker processes.")
    parser.add_argument("--only", nargs="+", default=["speed", "workers", "commands"])
    parser.add_argument("--kills", type=int, default=20, help="of workers; half as many of commands")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=100_000, help="for speed; kills take a fifth")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        FOLDER[0] = name
        bench = Bench(Path(name), args.seed)
        if "speed" in args.only:
            speed(bench, args.tokens, args.rounds)
        few = args.tokens // 5
        if {"workers", "commands"} & set(args.only):
            bench.must(bench.end(bench.start("whole.zarr", few, None)), "one process")
            began, process = time.monotonic(), bench.start("two.zarr", few, 2, n_cores=2)
            bench.workers_started(process)
            started = time.monotonic()
            bench.must(bench.end(process), "two workers")
            seconds = time.monotonic() - began
            bench.filling = seconds - bench.result()["start"]
            bench.loading = time.monotonic() - started - bench.filling
            bench.compare("two.zarr", "whole.zarr", "two workers")
            print(
                f"undisturbed, two workers: {seconds:.0f} s, loading {bench.loading:.0f}, filling {bench.filling:.0f}"
            )
        if "workers" in args.only:
            workers(bench, few, args.kills)
        if "commands" in args.only:
            commands(bench, few, args.kills // 2)
        for failure in bench.failures:
            print("FAILED", failure)
        return bool(bench.failures)


if __name__ == "__main__":
    raise SystemExit(main())
