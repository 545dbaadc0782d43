"""Files that are exchanged while a command uses them: each run refuses, or its result is that of one of them entirely.

    python benchmarks/bench_exchange.py [--runs N] [--seed N] [--only CASE ...]

How: of everything there are two, alike in all sizes: a tiny random model, a lens, a store, an autoencoder. A command
starts on the first; at a random moment of its time the first is moved away and the second moved to its path, as `mv`
does it. So N times for each case. Harvest, train and analyze (in threads) run in forks of this process, which has
loaded all that is slow; analyze also in processes of its own and on the workers of a Dask cluster that stays. What
comes out is held against what undisturbed runs on the first and on the second gave: all bytes of a store, those of
ckpt.safetensors, summary.json (without times) and all tables of an analysis. These name what they were made from by its
hash, so that equal bytes say which one it was. A run that refuses must say so in one line, with exit code 3 (2 where
for a moment nothing was at the path), and leave nothing that looks whole; a training must go on from what it saved once
its store is back, to the bytes of an undisturbed run.

Exit code 1 when a result was mixed, or named another than it was made from.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Its threads would be missing in our forks, which would wait for them.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import analysis.cli
import analysis.report.page
import analysis.run
import harvest.cli
import harvest.run
import harvest.settings
import train.cli
import train.run
from store.care.verify import verify
from tests.support.faults import files_of
from tests.support.harvested import write_lens
from tests.support.models import N_LAYERS, tiny_model
from train.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "harvest": harvest.cli.main,
    "train": train.cli.main,
    "analyze": analysis.cli.main,
}
NAMES = {"model": "model", "lens": "lens", "store": "acts.zarr", "autoencoder": "ckpt.pt"}
SCHEDULERS = ("threads", "processes", "cluster")
CASES = (
    *(("harvest", thing, "") for thing in ("model", "lens", "store")),
    *(("train", thing, "") for thing in ("store", "autoencoder")),
    *(("analyze", thing, scheduler) for scheduler in SCHEDULERS for thing in ("store", "autoencoder")),
    *(("analyze", thing, "threads") for thing in ("model", "lens")),
)


class Ended(NamedTuple):
    """A command that has ended."""

    code: int
    words: str
    """What it said on stderr."""
    seconds: float


class Child:
    """A command in a fork of this process."""

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115
        self._began = time.perf_counter()
        self._pid = os.fork()
        if self._pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(self._words.fileno(), 2)
            code = 99
            try:
                code = MAINS[command](list(arguments))
            except BaseException:
                import traceback

                traceback.print_exc()
            os._exit(code)

    def end(self) -> Ended:
        """Wait for the end."""
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._words.seek(0)
        words = self._words.read().decode(errors="replace")
        self._words.close()
        return Ended(code, words, time.perf_counter() - self._began)


class Bench:
    """The two of everything, what undisturbed runs give, and the table."""

    def __init__(self, folder: Path, seed: int, cluster: str) -> None:
        self.folder, self.cluster = folder, cluster
        self.rng = np.random.default_rng(seed)
        self.failures: list[str] = []
        torch.set_num_threads(1)
        harvest.settings.chunk_and_shard_tokens = lambda *sizes: (32, 96)
        self.texts = folder / "texts"
        self.texts.mkdir()
        for i in range(24):
            (self.texts / f"{i}.txt").write_text("".join(chr(97 + (i * 7 + j * j) % 26) for j in range(95)))
        self.made = {which: folder / which for which in "ab"}
        for number, (which, made) in enumerate(self.made.items()):
            made.mkdir()
            tiny_model("gpt2", made / "model", seed=number)
            write_lens(made / "lens", N_LAYERS["gpt2"])
            if which == "b":  # The same translators, the other way round.
                content = torch.load(made / "lens/params.pt")
                torch.save({name: -values / 2 for name, values in content.items()}, made / "lens/params.pt")
            self.must(*self.command("harvest", "model", made, made / "acts.zarr"))
        for number, made in enumerate(self.made.values()):  # Both of the first store.
            with self.place("a", f"trained{number}") as place:
                command, arguments = self.command("train", "store", place, made / "ckpt.pt")
                self.must(command, [*arguments, "--seed", str(number)])
        self.seconds: dict[tuple[str, str, str], float] = {}
        self.references: dict[tuple[str, str, str], list[Any]] = {}

    @contextlib.contextmanager
    def place(self, which: str, name: str) -> Iterator[Path]:
        """A folder with copies of the first or the second of everything."""
        folder = self.folder / name
        folder.mkdir()
        try:
            for made in self.made[which].iterdir():
                if made.name in NAMES.values():
                    (shutil.copytree if made.is_dir() else shutil.copyfile)(made, folder / made.name)
            yield folder
        finally:
            shutil.rmtree(folder)

    def command(self, command: str, thing: str, place: Path, out: Path, scheduler: str = "") -> tuple[str, list[str]]:
        """The command that uses everything in `place`, and its arguments."""
        model, lens, store, sae = (str(place / name) for name in NAMES.values())
        if command == "harvest":
            words = ["--model", model, "--dataset", str(self.texts), "--out", str(out), "--context-length", "20"]
            words += ["--batch-size", "3", "--device", "cpu", *(["--lens", lens] if thing == "lens" else [])]
        elif command == "train":
            words = ["--store", store, "--out", str(out), "--n-latents", "64", "--k", "4", "--batch-size", "64"]
            words += [
                "--epochs",
                "3",
                "--window-gb",
                "1e-5",
                "--kernels",
                "torch",
                "--threads",
                "1",
                "--checkpoint-every",
                "9",
            ]
        else:
            words = ["--store", store, "--sae", sae, "--out", str(out), "--no-report", "--n-workers", "2"]
            words += ["--scheduler", self.cluster if scheduler == "cluster" else scheduler]
            with_model = ["--model", model, "--downstream-tokens", "64"]
            words += with_model if thing in ("model", "lens") else ["--downstream-tokens", "0", "--no-latent-logits"]
            words += ["--lens", lens] if thing == "lens" else []
        return command, words

    def must(self, command: str, arguments: Sequence[str]) -> Ended:
        ended = Child(command, arguments).end()
        if ended.code:
            raise SystemExit(f"undisturbed: {command} ended with {ended.code}: {ended.words[-1000:]}")
        return ended

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.failures.append(what)
            print("FAILED:", what, file=sys.stderr)

    def result(self, command: str, out: Path) -> Any:
        """All that a command made, without times; None where it made nothing whole."""
        if command == "harvest":
            return files_of(out) if out.exists() and not verify(out) else None
        if command == "train":
            path = out.with_suffix(".safetensors")
            return path.read_bytes() if path.exists() else None
        if not (out / "summary.json").exists():
            return None
        summary = json.loads((out / "summary.json").read_text(), object_hook=_timeless)
        return summary, {path.name: path.read_bytes() for path in out.glob("*.parquet")}

    def out(self, command: str, place: Path) -> Path:
        return place / {"harvest": "acts.zarr", "train": "trained.pt", "analyze": "out"}[command]

    def prepare(self, command: str, thing: str, place: Path) -> None:
        """Clear the place of what the command makes; with a lens its store went through the first one."""
        if command == "harvest" or thing == "lens":
            shutil.rmtree(place / "acts.zarr")
        if (command, thing) == ("analyze", "lens"):
            shutil.copytree(self.through_lens, place / "acts.zarr")
            (place / "ckpt.pt").unlink()
            shutil.copyfile(self.of_lens, place / "ckpt.pt")

    def make_lens_store(self) -> None:
        self.through_lens, self.of_lens = self.folder / "lens/acts.zarr", self.folder / "lens/ckpt.pt"
        self.through_lens.parent.mkdir()
        self.must(*self.command("harvest", "lens", self.made["a"], self.through_lens))
        self.must(*self.command("train", "store", self.through_lens.parent, self.of_lens))

    def undisturbed(self, case: tuple[str, str, str]) -> None:
        """What the case gives on the first, and with the second in the first's place where that fits the rest."""
        command, thing, scheduler = case
        self.references[case] = []
        for exchanged in (False, True):
            with self.place("a", "run") as place:
                self.prepare(command, thing, place)
                if (exchanged and thing != "store") or (exchanged and command != "harvest"):
                    self.exchange(place, thing)
                out = self.out(command, place)
                ended = Child(*self.command(command, thing, place, out, scheduler)).end()
                if not exchanged:
                    self.seconds[case] = ended.seconds
                    self.check(ended.code == 0, f"{case}, undisturbed: {ended.code} {ended.words[-500:]}")
                if ended.code == 0:
                    self.references[case].append(self.result(command, out))

    def exchange(self, place: Path, thing: str, name: str | None = None) -> bool:
        """Move the second of a thing to the first's path; whether there was a first."""
        path = place / (name or NAMES[thing])
        second = place / f"second-{path.name}"
        made = self.made["b"] / NAMES[thing]
        (shutil.copytree if made.is_dir() else shutil.copyfile)(made, second)
        try:
            path.rename(place / f"away-{path.name}")
        except FileNotFoundError:
            return False
        second.rename(path)
        return True

    def run(self, case: tuple[str, str, str], times: int) -> None:
        command, thing, scheduler = case
        self.undisturbed(case)
        seen: Counter[str] = Counter()
        while seen.total() < times:
            with self.place("a", "run") as place:
                self.prepare(command, thing, place)
                out = self.out(command, place)
                child = Child(*self.command(command, thing, place, out, scheduler))
                time.sleep(float(self.rng.uniform(0, self.seconds[case])))
                name = "trained.pt" if (command, thing) == ("train", "autoencoder") else None
                there = self.exchange(place, thing, name)
                ended = child.end()
                if there:  # What the command itself makes may not have begun, or be whole by then.
                    seen[self.judge(case, place, ended)] += 1
        name = " ".join(part for part in (command, scheduler) if part)
        shown = ", ".join(f"{n} {what}" for what, n in seen.most_common())
        print(
            f"{' '.join(part for part in (command, scheduler) if part):<20}{thing:<14}{times:>5}   {shown}", flush=True
        )

    def judge(self, case: tuple[str, str, str], place: Path, ended: Ended) -> str:
        command, thing, _ = case
        out, what = self.out(command, place), f"{case}: exit {ended.code}: {ended.words[-400:]}"
        self.check("Traceback" not in ended.words, f"a traceback: {what}")
        if command == "harvest" and thing == "store" and (place / "away-acts.zarr").exists():
            out = place / "away-acts.zarr"  # What the run has made, or a part of it.
        found = self.result(command, out)
        if ended.code:
            errors = [line for line in ended.words.splitlines() if ": error: " in line]
            self.check(ended.code in (2, 3) and len(errors) == 1, f"not refused in one line: {what}")
            if command == "harvest":
                wrong = (
                    [bad.reason for bad in verify(out) if not bad.reason.startswith("missing")] if out.exists() else []
                )
                self.check(not wrong and found is None, f"left something wrong: {wrong}: {what}")
            elif (command, thing) == ("train", "store") and out.exists():
                self.goes_on(case, place, out)
            elif command == "analyze":
                self.check(found is None, f"left something that looks whole: {what}")
            return f"refused (exit {ended.code})"
        known = [i for i, reference in enumerate(self.references[case]) if reference == found]
        self.check(bool(known), f"a result of neither: {what}")
        return f"of the {('first', 'second')[known[0]]} entirely" if known else "MIXED"

    def goes_on(self, case: tuple[str, str, str], place: Path, out: Path) -> None:
        """A training goes on from what it saved, once its store is back."""
        first = (
            load_checkpoint(out).store["content_hash"]
            == load_checkpoint(self.made["a"] / "ckpt.pt").store["content_hash"]
        )
        self.check(first, f"{case}: what was kept names another store")
        (place / "acts.zarr").rename(place / "second")
        (place / "away-acts.zarr").rename(place / "acts.zarr")
        command, arguments = self.command("train", "store", place, out)
        ended = Child(command, [*arguments, "--resume"]).end()
        same = ended.code == 0 and self.result("train", out) == self.references[case][0]
        self.check(same, f"{case}: does not go on to the same bytes: {ended.code} {ended.words[-400:]}")


