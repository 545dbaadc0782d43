"""What a run costs by arithmetic: bytes, seconds and memory of harvest and training, and which part bounds them.

Parts of a token's harvest overlap (threads pack while the GPU computes), so the longest decides. Those of a training
step follow each other on the GPU; meanwhile the next batch is gathered, and others read. `residscope.commands.plan`
puts in what was measured on the machine at hand, or a GPU's data sheet, whose figures count with the shares of
`SHARES`; these, and speeds of the host, are one H200's (benchmarks/results/2026-11-29-gpu.md).

Symbols: L layers, D d_model, M n_latents, N vectors a step, k active latents, T tokens, G GPUs, R GPUs that share the
latents.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from residscope.errors import UsageError

Parts = Mapping[str, float]
"""Seconds by what takes them."""


class Gpu(NamedTuple):
    """Figures of a data sheet."""

    flops: float
    """Dense products in bfloat16, 1/s."""
    bandwidth: float
    """Of its memory, bytes/s."""
    memory: float
    """Bytes."""
    link: float
    """To other GPUs of its machine, bytes/s in one direction."""
    bus: float
    """To the machine's memory, bytes/s."""


GPUS = {
    "a100": Gpu(312e12, 2.04e12, 80e9, 300e9, 25e9),
    "h100": Gpu(989e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989e12, 4.8e12, 141e9, 450e9, 50e9),
    "b200": Gpu(2250e12, 8e12, 180e9, 900e9, 50e9),
    "l40s": Gpu(362e12, 0.864e12, 48e9, 25e9, 25e9),
    "rtx4090": Gpu(165e12, 1.008e12, 24e9, 12e9, 25e9),
}

SHARES = {"forward": 0.4, "product": 0.6, "bandwidth": 0.8}
"""Of a data sheet's figures, what a model's forward pass, the encoder's product and passes over memory are taken to
reach; an H200 reached 0.44, 0.67, and 0.76 to 0.83 in Adam's passes."""

PACKING, GATHERING = 0.44e9, 6.7e9
"""Bytes/s that each of eight threads makes into shards and writes into memory, and that rows are gathered from it."""
TILE, TABLE = 512e6, 25
"""Bytes of pre-activations at once on a GPU, and of a token while text is packed."""

_READ, _GATHER = "reading from the disk", "gathering of rows in the machine's memory"


class Model(NamedTuple):
    """What matters of a transformer."""

    n_layers: int
    d_model: int
    block_parameters: int
    """Of all blocks."""
    context: int

    @property
    def token_flops(self) -> float:
        """Of a forward pass through the blocks: two for each weight, and attention to half of the context."""
        return 2 * self.block_parameters + 2 * self.n_layers * self.context * self.d_model

    @property
    def token_bytes(self) -> int:
        """Of a token's vectors in bfloat16."""
        return 2 * self.n_layers * self.d_model


class Training(NamedTuple):
    """What matters of a training."""

    n_latents: int
    k: int
    batch: int
    steps: int
    d_model: int


def token_parts(model: Model, gpu: Gpu, n_gpus: int, *, disk: float | None, threads: int) -> dict[str, float]:
    """Seconds that a token takes one of `n_gpus`; disk: its bytes/s, which all share; None: vectors stay in memory."""
    size = model.token_bytes
    parts = {
        "the model's forward pass": model.token_flops / (SHARES["forward"] * gpu.flops),
        "copies from the GPU": size / gpu.bus,
        "packing of shards": size / (PACKING * min(threads, 8)),
    }
    return parts if disk is None else parts | {"writing to the disk": size * n_gpus / disk}


