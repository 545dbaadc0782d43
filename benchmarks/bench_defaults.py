"""What one gets with default flags: FVU on held-out text against vectors and seconds, beside other trainers' defaults.

    python benchmarks/bench_defaults.py [--json] [--vectors 1e5 1e6] [--latents 4608] [--seeds 3] [--grid]

For each number of vectors a store is harvested (SmolLM2-135M; 5 % of the documents held out; tokens of outlying norm
left out, which would decide FVU) and one pass made over it by `train` with no flag but the size of the dictionary, by
`--recipe gao` and `--recipe paper`, and by the peers of default_peers.py with their own defaults, in batches of the
size that ours chose: their own are so large that runs of this length would have a few dozen steps. All reconstruct the
same held-out vectors: FVU is the mean over layers, in raw space, as `train` reports it. Seconds are those of the steps
alone for the peers, and of the whole command for ours. `--grid`: 40 other settings of ours at each size, whose best is
given.

Ratios: `fvu_over_best_peer` (1.005 counts as equal), `seconds_over_best_peer`, of the whole command over the best
peer's steps, and `fvu_over_best_of_grid`. Lower is better in all.
"""
# ruff: noqa: E402  (torch reads its environment once, when it is loaded)

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from default_peers import PEERS

from store.activations import ActivationStore
from train.checkpoint import load_checkpoint
from train.config import ValidationConfig
from train.data import split_tokens
from train.model import standardize

HELD_OUT_TOKENS = 512
REGION = 1 << 20  # training vectors that are shuffled at a time
GRID = {
    "lr": (1.5e-3, 2.5e-3, 3.5e-3, 5e-3, 7e-3),
    "encoder_lr": (0.2, 0.33, 0.5, 1),
    "second_moment": ("latent", "weight"),
}
"""Of flags: 5 x 4 x 2 settings."""


