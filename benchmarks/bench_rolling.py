"""`harvest --rolling` with `train` beside it: disk, time, FVU, and what kill -9 of either side does.

    python benchmarks/bench_rolling.py [--tokens N] [--part 20] [--kills N] [--seed N] [--json]
    python benchmarks/bench_rolling.py --width 384 --latents 2048 --tokens 600_000 --part 9 --kills 0

A random model of GPT-NeoX's architecture on the sources of Python's standard library, 4,096 characters a document;
each side has one core, the same one alone and beside the other, and one thread. First both halves alone: a whole
store, and a training from it. Then both at once, with a `part`-th of the disk that the whole store takes. Then, with
--kills, the same with a kill -9 of one side or the other at random moments, each started again by the same command. The
second line is a size at which a part takes each side some seconds, so that starting and finishing do not rule.

Promised, exit code 1 where not: the disk sampled 20 times a second never holds more than the size; the checkpoint of
the broken run has the tensors of the undisturbed one; FVU on the same held-out documents is within 2 % of that of the
training from the whole store; every token is used once (steps and vectors of the checkpoint). Reported: wall time over
that of the slower half alone (lower is better; 1 is the least), and the same of each side's processor time, which says
how much of it is work and not waiting. With one core both sides share it, and the wall time is the sum of both.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

from residscope.console import parse_bytes
from store.activations import ActivationStore
from store.shuffle import validation_documents
from tests.support.models import tiny_tokenizer
from train.checkpoint import load_checkpoint
from train.model import sae_hash

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
CONTEXT = 128
CORES = sorted(os.sched_getaffinity(0))


def make_model(folder: Path, width: int) -> None:
    """A random model and a tokenizer of bytes."""
    config = transformers.GPTNeoXConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=260,
        max_position_embeddings=CONTEXT,
        bos_token_id=257,
        eos_token_id=256,
    )
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer(bos=False).save_pretrained(folder)


def write_text(path: Path) -> None:
    """A line of JSON for each document."""
    sources = sorted(Path(os.__file__).parent.glob("*.py")) + sorted(Path(os.__file__).parent.glob("[a-z]*/*.py"))
    texts = [source.read_text(errors="replace") for source in sources if "site-packages" not in source.parts]
    rows = [json.dumps({"text": text[at : at + 4096]}) for text in texts for at in range(0, len(text), 4096)]
    path.write_text("\n".join(random.Random(0).sample(rows, len(rows))))


class Side:
    """One of the two commands, which may be killed and started again."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._folder, self._words = folder, words
        self._core = CORES[0 if words[0] == "harvest" else -1]
        self.busy = 0.0  # seconds of processor time, of the last start
        self.log = folder / f"{words[0]}.log"
        self.start()

    def start(self) -> None:
        """Run the command; what it says is added to its log."""
        with self.log.open("a") as log:
            command = [sys.executable, "-m", "residscope", *self._words]
            pinned = ["taskset", "-c", str(self._core), *command]
            self.process = subprocess.Popen(pinned, cwd=self._folder, env=ENVIRONMENT, stdout=log, stderr=log)

    def end(self) -> None:
        """Wait; whatever is said of a failure ends the benchmark."""
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode, self.busy = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        if self.process.returncode != 0:
            sys.exit(f"{self._words[0]} failed:\n{self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """kill -9, and the same command again."""
        self.process.kill()
        self.process.wait()
        self.start()


class Disk(threading.Thread):
    """The most bytes that a folder was seen to hold."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder, self.most, self.ended = folder, 0, False

    def run(self) -> None:
        while not self.ended:
            self.most = max(self.most, self.look())
            time.sleep(0.05)

    def look(self) -> int:
        """Bytes there now."""
        total = 0
        for folder, _, names in os.walk(self._folder):
            for name in names:
                try:
                    total += (Path(folder) / name).stat().st_size
                except FileNotFoundError:
                    continue
        return total


def commands(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The words of both commands."""
    harvest = [
        "harvest",
        "--model",
        str(options.model),
        "--dataset",
        str(options.text),
        "--max-tokens",
        str(options.tokens),
    ]
    harvest += ["--context-length", str(CONTEXT), "--out", "a.zarr"]
    train = ["train", "--store", "a.zarr", "--out", "a.pt", "--n-latents", str(options.latents), "--k", "8"]
    return harvest, [*train, "--threads", "1", "--batch-size", "512"]


class Timed(NamedTuple):
    """Seconds that a side took."""

    wall: float
    busy: float
    """Processor time."""


ALONE, BOTH = ("harvest alone", "train alone"), ("harvest of both", "train of both")


def timed(*sides: Side) -> list[Timed]:
    """Wait for sides that have just been started."""
    began, walls = time.perf_counter(), dict[Side, float]()
    while len(walls) < len(sides):
        time.sleep(0.02)
        for side in sides:
            if side not in walls and os.waitid(os.P_PID, side.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                walls[side] = time.perf_counter() - began
                side.end()
    return [Timed(walls[side], side.busy) for side in sides]


def result(folder: Path) -> dict[str, Any]:
    """What a finished training leaves."""
    saved = load_checkpoint(folder / "a.pt")
    found = {"weights": sae_hash(saved.sae), "fvu": round(saved.trainer["validation"]["fvu"], 4)}
    return found | {"steps": saved.trainer["step"], "vectors": saved.trainer["vectors"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Rolling stores: disk, time, FVU and kills.")
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens harvested")
    parser.add_argument("--part", type=float, default=20, help="the whole store's bytes over the disk that may be used")
    parser.add_argument("--width", type=int, default=128, help="the model's d_model")
    parser.add_argument("--latents", type=int, default=512, help="the autoencoder's")
    parser.add_argument("--kills", type=int, default=10, help="of each side")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    options = parser.parse_args()
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-rolling-") as name:
        options.model, options.text = Path(name) / "model", Path(name) / "text.jsonl"
        make_model(options.model, options.width)
        write_text(options.text)
        folders = [Path(name) / part for part in ("whole", "rolling", "killed")][: 3 if options.kills else 2]
        for folder in folders:
            folder.mkdir()
        whole, rolling = folders[:2]
        harvest, train = commands(options)
        times = dict(zip(ALONE, timed(Side(whole, *harvest)), strict=False))
        n_bytes = Disk(whole / "a.zarr").look()
        size = f"{n_bytes / options.part / 1e6:.2f}MB"
        most = parse_bytes(size) or 0
        harvest += ["--rolling", size]
        follow = [*train, "--follow", "--resume"]

        disk = Disk(rolling / "a.zarr")
        disk.start()
        times |= zip(BOTH, timed(Side(rolling, *harvest), Side(rolling, *follow)), strict=True)
        store = ActivationStore.open(rolling / "a.zarr", follow=True)
        ring = store.ring
        assert ring is not None
        (times[ALONE[1]],) = timed(Side(whole, *train, "--validation-fraction", str(ring.fraction)))

        draw, kills, disk_killed = random.Random(options.seed), [0, 0], Disk(folders[-1] / "a.zarr")
        if options.kills:
            disk_killed.start()
            both = Side(folders[-1], *harvest), Side(folders[-1], *follow)
            until = times[BOTH[1]].wall * 1.5
            while any(side.process.poll() is None for side in both) and sum(kills) < 2 * options.kills:
                time.sleep(draw.uniform(0.5, until / options.kills))
                if alive := [i for i in (0, 1) if both[i].process.poll() is None]:
                    both[which := min(alive, key=lambda i: (kills[i], draw.random()))].kill()
                    kills[which] += 1
            for side in both:
                side.end()
        disk.ended = disk_killed.ended = True

        results = {folder.name: result(folder) for folder in folders}
        print(f"{options.tokens:,} tokens, {n_bytes / 1e6:.1f} MB as a whole; rolling in {size}; {kills} kills")
        for key, one in times.items():
            print(f"  {key:<16} {one.wall:7.1f} s, busy {one.busy:7.1f} s")
        ratio, parts = (
            max(times[key].wall for key in BOTH) / max(times[key].wall for key in ALONE),
            len(ring.parts(store.meta.n_shards)),
        )
        print(f"  {parts} parts; both at once over the slower alone: {ratio:.2f}")
        for log in sorted(rolling.glob("*.log")):
            print("".join(f"  {line}\n" for line in re.split(r"[\n\r]", log.read_text()) if "wait" in line), end="")
        for key, found in results.items():
            numbers = "  ".join(f"{what} {value}" for what, value in found.items())
            print(f"  {key:<8} {numbers}")
        print(f"  most disk: {disk.most / most:.3f} of the size, with kills {disk_killed.most / most:.3f}")
        if max(disk.most, disk_killed.most) > most:
            failed.append("the disk held more than it may")
        if results[folders[-1].name]["weights"] != results["rolling"]["weights"]:
            failed.append("the broken run ended with other weights")
        if abs(results["rolling"]["fvu"] / results["whole"]["fvu"] - 1) > 0.02:
            failed.append("FVU is not within 2 %")
        n_documents = int(store.tokens.document.max()) + 1
        held_out = validation_documents(n_documents, ring.fraction, ring.seed)[store.tokens.document]
        if results["rolling"]["vectors"] != int((store.tokens.keep & ~held_out).sum()) * store.meta.n_layers:
            failed.append("not every token was used once")
        if options.json:
            print(json.dumps({"times": times, "ratio": ratio, "disk": disk.most / most, "results": results}))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
