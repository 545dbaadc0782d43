"""The other implementations of a training step that bench_step.py times, each in a process of its own.

    PYTHON benchmarks/step_peers.py NAME MODE --data x.npy --init init.npz --rows N --k 32 --lr 1e-3 --threads 2

PYTHON is that of an environment with the peer in it (`make bench-peers`), so this file imports torch and numpy alone,
and a peer where it is used. Data are standardised vectors, float32 [V, D]; all start from the same weights and make
their steps as their own trainers do: loss, backward, clipping where they clip, Adam, unit rows where they keep them.

Requests are lines on stdin, answers lines of JSON on stdout: `time` makes a step on the next batch -> seconds;
`fvu ROWS STEPS...` starts anew and makes steps of ROWS vectors -> FVU of the vectors held out (lower is better) after
each number of STEPS, ascending. Either is NaN where torch cannot do it, or memory is too small. For FVU hyperparameters
are the same for all: an encoder bias, and gradients clipped to norm 1, which SAELens and dictionary-learning always
have (`alike`). Whether decoder rows keep unit norm is a matter of method: all keep it but SAELens.

Shapes: N rows, D d_model, M n_latents, V vectors.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HELD_OUT = 8192
"""Vectors at the end of the data on which FVU is taken, and which no step sees."""

ADAM = {"betas": (0.9, 0.999), "eps": 6.25e-10, "fused": True}
CLIP = 1.0
"""Norm that gradients are clipped to where all are alike."""

Parts = tuple[Callable[[Tensor], None], Callable[[Tensor], Tensor]]
"""A step on a batch [N, D], and a reconstruction of [N, D]."""


def dense(init: dict[str, Tensor], k: int, lr: float, mode: str, alike: bool = False) -> Parts:
    """Plain autograd: product, topk, scatter to [N, M], product; unit decoder rows after each step."""
    W_enc, W_dec, b_pre = (nn.Parameter(init[name].clone()) for name in ("W_enc", "W_dec", "b_pre"))
    b_enc = nn.Parameter(W_enc.new_zeros(len(W_enc)))
    trained = [W_enc, W_dec, b_pre, b_enc] if alike else [W_enc, W_dec, b_pre]
    optimizer = torch.optim.Adam(trained, lr=lr, **ADAM)

    def forward(x: Tensor) -> Tensor:
        z = (x - b_pre) @ W_enc.T
        values, indices = torch.topk(z + b_enc if alike else z, k, dim=1)
        return (
            torch.zeros(len(x), len(W_enc), dtype=values.dtype, device=x.device).scatter(1, indices, values.relu())
            @ W_dec.to(values.dtype)
            + b_pre
        )

    def step(x: Tensor) -> None:
        with _autocast(x, mode):
            loss = (forward(x).float() - x).square().sum(dim=1).mean()
        loss.backward()
        assert W_dec.grad is not None
        W_dec.grad -= (W_dec.grad * W_dec.data).sum(dim=1, keepdim=True) * W_dec.data
        if alike:
            nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)

    return step, forward


def sparsify(init: dict[str, Tensor], k: int, lr: float, mode: str, alike: bool = False) -> Parts:
    """EleutherAI's, with its fused encoder; Adam in place of its default, so that all optimise alike."""
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    m, d = init["W_enc"].shape
    sae: Any = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k), device=init["W_enc"].device)
    sae.encoder.weight.data.copy_(init["W_enc"])
    sae.W_dec.data.copy_(init["W_dec"])
    sae.b_dec.data.copy_(init["b_pre"])
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, **ADAM)

    def step(x: Tensor) -> None:
        with _autocast(x, mode):
            loss = sae(x).fvu
            if alike:  # clipping knows scales: the others' loss is the squared error of a vector
                loss = loss * (x - x.mean(dim=0)).square().sum() / len(x)
            loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        if alike:
            nn.utils.clip_grad_norm_(sae.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        sae.set_decoder_norm_to_unit_norm()

    return step, lambda x: sae(x).sae_out


def saelens(init: dict[str, Tensor], k: int, lr: float, mode: str, alike: bool = False) -> Parts:
    """SAELens' TopK SAE, dense or (mode "float32, sparse") with its sparse activations; clips gradients to norm 1."""
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.topk_sae import (  # pyright: ignore[reportMissingImports]
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )

    m, d = init["W_enc"].shape
    sparse = mode.endswith("sparse")
    sae: Any = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=d, d_sae=m, k=k, use_sparse_activations=sparse, apply_b_dec_to_input=True)
    ).to(init["W_enc"].device)
    sae.W_enc.data.copy_(init["W_enc"].T)
    sae.W_dec.data.copy_(init["W_dec"])
    sae.b_dec.data.copy_(init["b_pre"])
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, **ADAM)

    def step(x: Tensor) -> None:
        with _autocast(x, mode):
            inputs = TrainStepInput(
                sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
            )
            loss = sae.training_forward_pass(inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sae


def dictionary_learning(init: dict[str, Tensor], k: int, lr: float, mode: str, alike: bool = False) -> Parts:
    """saprmarks' TopKTrainer, AuxK off; clips gradients to norm 1."""
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

    m, d = init["W_enc"].shape
    trainer: Any = TopKTrainer(
        steps=10**6,
        activation_dim=d,
        dict_size=m,
        k=k,
        layer=0,
        lm_name="none",
        lr=lr,
        auxk_alpha=0,
        warmup_steps=0,
        device=str(init["W_enc"].device),
    )
    trainer.ae.encoder.weight.data.copy_(init["W_enc"])
    trainer.ae.decoder.weight.data.copy_(init["W_dec"].T)
    trainer.ae.b_dec.data.copy_(init["b_pre"])
    trainer.optimizer = torch.optim.Adam(trainer.ae.parameters(), lr=lr, **ADAM)

    def step(x: Tensor) -> None:
        with _autocast(x, mode):
            trainer.update(1, x)  # not 0, which would set the bias anew

    return step, trainer.ae


CONTENDERS = {
    "dense": (dense, ("float32", "bfloat16")),
    "sparsify": (sparsify, ("float32", "bfloat16")),
    "saelens": (saelens, ("float32", "float32, sparse", "bfloat16")),
    "dictionary_learning": (dictionary_learning, ("float32", "bfloat16")),
}
"""Name -> how it is made, and its modes; bfloat16 is autocast."""


def _autocast(x: Tensor, mode: str) -> Any:
    if mode != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, dtype=torch.bfloat16)