def _timeless(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "seconds"}


@contextlib.contextmanager
def dask_cluster(folder: Path) -> Iterator[str]:
    """A scheduler with two workers, in processes of their own; its address."""
    file, processes = folder / "scheduler.json", []
    words = ["--scheduler-file", str(file)]
    commands = [
        ["distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", *words],
        *([["distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard", *words]] * 2),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    try:
        for command in commands:
            processes.append(subprocess.Popen([sys.executable, "-m", *command], env=environment, **quiet))
            while not file.exists() or not file.read_text():
                time.sleep(0.1)
        time.sleep(10)  # For the workers to come.
        yield json.loads(file.read_text())["address"]
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description="Exchange files while commands use them, and look for mixtures.")
    parser.add_argument("--runs", type=int, default=5, help="exchanges in each case")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--only", nargs="+", help="cases that hold one of these words, such as train or cluster")
    options = parser.parse_args()
    cases = [case for case in CASES if not options.only or set(options.only) & set(case)]
    began = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="bench-exchange-"))
    try:
        wanted = any("cluster" in case for case in cases)
        with dask_cluster(folder) if wanted else contextlib.nullcontext("") as cluster:
            bench = Bench(folder, options.seed, cluster)
            bench.make_lens_store()
            print(f"{'command':<20}{'exchanged':<14}{'times':>5}   how it ended", flush=True)
            for case in cases:
                bench.run(case, options.runs)
    finally:
        shutil.rmtree(folder)
    print(f"{options.runs * len(cases)} exchanges, {len(bench.failures)} failures; {time.perf_counter() - began:.0f} s")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
