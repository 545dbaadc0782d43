"""kill -9 at random moments: plain runs, sweeps and single-layer sets end with the bits of an undisturbed run.

Each kind is trained once undisturbed. Then it is started with --resume, killed with SIGKILL at a random moment (while
it starts, steps, validates or saves, at whatever run of the sweep it is), and started again, until it has been killed
the wanted number of times; then it may finish. Checkpoints, safetensors and the metrics without their times are
compared. Processes are forked from this one, which has loaded torch already and never computes, so that a start takes
a moment and kills fall into the run rather than into imports.

    python benchmarks/bench_resume.py [--kills 20] [--kinds sweep] [--json]
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch loads; a forked process must not need its parent's threads
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bench_sweep import make_store  # noqa: E402
from train.cli import main as train_main  # noqa: E402

FORK = multiprocessing.get_context("fork")
FLAGS = ["--n-latents=256", "--batch-size=128", "--threads=1", "--checkpoint-every=3", "--validate-every=7"]
FLAGS += ["--log-every=4", "--window-gb=0.002", "--steps=300"]
KINDS = {
    "plain": ["--k=4"],
    "sweep": ["--sweep", "k=4,8", "lr=0.001,0.003"],
    "per-layer": ["--per-layer=total", "--k=4"],
}
EARLY = 0.2
"""Share of the kills at a random moment of the start; the others come after something new has been saved."""

TIMES = ("vectors_per_second", "data_wait_fraction")


def start(store: Path, out: Path, *flags: str) -> Any:
    """One training process."""
    process = FORK.Process(target=_train, args=(["--store", str(store), "--out", str(out), *FLAGS, *flags],))
    process.start()
    return process


def _train(words: list[str]) -> None:
    log = Path(words[3]).parent.with_suffix(".log").open("ab", buffering=0)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.exit(train_main(words))


def finish(process: Any, log: Path) -> None:
    """Wait for the end, which must be a good one."""
    process.join()
    if process.exitcode != 0:
        sys.exit(f"a run ended with exit code {process.exitcode}: {log.read_text()[-2000:]}")


def contents(folder: Path) -> dict[str, Any]:
    """What must be the same: bytes of checkpoints and safetensors, metrics without times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".pt", ".safetensors"):
            found[path.name] = path.read_bytes()
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[path.name] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return found


def trial(kind: str, store: Path, root: Path, kills: int, seed: int) -> dict[str, Any]:
    """One kind of run, killed `kills` times."""
    whole, broken = root / f"{kind}-whole", root / f"{kind}-broken"
    began = time.perf_counter()
    process = start(store, whole / "ckpt.pt", *KINDS[kind])
    wait_for_progress(process, whole, progress(whole))
    first_save = time.perf_counter() - began
    finish(process, whole.with_suffix(".log"))
    training = time.perf_counter() - began - first_save
    moments, done, early = random.Random(seed), 0, 0
    while done < kills:
        before = progress(broken)
        process = start(store, broken / "ckpt.pt", "--resume", *KINDS[kind])
        if moments.random() < EARLY:
            time.sleep(moments.uniform(0, first_save))
        else:
            wait_for_progress(process, broken, before)
            time.sleep(moments.uniform(0, training / kills))  # so that the kills are spread over the run
        if process.exitcode is not None:
            break  # it was done before the kill
        process.kill()
        process.join()
        done += 1
        early += progress(broken) == before
    finish(start(store, broken / "ckpt.pt", "--resume", *KINDS[kind]), broken.with_suffix(".log"))
    a, b = contents(whole), contents(broken)
    differing = [name for name in a if a[name] != b.get(name)]
    return {"kills": done, "before_anything_new_was_saved": early, "files": len(a), "differing": differing}


def wait_for_progress(process: Any, folder: Path, before: list[tuple[str, int]]) -> None:
    """Until something new has been saved."""
    while process.exitcode is None and progress(folder) == before:
        time.sleep(0.002)


def progress(folder: Path) -> list[tuple[str, int]]:
    """What has been saved, and when."""
    return [(path.name, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.pt"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", default="torch", help="as train's; numba: with the 8-bit screen where it applies")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    FLAGS.append(f"--kernels={options.kernels}")
    import train.run  # noqa: F401  (and torch: once, for all processes)

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_store(root / "acts.zarr", 1500)
        results = {kind: trial(kind, root / "acts.zarr", root, options.kills, options.seed) for kind in options.kinds}
    print("kind        kills  of them before a new save  files compared  differing")
    for kind, row in results.items():
        print(
            f"{kind:<10} {row['kills']:6} {row['before_anything_new_was_saved']:27} {row['files']:15} "
            f"{len(row['differing']):10}"
        )
    if options.json:
        print(json.dumps({"identical": all(not row["differing"] for row in results.values()), **results}))
    if any(row["differing"] for row in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