@torch.no_grad()
def fvu(reconstruct: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """sum |x - x_hat|^2 / sum |x - mean|^2 over vectors [V, D], mean per dimension; lower is better."""
    missed = sum((part - reconstruct(part)).double().square().sum().item() for part in x.split(1024))
    return missed / (x - x.mean(dim=0)).double().square().sum().item()


def batches(data: np.ndarray[Any, Any], rows: int, device: str) -> Callable[[int], Tensor]:
    """Batch number i, from the data before the held-out vectors, round and round."""
    count = (len(data) - HELD_OUT) // rows

    def batch(i: int) -> Tensor:
        start = i % count * rows
        return torch.from_numpy(np.ascontiguousarray(data[start : start + rows])).to(device)

    return batch


def fvu_after(
    steps: Sequence[int],
    step: Callable[[Tensor], object],
    reconstruct: Callable[[Tensor], Tensor],
    batch: Callable[[int], Tensor],
    held_out: Tensor,
) -> list[float]:
    """FVU of `held_out` [V, D] after each number of steps, ascending, of one run."""
    found = []
    for i in range(steps[-1]):
        step(batch(i))
        if i + 1 in steps:
            found.append(fvu(reconstruct, held_out))
    return found


def timed(step: Callable[[Tensor], object], x: Tensor) -> float:
    """Median seconds of steps that follow one another, as in a training, for at least a second; the device's queue
    included."""
    step(x)
    seconds: list[float] = []
    while sum(seconds) < 1:
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="One contender of bench_step.py; requests on stdin.")
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("mode")
    parser.add_argument("--data", required=True)
    parser.add_argument("--init", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peers print is no answer

    torch.set_num_threads(options.threads)
    data = np.load(options.data, mmap_mode="r")
    init = {name: torch.from_numpy(array).to(options.device) for name, array in np.load(options.init).items()}
    make, _ = CONTENDERS[options.name]
    batch = batches(data, options.rows, options.device)
    step, _ = make(init, options.k, options.lr, options.mode)
    for done, request in enumerate(sys.stdin):
        kind, *numbers = request.split()
        rows, *steps = map(int, numbers) if numbers else (0,)
        try:
            if kind == "time":
                answer = timed(step, batch(done))
            else:
                fresh, reconstruct = make(init, options.k, options.lr, options.mode, alike=True)
                held_out = torch.from_numpy(np.array(data[-HELD_OUT:])).to(options.device)
                answer = fvu_after(steps, fresh, reconstruct, batches(data, rows, options.device), held_out)
        except RuntimeError as error:  # out of memory, or an operation that torch lacks
            print(f"{options.name}, {options.mode}: {error}", file=sys.stderr)
            answer = [math.nan for _ in steps] or math.nan
        if options.device != "cpu":
            torch.cuda.empty_cache()  # the others are in processes of their own
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
