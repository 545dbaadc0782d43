"""Which activation function for what: TopK, BatchTopK, Matryoshka and JumpReLU at the same L0 on the same stream.

    python benchmarks/bench_activations.py [--store acts.zarr] [--latents 9216] [--k 32] [--seeds 2] [--json]

Without --store, 60,000 tokens of Python's documentation through SmolLM2-135M, without those of outlying norm. Each
trains with default flags but `--activation` (JumpReLU's target L0 is k), with 20 % of the documents held out, and is
analysed on these. By row:

- L0: mean active latents per vector; FVU; delta CE: nats per token of the reconstruction at one layer, mean over them.
- dead: share of the latents that are active nowhere in the held-out text.
- MMCS: mean over latents of the largest cosine with another's decoder row.
- holes: an absorption-like measure that needs no labels (after Chanin et al. 2024, arXiv 2409.14507, whose own needs
  probes). Each latent is paired with its nearest neighbour by cosine of decoder rows, where that is above 0.3 and the
  neighbour, the general one, is active on more vectors. A hole is a vector in which the special one is active and
  the general one is not, although x has as much of the general one's direction as in the median vector in which it is
  active: as if the special one had absorbed it. Given is the share of holes among the vectors with as much of it.
- ratio, run length: aggregate over token-level variance, and mean run length in layers, mass weighting.

Lower is better in FVU, delta CE, dead, MMCS and holes. Medians over seeds, with the range.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from store.activations import ActivationStore
from train.checkpoint import load_checkpoint
from train.data import split_tokens

ROOT = Path(__file__).parent.parent
ACTIVATIONS = ("topk", "batchtopk", "matryoshka", "jumprelu")
HELD_OUT, NEAR, N_TOKENS = "0.2", 0.3, 512
ROWS = ("L0", "FVU", "delta CE", "dead", "MMCS", "pairs", "holes", "ratio", "run length")


def command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "residscope", *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def holes(sae: Any, x: torch.Tensor) -> tuple[int, float]:
    """Pairs of a special and a general latent, and the share of holes, of raw vectors x [N, D]."""
    active, along = [], []
    decoder = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    for part in x.split(1024):
        out = sae(part)
        dense = torch.zeros(len(part), len(decoder), dtype=torch.bool)
        dense.scatter_(1, out.codes.indices, out.codes.values > 0)
        active.append(dense)
        along.append(((part - out.mean) / out.std - sae.b_pre.detach()) @ decoder.T)
    on, share = torch.cat(active), torch.cat(along)
    cosine = (decoder @ decoder.T).fill_diagonal_(-1)
    near, general = cosine.max(dim=1)
    count = on.sum(dim=0)
    special = torch.nonzero((near > NEAR) & (count > 0) & (count < count[general]))[:, 0].tolist()
    with_it = missed = 0
    for j in special:
        i = int(general[j])
        usual = share[on[:, i], i].median()
        both = on[:, j] & (share[:, i] >= usual)
        with_it, missed = with_it + int(both.sum()), missed + int((both & ~on[:, i]).sum())
    return len(special), missed / max(with_it, 1)


def measure(store: Path, folder: Path, activation: str, latents: int, k: int, seed: int) -> dict[str, float]:
    """One run, by row."""
    sae, out = folder / "ckpt.pt", folder / "analysis"
    flags = ("--activation", activation, "--n-latents", str(latents), "--k", str(k), "--seed", str(seed))
    command("train", "--store", str(store), "--out", str(sae), *flags, "--validation-fraction", HELD_OUT)
    few = ("--no-report", "--no-examples", "--no-latent-logits", "--no-nulls", "--downstream-tokens", "256")
    command("analyze", "--store", str(store), "--sae", str(sae), "--out", str(out), "--split", "validation", *few)
    found = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    with ActivationStore.open(store) as opened:
        held = np.flatnonzero(split_tokens(opened, float(HELD_OUT), seed).validation)
        held = np.sort(np.random.default_rng(0).choice(held, min(N_TOKENS, len(held)), replace=False))
        x = torch.from_numpy(np.concatenate([opened.read(slice(t, t + 1)) for t in held.tolist()])).flatten(0, 1)
    with torch.no_grad():
        pairs, share = holes(load_checkpoint(sae).sae, x)
    rows = (
        found["reconstruction"]["l0"],
        found["reconstruction"]["fvu"],
        found["downstream"]["delta_ce"],
        found["latents"]["dead"] / latents,
        found["redundancy"]["mmcs"],
        pairs,
        share,
        found["variance"]["mass"]["aggregate_over_token"],
        found["persistence"]["mass"]["run_length"],
    )
    return dict(zip(ROWS, rows, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="of SmolLM2-135M, or another model that `analyze` finds by itself")
    parser.add_argument("--tokens", type=int, default=60_000, help="of the store, where none is given")
    parser.add_argument("--latents", type=int, default=9216)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_activations") as name:
        store = options.store or Path(name) / "acts.zarr"
        if options.store is None:
            text = (
                "--dataset",
                "pydoc",
                "--shuffle-documents",
                "0",
                "--max-tokens",
                "60000",
                "--context-length",
                "256",
            )
            command("harvest", "--model", "smollm2-135m", *text, "--out", str(store))
        runs: dict[str, list[dict[str, float]]] = {}
        for seed in range(options.seeds):
            for activation in ACTIVATIONS:
                with tempfile.TemporaryDirectory(dir=name) as folder:
                    found = measure(store, Path(folder), activation, options.latents, options.k, seed)
                runs.setdefault(activation, []).append(found)
                print(f"{activation}, seed {seed}: {found}", file=sys.stderr, flush=True)
    print(f"| | {' | '.join(runs)} |\n" + "|---" * (len(runs) + 1) + "|")
    for row in ROWS:
        values = [[run[row] for run in of] for of in runs.values()]
        print(
            f"| {row} | " + " | ".join(f"{statistics.median(v):.4g} ({min(v):.4g}-{max(v):.4g})" for v in values) + " |"
        )
    if options.json:
        print(json.dumps(runs))


if __name__ == "__main__":
    main()