def step_parts(run: Training, gpu: Gpu, n_gpus: int, latents: int, *, disk: float | None) -> dict[str, float]:
    """Seconds of a training step on `n_gpus`, of which each `latents` share the dictionary."""
    m, d, rows = run.n_latents / latents, run.d_model, n_gpus // latents
    n = run.batch / rows
    bandwidth = SHARES["bandwidth"] * gpu.bandwidth
    tiles = math.ceil(2 * n * m / TILE)
    sent = 16 * m * d * (rows - 1) / rows + (4 * run.k * latents + 8 * d) * n * (latents - 1) / latents
    parts = {
        "the encoder's product": 2 * n * m * d / (SHARES["product"] * gpu.flops),
        "weights and pre-activations in the GPU's memory": (2 * tiles * m * d + 4 * n * m) / bandwidth,
        "the optimiser's passes over memory": (40 * m * d / rows + (16 * m * d if rows > 1 else 0)) / bandwidth,
        "decoder and sparse gradients": 16 * n * run.k * d / bandwidth,
        _GATHER: 2 * n * d / GATHERING,
        "copies to the GPU": 2 * n * d / gpu.bus,
        "sums between GPUs": sent / gpu.link,
    }
    return parts if disk is None else parts | {_READ: 2 * run.batch * d / disk}


def step_seconds(parts: Parts) -> float:
    """Of a step: the GPU's parts one after the other, while the next batch is gathered, and others are read."""
    reading, gathering = parts.get(_READ, 0.0), parts.get(_GATHER, 0.0)
    return max(sum(parts.values()) - reading - gathering, gathering, reading)


def gpu_memory(run: Training, n_gpus: int, latents: int) -> float:
    """Bytes on a GPU: weights, gradients, and moments, of its own latents; a batch; tiles."""
    m, rows = run.n_latents / latents, n_gpus // latents
    held = (16 + 8 / rows) * m * run.d_model
    return held + run.batch / rows * (24 * run.d_model + 48 * run.k) + 4 * TILE


def share_latents(run: Training, gpu: Gpu, n_gpus: int) -> int:
    """The fewest GPUs that have to share the latents; `UsageError` where all together have too little memory."""
    for latents in range(1, n_gpus + 1):
        if n_gpus % latents == 0 and gpu_memory(run, n_gpus, latents) <= 0.9 * gpu.memory:
            return latents
    needed, there = gpu_memory(run, n_gpus, n_gpus) / 1e9, gpu.memory / 1e9
    raise UsageError(
        f"--n-latents {run.n_latents:,}: takes {needed:,.0f} GB on each of {n_gpus} GPUs that share it, which have "
        f"{there:.0f}: give more --gpus, fewer latents or a smaller --batch-size"
    )


class Cost(NamedTuple):
    """What one way to run it takes."""

    disk: float
    """Bytes of vectors on the disk at once."""
    host_memory: float
    card_memory: float
    """0 without GPUs."""
    cards: tuple[int, int]
    """That harvest, and that train; all of them in turn where both are all."""
    shard_latents: int
    harvest: float
    """Seconds."""
    train: float
    together: float
    """One after the other on the same GPUs, or at the same time on their own."""
    bound: str
    """What takes longest of the longer of the two."""


START = 10.0
"""Seconds in which a command loads libraries and weights and compiles, on a small machine."""


def cost(
    n_tokens: float,
    run: Training,
    n_gpus: int,
    *,
    token: Callable[[int], Parts],
    step: Callable[[int], tuple[Parts, int, float]],
    disk: float,
    host_memory: float,
    at_once: bool,
) -> Cost:
    """token: the parts of a token on so many GPUs; step: of a step, the GPUs that share latents, memory of a GPU;
    at_once: both at the same time, on GPUs of their own where there are several."""
    ways = [(n, n_gpus - n) for n in range(1, n_gpus)] if at_once and n_gpus > 1 else [(n_gpus, n_gpus)]
    found = []
    for harvesters, trainers in ways:
        try:
            parts, latents, memory = step(trainers)
        except UsageError:
            if trainers == max(other for _, other in ways):
                raise
            continue
        tokens = token(harvesters)
        harvest = START + n_tokens / harvesters * max(tokens.values())
        train = START + run.steps * step_seconds(parts)
        together = max(harvest, train) if at_once and n_gpus > 1 else harvest + train
        longest = tokens if harvest > train else parts
        bound = max(longest, key=lambda name: longest[name])
        how = (harvesters, trainers), latents, harvest, train, together
        found.append(Cost(disk, host_memory, memory, *how, f"{'harvest' if harvest > train else 'train'}: {bound}"))
    return min(found, key=lambda each: each.together)