class Held:
    """The data that all have in common, in a folder: standardised training vectors, and held-out ones."""

    def __init__(self, path: Path, folder: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        with ActivationStore.open(path) as store:
            split, d = split_tokens(store, ValidationConfig.validation_fraction, seed), store.meta.d_model
            self.n_layers = len(store.meta.layers)
            held = np.flatnonzero(split.validation)
            held = np.sort(rng.choice(held, min(HELD_OUT_TOKENS, len(held)), replace=False))
            self.raw = torch.from_numpy(
                np.concatenate([store.read(slice(t, t + 1)) for t in held.tolist()])
            )  # [t, L, D]
            train = np.flatnonzero(split.train)
            places = rng.permutation(len(train) * self.n_layers).reshape(len(train), -1)
            self.vectors = places.size
            x = np.lib.format.open_memmap(folder / "train.npy", "w+", np.float16, (self.vectors, d))

            # By regions: rows go to their region in the order they come, then to their places in it. Written to
            # their places at once, the pages of a file larger than memory would be read and written many times.
            filled = np.arange(0, self.vectors, REGION)
            at = np.empty(self.vectors, np.int64)
            for start in range(0, len(train), 2048):
                part = train[start : start + 2048]
                raw = store.read(slice(int(part[0]), int(part[-1]) + 1))[part - part[0]]
                rows = standardize(torch.from_numpy(raw).flatten(0, 1)).x.numpy()
                goal = places[start : start + 2048].ravel()
                for region in np.unique(goal // REGION):
                    mine = np.flatnonzero(goal // REGION == region)
                    to = slice(filled[region], filled[region] + len(mine))
                    x[to], at[to] = rows[mine], goal[mine]
                    filled[region] = to.stop
            for start in range(0, self.vectors, REGION):
                rows, goal = x[start : start + REGION].copy(), at[start : start + REGION]
                x[goal] = rows
        self.standardized = standardize(self.raw.flatten(0, 1))
        np.save(folder / "held_out.npy", self.standardized.x.numpy())

    def fvu(self, x_hat: torch.Tensor) -> float:
        """Mean over layers, in raw space, of standardised reconstructions [t L, D]."""
        missed = (self.standardized.x - x_hat).double().square().sum(dim=1) * self.standardized.std[
            :, 0
        ].double().square()
        spread = (self.raw - self.raw.double().mean(dim=0)).square().sum(dim=(0, 2))
        return (missed.view(-1, self.n_layers).sum(dim=0) / spread).mean().item()


def ours(path: Path, out: Path, held: Held, *flags: str) -> dict[str, float]:
    """One run of `train`."""
    command = [sys.executable, "-m", "residscope", "train", "--store", str(path), "--out", str(out), "--json", *flags]
    started = time.perf_counter()
    answer = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seconds, sae = time.perf_counter() - started, load_checkpoint(out).sae
    x, one = held.standardized.x, torch.ones(len(held.standardized.x), 1)
    parts = [
        sae.decode(sae.encode_standardized(part), 0 * one[: len(part)], one[: len(part)]) for part in x.split(2048)
    ]
    trained = json.loads(answer.stdout)["training"]
    return {"fvu": held.fvu(torch.cat(parts)), "seconds": seconds, "dead": trained["dead_fraction"]}


def peer(python: Path, name: str, folder: Path, held: Held, words: list[str]) -> dict[str, float]:
    """One run of another trainer."""
    command = [str(python), str(ROOT / "benchmarks/default_peers.py"), name, "--folder", str(folder), *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found = torch.from_numpy(np.load(folder / "reconstructed.npy"))
    return {"fvu": held.fvu(found), "seconds": json.loads(done.stdout)["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out FVU of our defaults beside other trainers' defaults.")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--vectors", type=float, nargs="+", default=[1e5, 1e6], help="vectors of one pass, about")
    parser.add_argument("--latents", type=int, nargs="+", default=[4608], help="sizes of the dictionary")
    parser.add_argument("--k", type=int, default=32, help="active latents on a vector")
    parser.add_argument("--seeds", type=int, default=3, help="seeds; the median counts")
    parser.add_argument("--dataset", default="pydoc", help="text, as `harvest --dataset` takes it")
    parser.add_argument("--grid", action="store_true", help="also 40 other settings of ours")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), help="peers that are run")
    parser.add_argument("--recipes", nargs="+", choices=["gao", "paper", "best"], default=["gao", "paper", "best"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python", help="python that has the peers")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(prefix="bench-defaults-") as name:
        for vectors in options.vectors:
            results |= compare(options, vectors, Path(name))
    if options.json:
        print(json.dumps(results))


def compare(options: argparse.Namespace, vectors: float, folder: Path) -> dict[str, dict[str, float]]:
    """Everything on one store; prints a table, and returns the ratios, of each size of dictionary."""
    path = folder / f"{vectors:g}.zarr"
    tokens = int(vectors / 30 / 0.94)
    harvest = (
        f"harvest --model smollm2-135m --max-tokens {tokens} --context-length 256 --batch-size 8 --no-pack".split()
    )
    harvest += ["--mask-norm", "10", "--dataset", options.dataset, "--device", options.device, "--out", str(path)]
    subprocess.run([sys.executable, "-m", "residscope", *harvest], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    runs: dict[int, dict[str, list[dict[str, float]]]] = {latents: {} for latents in options.latents}
    held, rows = None, 0
    for seed in range(options.seeds):
        held = Held(path, folder, seed)
        for latents in options.latents:
            rows = compare_runs(options, path, held, latents, seed, runs[latents])
    assert held is not None
    return {f"{vectors:g}, {m} latents": table(found, held.vectors, m, rows) for m, found in runs.items()}


def compare_runs(
    options: argparse.Namespace,
    path: Path,
    held: Held,
    latents: int,
    seed: int,
    runs: dict[str, list[dict[str, float]]],
) -> int:
    """Add a run of each contender; gives the batch size of ours."""
    out, size = path.parent / "ckpt.pt", ["--k", str(options.k), "--threads", str(options.threads)]
    size += ["--seed", str(seed), "--device", options.device]
    flags = ["--n-latents", str(latents), "--overwrite", *size, "--validation-seed", str(seed)]

    def add(name: str, found: dict[str, float]) -> None:
        print(
            f"{held.vectors:,} vectors, {latents:,} latents, seed {seed}, {name}: {found}", file=sys.stderr, flush=True
        )
        runs.setdefault(name, []).append(found)

    for recipe in options.recipes:
        add(f"ours, {recipe}", ours(path, out, held, *flags, "--recipe", recipe))
    rows = load_checkpoint(out).trainer["config"]["batch_size"]  # of the last recipe
    for name in options.only if options.peers.exists() else ():
        words = ["--latents", str(latents), "--rows", str(rows), *size]
        add(name, peer(options.peers, name, path.parent, held, words))
    if options.grid and seed == 0:
        for values in itertools.product(*GRID.values()):
            given = [w for n, v in zip(GRID, values, strict=True) for w in (f"--{n.replace('_', '-')}", f"{v}")]
            add(f"grid: {' '.join(given)}", ours(path, out, held, *flags, *given))
    return rows


def table(runs: dict[str, list[dict[str, float]]], vectors: int, latents: int, rows: int) -> dict[str, float]:
    """Print medians over seeds; the ratios."""
    print(
        f"\n{vectors:,} vectors in one pass, batches of {rows:,}, {latents:,} latents; medians over seeds; "
        "FVU and seconds: lower is better"
    )
    median = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    for name, found in runs.items():
        spread = " ".join(f"{run['fvu']:.4f}" for run in found)
        dead = f", {median[name]['dead']:.1%} dead" if "dead" in median[name] else ""
        print(
            f"  {name:<70} FVU {median[name]['fvu']:.4f} ({spread}) {median[name]['seconds']:7.1f} s{dead}", flush=True
        )
    best = [found for name, found in median.items() if name.startswith("ours")][-1]
    grid = [found["fvu"] for name, found in median.items() if name.startswith("grid")]
    paper = median.get("ours, paper")
    ratios = {} if paper is None else {"fvu_over_paper_recipe": best["fvu"] / paper["fvu"]}
    if peers := [median[name] for name in PEERS if name in median]:
        winner = min(peers, key=lambda found: found["fvu"])
        ratios |= {
            "fvu_over_best_peer": best["fvu"] / winner["fvu"],
            "seconds_over_best_peer": best["seconds"] / winner["seconds"],
        }
    if grid:
        ratios["fvu_over_best_of_grid"] = runs["ours, best"][0]["fvu"] / min(grid)
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in ratios.items()), flush=True)
    return ratios


if __name__ == "__main__":
    main()
