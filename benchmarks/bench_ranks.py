"""Several processes that train together against one: the same weights, speed, kills, memory, and bytes that are sent.

    python benchmarks/bench_ranks.py equal      # 200 steps by one and by two, float32: TopK, BatchTopK, AuxK, shards
    python benchmarks/bench_ranks.py speed      # vectors a second of one and of two, in turn, one thread each
    python benchmarks/bench_ranks.py kills      # kill -9 of any process at random moments, then --resume
    python benchmarks/bench_ranks.py memory     # the peak of a process with --shard-latents 2 over one, with saves
    python benchmarks/bench_ranks.py bytes      # counted in the collectives of a step, against the table's formula
        (and on the loopback device: of this benchmark alone under `unshare -n sh -c "ip link set lo up; ..."`)
    python benchmarks/bench_ranks.py table      # docs/training.md: memory and bytes by dictionary and GPUs

Each prints a table; exit code 1 where a promise fails. `speed` compares runs that take turns on the same machine; on
one that others use too, both get their share of it.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

TOLERANCE, ROUNDING = 1e-4, 3
"""Largest relative difference of a tensor's norm between one process and two, in float32, after 200 steps; where other
rounding alone (a batch's rows in another order) makes more of one, because it decides which of two latents that are
equal but for rounding is chosen, so many times the largest such difference of `SHIFTS`. Most runs of 200 steps meet one
such choice or none, so one order alone tells too little."""
SHIFTS = (0, 100, 300, 500)
FASTER, MEMORY = 1.5, 0.6

COUNTING = """
import atexit, json, sys
from pathlib import Path
from train.parallel.ranks import Ranks
out, before, counts = Path(sys.argv.pop(1)), Ranks._do, []

def counted(self, name, *tensors, **options):
    sizes = [sum(p.nbytes for p in t) if isinstance(t, list) else t.nbytes for t in tensors]
    counts.append((name, self.size, max(sizes)))
    return before(self, name, *tensors, **options)

def exchanged(self, given, received):
    counts.append(("exchange", self.size, sum(t.nbytes for i, t in enumerate(given) if i != self.rank)))
    return swap(self, given, received)

swap = Ranks._exchange
Ranks._do, Ranks._exchange = counted, exchanged
atexit.register(lambda: out.write_text(json.dumps(counts)))
from train.trainer import Trainer
take = Trainer.take

def marked(self, batch):
    counts.append(("step", 0, 0))
    return take(self, batch)

Trainer.take = marked
from train.cli import main
raise SystemExit(main())
"""


REORDERED = """
import sys
sys.argv.pop(1)
from train.trainer import Trainer
take, order = Trainer.take, lambda rows: rows.flip(0).roll(SHIFT, 0)
Trainer.take = lambda self, batch: take(self, batch._replace(x=order(batch.x), layer=order(batch.layer)))
from train.cli import main
raise SystemExit(main())
"""
"""A training alone that has each batch's rows in reverse, and some of the first ones last: equal but for rounding."""


def make_store(path: Path, tokens: int, d_model: int) -> Path:
    """Eight layers of vectors with a hundred directions that are active now and then."""
    from residscope.commands.calibrate import made_up
    from store.activations import ActivationStore

    rng, n_layers = np.random.default_rng(0), 8
    meta, table = made_up(tokens, range(n_layers), d_model)
    directions = rng.normal(size=(100, d_model)).astype(np.float32)
    with ActivationStore.create(path, meta, table) as store:
        for number in range(meta.n_shards):
            start, stop = meta.shard_bounds(number)
            active = rng.random((stop - start, n_layers, 100), dtype=np.float32)
            x = np.where(active < 0.05, active * 40, 0).astype(np.float32) @ directions
            x += 0.1 * rng.normal(size=x.shape).astype(np.float32)
            store.write_shard(number, x, table.keep[start:stop])
        store.finalize()
    return path


def command(store: Path, out: Path, *flags: str, script: str | None = None) -> subprocess.Popen[str]:
    """A training of one thread a process."""
    start = ["-m", "residscope", "train"] if script is None else ["-c", script, str(out.with_suffix(".json"))]
    words = [sys.executable, *start, "--store", str(store), "--out", str(out), "--threads", "1", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = out.with_suffix(".log").open("w", encoding="utf-8")
    return subprocess.Popen(words, env=environment, stdout=log, stderr=log, text=True)


def train(store: Path, out: Path, *flags: str, script: str | None = None) -> None:
    out.parent.mkdir(exist_ok=True)
    if command(store, out, *flags, script=script).wait() != 0:
        sys.exit(out.with_suffix(".log").read_text(encoding="utf-8")[-2000:])


def equal(root: Path, options: argparse.Namespace) -> bool:
    """Weights after 200 steps."""
    import torch

    from train.checkpoint import load_checkpoint

    store = make_store(root / "acts.zarr", 4000, 64)
    common = ["--steps=200", "--batch-size=1024", "--n-latents=2048", "--k=16", "--dtype=float32", "--lr=0.001"]
    dead = ["--dead-tokens=200", "--aux-coef=0.1"]
    kinds = {
        "topk": ([], ["--n-procs=2"]),
        "topk, many dead latents": (dead, ["--n-procs=2"]),
        "batchtopk": (["--activation=batchtopk"], ["--n-procs=2"]),
        "batchtopk, many dead latents": (["--activation=batchtopk", *dead], ["--n-procs=2"]),
        "topk, many dead latents, latents over 2": (dead, ["--n-procs=2", "--shard-latents=2"]),
        "topk, many dead latents, latents over 2, rows over 2": (dead, ["--n-procs=4", "--shard-latents=2"]),
    }
    good, seen = True, {}
    print(f"{'run':<54}{'W_enc':>10}{'W_dec':>10}{'b_pre':>10}{'auxk':>8}{'dead':>8}{'allowed':>10}")

    def compare(kind: str, one: Path, flags: list[str], script: str | None = None) -> float:
        two = root / "two.pt"
        train(store, two, *common, *flags, "--overwrite", script=script)
        a, b = load_checkpoint(one), load_checkpoint(two)
        differences = []
        for name in ("W_enc", "W_dec", "b_pre"):
            ours, theirs = a.sae.state_dict()[name], b.sae.state_dict()[name]
            differences.append(float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(ours)))
        columns = "".join(f"{each:>10.1e}" for each in differences)
        metrics = b.trainer["metrics"]
        print(f"{kind:<54}{columns}{metrics['auxk']:>8.3f}{metrics['dead_fraction']:>8.1%}", end="", flush=True)
        return max(differences)

    for kind, (flags, how) in kinds.items():
        one = root / f"one{len(flags)}{flags[:1]}.pt".replace("/", "")
        if one not in seen:
            train(store, one, *common, *flags)
            for shift in SHIFTS:
                found = compare("one, rows in another order", one, flags, REORDERED.replace("SHIFT", str(shift)))
                seen[one] = max(seen.get(one, TOLERANCE), ROUNDING * found)
                print()
        good &= compare(kind, one, [*flags, *how]) <= seen[one]
        print(f"{seen[one]:>10.1e}")
    return good


def speed(root: Path, options: argparse.Namespace) -> bool:
    """Vectors a second, in turn."""
    store = make_store(root / "acts.zarr", 20_000, options.d_model)
    flags = [f"--n-latents={options.n_latents}", "--batch-size=16384", f"--steps={options.steps}", "--log-every=5"]
    flags += ["--validate-every=0", "--checkpoint-every=0", "--overwrite", "--validation-fraction=0"]
    found: dict[int, list[float]] = {1: [], 2: []}
    print("load before:", *(f"{each:.1f}" for each in os.getloadavg()))
    for _ in range(options.rounds):
        for n in found:
            train(store, root / f"{n}.pt", *flags, f"--n-procs={n}")
            lines = (root / f"{n}.metrics.jsonl").read_text(encoding="utf-8").splitlines()
            speeds = [json.loads(line)["vectors_per_second"] for line in lines[1:]]  # the first one compiles
            found[n].append(statistics.median(speeds))
            print(f"{n} process{'es' * (n > 1)}: {found[n][-1]:,.0f} vectors a second", flush=True)
    print("load after:", *(f"{each:.1f}" for each in os.getloadavg()))
    ratio = statistics.median(found[2]) / statistics.median(found[1])
    print(f"two over one: {ratio:.2f} (at least {FASTER})")
    return ratio >= FASTER


def kills(root: Path, options: argparse.Namespace) -> bool:
    """Kill one of three processes, whichever, whenever."""
    store = make_store(root / "acts.zarr", 2000, 64)
    flags = ["--n-latents=512", "--k=4", "--batch-size=256", "--steps=300", "--checkpoint-every=5", "--n-procs=3"]
    flags += ["--validate-every=7", "--dead-tokens=50"]
    (root / "whole").mkdir()
    began = time.perf_counter()
    train(store, root / "whole" / "ckpt.pt", *flags)
    took, draws, slowest = time.perf_counter() - began, random.Random(0), 0.0
    out, done, victims = root / "broken" / "ckpt.pt", 0, {"the first": 0, "another": 0}
    out.parent.mkdir()
    while done < options.kills:
        process = command(store, out, *flags, "--resume")
        before = out.stat().st_mtime_ns if out.exists() else 0
        while process.poll() is None and (out.stat().st_mtime_ns if out.exists() else 0) == before:
            time.sleep(0.01)
        time.sleep(draws.uniform(0, took / options.kills / 2))
        if process.poll() is not None:
            break
        children = [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        victim = draws.choice([process.pid, *children])
        os.kill(victim, signal.SIGKILL)
        began = time.perf_counter()
        process.wait()
        while any(Path(f"/proc/{child}").exists() for child in children):
            time.sleep(0.01)
        slowest, done = max(slowest, time.perf_counter() - began), done + 1
        victims["the first" if victim == process.pid else "another"] += 1
        said = out.with_suffix(".log").read_text(encoding="utf-8")
        if "Traceback" in said or said.count("error:") > 1:
            sys.exit(said)
    train(store, out, *flags, "--resume")
    names = ("ckpt.pt", "ckpt.safetensors")
    same = all((root / "whole" / n).read_bytes() == (root / "broken" / n).read_bytes() for n in names)
    print(f"{done} kills ({victims}); all processes gone after at most {slowest:.1f} s; same bytes: {same}")
    return same and done == options.kills


def memory(root: Path, options: argparse.Namespace) -> bool:
    """The peak of each process, from its start to its end, with a save in the middle; and of one that resumes."""
    store = make_store(root / "acts.zarr", 2000, options.d_model)
    flags = [f"--n-latents={options.n_latents}", "--batch-size=512", "--steps=6", "--log-every=1"]
    flags += ["--validate-every=0", "--checkpoint-every=3", "--validation-fraction=0", "--dead-tokens=1000"]
    good = True
    for resumed in (False, True):
        peaks = {}
        for n in (1, 2):
            out, how = root / f"{n}-{resumed}.pt", [*flags, "--resume", f"--n-procs={n}", f"--shard-latents={n}"]
            process, found = command(store, out, *how), dict[int, float]()
            while process.poll() is None:
                time.sleep(0.02)
                if resumed and not found and out.exists():
                    process.kill()
                    process.wait()
                    process = command(store, out, *how)
                    found[process.pid] = 0.0
                elif resumed and not found:
                    continue
                for pid in (process.pid, *_children(process.pid)):
                    found[pid] = max(found.get(pid, 0), _peak(pid))
            peaks[n] = max(found.values())
            print(
                f"{n} processes, resumed: {resumed}: " + ", ".join(f"{x / 1e9:.2f} GB" for x in found.values()),
                flush=True,
            )
        ratio = peaks[2] / peaks[1]
        print(f"largest of two over one: {ratio:.2f} (at most {MEMORY})")
        good &= ratio <= MEMORY
    return good


def _children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _peak(pid: int) -> float:
    try:
        (line,) = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM")]
        return 1e3 * int(line.split()[1])
    except (OSError, ValueError):
        return 0.0


def sent(name: str, ranks: int, size: float) -> float:
    """Bytes that a rank sends in one collective over `ranks`, by rings; size: of the whole tensor (exchange: sent)."""
    share = (ranks - 1) / ranks
    return {"all_reduce": 2 * size * share, "exchange": size}.get(name, size * share)


def rows_step(m: float, d: float, ranks: int) -> float:
    """Bytes that a rank sends in a step with its rows of the batch: gradients summed by rows, weights given back."""
    both = 4 * 2 * m * d
    return sent("reduce_scatter", ranks, both) + sent("all_gather", ranks, both)


def latents_step(n: float, d: float, k: int, ranks: int) -> float:
    """Bytes that a rank sends in a step on n rows with its share of the latents: candidates, reconstructions."""
    return sent("all_gather", ranks, 4 * n * k * ranks) + sent("all_reduce", ranks, 4 * n * d)


def count_bytes(root: Path, options: argparse.Namespace) -> bool:
    """A step's collectives, counted, against the formulas of the table."""
    m, d, k, n, good = 4096, 64, 16, 1024, True
    store = make_store(root / "acts.zarr", 2000, d)
    flags = [f"--n-latents={m}", f"--k={k}", f"--batch-size={n}", "--steps=6", "--aux-coef=0", "--validate-every=0"]
    for how, formula in (((), rows_step(m, d, 2)), (("--shard-latents=2",), latents_step(n, d, k, 2))):
        out = root / f"{len(how)}.pt"
        train(store, out, *flags, "--n-procs=2", *how, script=COUNTING)
        calls = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        starts = [i for i, (name, _, _) in enumerate(calls) if name == "step"]
        step = calls[starts[2] + 1 : starts[3]]
        counted = sum(sent(*call) for call in step)
        wire = []
        for steps in (6, 46):
            before = _loopback()
            train(store, out, *flags, f"--steps={steps}", "--n-procs=2", *how, "--overwrite")
            wire.append(_loopback() - before)
        real = (wire[1] - wire[0]) / 40 / 2  # a step and rank
        print(
            f"{' '.join(how) or 'rows':<20} counted {counted:>12,.0f}  formula {formula:>12,.0f}  {len(step)} calls",
            end="",
        )
        print(f"  on the loopback device {real:>12,.0f}", flush=True)
        good &= abs(counted / formula - 1) < 0.03  # the rest: firings, sums of numbers, the biases
    return good


def _loopback() -> int:
    """Bytes that this network namespace has sent to itself."""
    (line,) = [x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:")]
    return int(line.split()[9])


def table(root: Path, options: argparse.Namespace) -> bool:
    """The table of docs/training.md."""
    n, k, gpus = options.vectors, 32, (8, 64)
    print(
        "| n_latents | d_model | alone | "
        + " | ".join(f"rows over {r} | latents over {r}" for r in gpus)
        + " | default |"
    )
    print("|---:|---:|---:|" + "---:|---:|" * len(gpus) + "---|")
    for m in options.sizes:
        for d in (768, 2048, 4096):
            weights, cells, choice = 4 * 2 * m * d, [], "neither"
            for ranks in gpus:
                by_rows, by_latents = weights * (2 + 1 / ranks), 3 * weights / ranks
                cells.append(_cell(by_rows, rows_step(m, d, ranks)))
                cells.append(_cell(by_latents, latents_step(n, d, k, ranks)))
            if weights * (2 + 1 / gpus[0]) < options.gpu:
                choice = "rows"
            elif weights * 3 / gpus[0] < options.gpu:
                choice = f"latents over {next(r for r in (2, 4, 8) if weights * 3 / r < options.gpu)}"
            elif weights * 3 / gpus[1] < options.gpu:
                choice = f"latents over {next(r for r in (16, 32, 64) if weights * 3 / r < options.gpu)}"
            print(f"| {m:,} | {d:,} | {weights * 3 / 1e9:.3g} | {' | '.join(cells)} | {choice} |")
    return True


def _cell(held: float, moved: float) -> str:
    """GB held; GB sent (ms at 450 GB/s, NVLink; at 12.5 GB/s, Ethernet)."""
    return f"{held / 1e9:.3g}; {moved / 1e9:.2g} ({1e3 * moved / 450e9:.2g}; {1e3 * moved / 12.5e9:.2g})"


TASKS = {"equal": equal, "speed": speed, "kills": kills, "memory": memory, "bytes": count_bytes, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="of speed")
    parser.add_argument("--steps", type=int, default=40, help="of speed")
    parser.add_argument("--n-latents", type=int, help="of speed (9,216) and memory (131,072)")
    parser.add_argument("--d-model", type=int, default=576, help="of speed and memory")
    parser.add_argument("--vectors", type=int, default=16_384, help="of the table: in a step")
    parser.add_argument("--gpu", type=float, default=60e9, help="of the table: bytes of a GPU for weights and moments")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16_384, 131_072, 1_048_576], help="of the table")
    options = parser.parse_args()
    options.n_latents = options.n_latents or (131_072 if options.task == "memory" else 9216)
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as name:
        if not TASKS[options.task](Path(name), options):
            sys.exit("a promise does not hold")


if __name__ == "__main__":
    main()
