"""The other trainers that bench_defaults.py compares defaults with, each run in a process of its own.

    PYTHON benchmarks/default_peers.py NAME --folder F --latents 4608 --k 32 --rows 1024 --seed 0 --threads 2

PYTHON is that of an environment with the peers in it (`make bench-peers`). F holds train.npy (standardised vectors,
float16 [V, D], in an order of their own for each seed) and held_out.npy. One pass over the vectors, in steps of N rows,
with the trainer's own optimiser, learning rate, schedule and initialisation; standardisation and the bias' start (mean
of the first vectors) are given to all. The answer is a line of JSON: seconds of the steps, and where the reconstruction
of held_out.npy was saved.

Shapes: N rows, D d_model, M n_latents, V vectors.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Trainer = tuple[Callable[[Tensor], None], Callable[[], None], Callable[[Tensor], Tensor]]
"""A step on a batch [N, D]; what is done once after the last; a reconstruction of [N, D]."""


def sparsify(d: int, m: int, k: int, steps: int, mean: Tensor, optimizer: str) -> Trainer:
    """EleutherAI's `Trainer` with one of its optimisers, of which signum is the default; no AuxK, as by default.

    Its warm-up of 1,000 steps for Adam is cut to a tenth of a run that is shorter than 10,000.
    """
    from schedulefree import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]
    from sparsify.muon import Muon  # pyright: ignore[reportMissingImports]
    from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]
    from transformers import get_linear_schedule_with_warmup

    sae: Any = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k), device=mean.device, dtype=torch.float32)
    sae.b_dec.data.copy_(mean)
    warm_up, size = min(1000, steps // 10), (m / 2**14) ** 0.5
    made: list[Any] = []
    schedules: list[Any] = []
    if optimizer == "signum":
        made = [ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3 / size), momentum=0.95)]
        made[0].train()
    elif optimizer == "adam":
        made = [torch.optim.Adam(sae.parameters(), lr=2e-4 / size)]
        schedules = [get_linear_schedule_with_warmup(made[0], warm_up, steps)]
    else:
        matrices = {p for p in sae.parameters() if p.ndim >= 2}
        made = [
            Muon(matrices, lr=2e-3, ddp=False),
            torch.optim.Adam(set(sae.parameters()) - matrices, lr=2e-3),
        ]
        schedules = [
            get_linear_schedule_with_warmup(each, w, steps) for each, w in zip(made, (0, warm_up), strict=True)
        ]

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        for each in made:
            each.step()
            each.zero_grad()
        for each in schedules:
            each.step()

    def finish() -> None:
        if optimizer == "signum":
            made[0].eval()

    return step, finish, lambda x: sae(x).sae_out


def saelens(d: int, m: int, k: int, steps: int, mean: Tensor, _: str) -> Trainer:
    """SAELens' TopK SAE and the defaults of its runner: Adam at a constant 3e-4, gradients clipped to norm 1."""
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.topk_sae import (  # pyright: ignore[reportMissingImports]
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )

    sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=m, k=k, use_sparse_activations=False))
    sae.to(mean.device)
    sae.b_dec.data.copy_(mean)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4, betas=(0.9, 0.999))

    def step(x: Tensor) -> None:
        inputs = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
        sae.training_forward_pass(inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: None, sae


def dictionary_learning(d: int, m: int, k: int, steps: int, mean: Tensor, _: str) -> Trainer:
    """saprmarks' TopKTrainer with its defaults; warm-up as for sparsify, and the fall over the last fifth that its demo
    uses."""
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

    warm_up, falling = min(1000, steps // 10), int(0.8 * steps)
    trainer: Any = TopKTrainer(
        steps=steps, activation_dim=d, dict_size=m, k=k, layer=0, lm_name="none", warmup_steps=warm_up,
        decay_start=falling, device=str(mean.device),
    )  # fmt: skip
    trainer.ae.b_dec.data.copy_(mean)
    count = iter(range(1, steps + 1))  # not 0, which would set the bias anew
    return lambda x: trainer.update(next(count), x), lambda: None, trainer.ae


PEERS: dict[str, tuple[Callable[..., Trainer], str]] = {
    "sparsify, signum": (sparsify, "signum"),
    "sparsify, adam": (sparsify, "adam"),
    "sparsify, muon": (sparsify, "muon"),
    "saelens": (saelens, ""),
    "dictionary_learning": (dictionary_learning, ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="One run of another trainer with its own defaults.")
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("latents", "k", "rows", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peers print is no answer
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data = np.load(options.folder / "train.npy", mmap_mode="r")
    order = np.random.default_rng(options.seed).permutation(-(-len(data) // options.rows))
    make, variant = PEERS[options.name]
    mean = torch.from_numpy(np.array(data[:8192])).float().mean(dim=0).to(options.device)
    step, finish, reconstruct = make(data.shape[1], options.latents, options.k, len(order), mean, variant)
    seconds = 0.0
    for i in order.tolist():
        x = torch.from_numpy(np.array(data[i * options.rows : (i + 1) * options.rows])).to(options.device).float()
        started = time.perf_counter()
        step(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
    finish()
    held_out = torch.from_numpy(np.load(options.folder / "held_out.npy")).to(options.device)
    with torch.no_grad():
        found = torch.cat([reconstruct(part).float() for part in held_out.split(1024)])
    np.save(options.folder / "reconstructed.npy", found.cpu().numpy())
    print(json.dumps({"seconds": seconds, "steps": len(order)}), file=answers, flush=True)


if __name__ == "__main__":
    sys.exit(main())
