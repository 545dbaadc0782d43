"""`harvest --rolling` with `train` beside it: disk, time, FVU, and what kill -9 of either side does.

    python benchmarks/bench_rolling.py [--tokens N] [--part 20] [--kills N] [--seed N] [--json]

A random model of GPT-NeoX's architecture on Python's documentation, one thread a process. First both halves alone: a
whole store, and a training from it. Then both at once, with a `part`-th of the disk that the whole store takes. Then
the same with a kill -9 of one side or the other at random moments, each started again by the same command.

Promised, exit code 1 where not: the disk sampled 20 times a second never holds more than the size; the checkpoint of
the broken run has the tensors of the undisturbed one; FVU on the same held-out documents is within 2 % of that of the
training from the whole store; every token is used once (steps and vectors of the checkpoint). Reported: wall time over
that of the slower half alone (lower is better; 1 is the least), which on few cores is the sum of both.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

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


def make_model(folder: Path) -> None:
    """A random model and a tokenizer of bytes."""
    config = transformers.GPTNeoXConfig(
        hidden_size=128,
        intermediate_size=512,
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


class Side:
    """One of the two commands, which may be killed and started again."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._folder, self._words = folder, words
        self.log = folder / f"{words[0]}.log"
        self.start()

    def start(self) -> None:
        """Run the command; what it says is added to its log."""
        with self.log.open("a") as log:
            command = [sys.executable, "-m", "residscope", *self._words]
            self.process = subprocess.Popen(command, cwd=self._folder, env=ENVIRONMENT, stdout=log, stderr=log)

    def end(self) -> None:
        """Wait; whatever is said of a failure ends the benchmark."""
        if self.process.wait() != 0:
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


def sides(folder: Path, options: argparse.Namespace, rolling: list[str], *more: str) -> tuple[Side, Side]:
    """Both commands, started."""
    harvest = ["harvest", "--model", str(options.model), "--dataset", "pydoc", "--max-tokens", str(options.tokens)]
    harvest += ["--context-length", str(CONTEXT), "--out", "a.zarr", *rolling]
    return Side(folder, *harvest), Side(folder, *TRAIN, "--follow", "--resume", *more)


TRAIN = ["train", "--store", "a.zarr", "--out", "a.pt", "--n-latents", "512", "--k", "8", "--threads", "1"]
TRAIN += ["--window-gb", "0.01", "--batch-size", "512"]


def result(folder: Path) -> dict[str, Any]:
    """What a finished training leaves."""
    saved = load_checkpoint(folder / "a.pt")
    found = {"hash": sae_hash(saved.sae), "fvu": saved.trainer["validation"]["fvu"]}
    return found | {"steps": saved.trainer["step"], "vectors": saved.trainer["vectors"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Rolling stores: disk, time, FVU and kills.")
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens harvested")
    parser.add_argument("--part", type=float, default=20, help="the whole store's bytes over the disk that may be used")
    parser.add_argument("--kills", type=int, default=10, help="of each side")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    options = parser.parse_args()
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-rolling-") as name:
        options.model = Path(name) / "model"
        make_model(options.model)
        folders = [Path(name) / part for part in ("whole", "rolling", "killed")]
        for folder in folders:
            folder.mkdir()
        whole, rolling, killed = folders
        began = time.perf_counter()
        harvest, train = sides(whole, options, [])
        train.process.kill()
        train.process.wait()
        harvest.end()
        seconds = {"harvest alone": time.perf_counter() - began}
        n_bytes = Disk(whole / "a.zarr").look()
        size = f"{n_bytes / options.part / 1e6:.2f}MB"
        most = parse_bytes(size) or 0

        began = time.perf_counter()
        disk = Disk(rolling / "a.zarr")
        disk.start()
        for side in sides(rolling, options, ["--rolling", size]):
            side.end()
        seconds["both at once"] = time.perf_counter() - began
        fraction = ActivationStore.open(rolling / "a.zarr").meta.provenance["ring"]["fraction"]
        began = time.perf_counter()
        Side(whole, *TRAIN, "--validation-fraction", str(fraction)).end()
        seconds["train alone"] = time.perf_counter() - began

        draw = random.Random(options.seed)
        disk_killed = Disk(killed / "a.zarr")
        disk_killed.start()
        both = sides(killed, options, ["--rolling", size])
        kills = [0, 0]
        until = seconds["both at once"] * 1.5
        while any(side.process.poll() is None for side in both) and sum(kills) < 2 * options.kills:
            time.sleep(draw.uniform(0.5, until / options.kills))
            which = min((0, 1), key=lambda i: (kills[i], draw.random()))
            if both[which].process.poll() is None:
                both[which].kill()
            kills[which] += 1
        for side in both:
            side.end()
        disk.ended = disk_killed.ended = True

        results = {folder.name: result(folder) for folder in folders}
        print(f"{options.tokens:,} tokens, {n_bytes / 1e6:.1f} MB as a whole; rolling in {size}; {kills} kills")
        for key, value in seconds.items():
            print(f"  {key:<14} {value:7.1f} s")
        ratio = seconds["both at once"] / max(seconds["harvest alone"], seconds["train alone"])
        print(f"  both at once over the slower alone: {ratio:.2f}")
        for key, one in results.items():
            print(f"  {key:<8} FVU {one['fvu']:.4f}  steps {one['steps']}  vectors {one['vectors']}  {one['hash']}")
        print(f"  most disk: {disk.most / most:.3f} of the size, with kills {disk_killed.most / most:.3f}")
        if max(disk.most, disk_killed.most) > most:
            failed.append("the disk held more than it may")
        if results["killed"]["hash"] != results["rolling"]["hash"]:
            failed.append("the broken run ended with other weights")
        if abs(results["rolling"]["fvu"] / results["whole"]["fvu"] - 1) > 0.02:
            failed.append("FVU is not within 2 %")
        store = ActivationStore.open(rolling / "a.zarr", follow=True)
        n_documents = int(store.tokens.document.max()) + 1
        held_out = validation_documents(n_documents, fraction, 0)[store.tokens.document]
        if results["rolling"]["vectors"] != int((store.tokens.keep & ~held_out).sum()) * store.meta.n_layers:
            failed.append("not every token was used once")
        if options.json:
            print(json.dumps({"seconds": seconds, "ratio": ratio, "disk": disk.most / most, "results": results}))
        shutil.rmtree(whole)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
