"""Computes what a run costs: bytes, seconds and memory of harvest and training, and which part is the bottleneck.

The parts of a token's harvest overlap (threads pack while the GPU computes), so the longest decides. Those of a
training step run one after another on the GPU; meanwhile the next batch is gathered and later ones are read.
`residscope.commands.plan` supplies measurements of the machine at hand, or a GPU's data sheet, whose figures are
multiplied by `SHARES`; these, and the host's speeds, are those of an H200 (benchmarks/results/2026-11-29-gpu.md).

Symbols: L layers, D d_model, M n_latents, N vectors a step, k active latents, T tokens, G GPUs, R GPUs that share the
latents.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from residscope.errors import UsageError

Parts = Mapping[str, float]
"""Seconds by the name of the part."""


class Gpu(NamedTuple):
    """A GPU's data sheet."""

    flops: float
    """Dense bfloat16 FLOP/s."""
    bandwidth: float
    """Bandwidth of its memory, bytes/s."""
    memory: float
    """Size of its memory, bytes."""
    link: float
    """Bandwidth to other GPUs of its machine, bytes/s in one direction."""
    bus: float
    """Bandwidth to the machine's memory, bytes/s."""


GPUS = {
    "a100": Gpu(312e12, 2.04e12, 80e9, 300e9, 25e9),
    "h100": Gpu(989e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989e12, 4.8e12, 141e9, 450e9, 50e9),
    "b200": Gpu(2250e12, 8e12, 180e9, 900e9, 50e9),
    "l40s": Gpu(362e12, 0.864e12, 48e9, 25e9, 25e9),
    "rtx4090": Gpu(165e12, 1.008e12, 24e9, 12e9, 25e9),
}

SHARES = {"forward": 0.4, "product": 0.6, "bandwidth": 0.8}
"""The assumed share of the data sheet's figures that a model's forward pass, the encoder's product and passes over
memory reach; an H200 reached 0.44, 0.67, and 0.76 to 0.83 in Adam's passes."""

PACKING, GATHERING = 0.44e9, 6.7e9
"""Bytes/s that each of eight threads packs into shards and writes to memory; bytes/s of gathering rows from memory."""
TILE, TABLE = 512e6, 25
"""Bytes of pre-activations that a GPU holds at once; bytes per token while text is packed."""

_READ, _GATHER = "reading from the disk", "gathering of rows in the machine's memory"


class Model(NamedTuple):
    """What matters about a transformer."""

    n_layers: int
    d_model: int
    block_parameters: int
    """Parameters of all blocks."""
    context: int

    @property
    def token_flops(self) -> float:
        """FLOPs per token of a pass through the blocks: two per weight, and attention to half of the context."""
        return 2 * self.block_parameters + 2 * self.n_layers * self.context * self.d_model

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's vectors in bfloat16."""
        return 2 * self.n_layers * self.d_model


class Training(NamedTuple):
    """What matters about a training run."""

    n_latents: int
    k: int
    batch: int
    steps: int
    d_model: int


def token_parts(model: Model, gpu: Gpu, n_gpus: int, *, disk: float | None, threads: int) -> dict[str, float]:
    """Seconds per token on one of `n_gpus`. disk: its bytes/s, which all share; None: vectors stay in memory."""
    size = model.token_bytes
    parts = {
        "the model's forward pass": model.token_flops / (SHARES["forward"] * gpu.flops),
        "copies from the GPU": size / gpu.bus,
        "packing of shards": size / (PACKING * min(threads, 8)),
    }
    return parts if disk is None else parts | {"writing to the disk": size * n_gpus / disk}


def step_parts(run: Training, gpu: Gpu, n_gpus: int, latents: int, *, disk: float | None) -> dict[str, float]:
    """Seconds of a training step on `n_gpus`, in groups of `latents` GPUs that share one copy of the dictionary."""
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
    """Seconds of a step: the GPU's parts one after another, while the next batch is gathered and others are read."""
    reading, gathering = parts.get(_READ, 0.0), parts.get(_GATHER, 0.0)
    return max(sum(parts.values()) - reading - gathering, gathering, reading)


def gpu_memory(run: Training, n_gpus: int, latents: int) -> float:
    """Bytes on a GPU: the weights, gradients and moments of its latents, a batch, and tiles."""
    m, rows = run.n_latents / latents, n_gpus // latents
    held = (16 + 8 / rows) * m * run.d_model
    return held + run.batch / rows * (24 * run.d_model + 48 * run.k) + 4 * TILE


def share_latents(run: Training, gpu: Gpu, n_gpus: int) -> int:
    """The smallest number of GPUs that must share the latents; `UsageError` if all together lack the memory."""
    for latents in range(1, n_gpus + 1):
        if n_gpus % latents == 0 and gpu_memory(run, n_gpus, latents) <= 0.9 * gpu.memory:
            return latents
    needed, there = gpu_memory(run, n_gpus, n_gpus) / 1e9, gpu.memory / 1e9
    raise UsageError(
        f"--n-latents {run.n_latents:,}: takes {needed:,.0f} GB on each of {n_gpus} GPUs that share them, which have "
        f"{there:.0f}: give more --gpus, fewer latents or a smaller --batch-size"
    )


class Cost(NamedTuple):
    """What one way of running it costs."""

    disk: float
    """Bytes of vectors on the disk at once."""
    host_memory: float
    card_memory: float
    """0 without GPUs."""
    cards: tuple[int, int]
    """Number of GPUs that harvest, and that train; if both numbers are all GPUs, they do one after the other."""
    shard_latents: int
    harvest: float
    """Seconds."""
    train: float
    together: float
    """Seconds of both: one after the other on the same GPUs, or at the same time on separate ones."""
    bound: str
    """The bottleneck: the longest part of the longer of the two."""


START = 10.0
"""Seconds that a command needs to load libraries and weights and to compile, on a small machine."""


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
    """The cheapest split of the GPUs. token: a token's parts on so many GPUs. step: a step's parts on so many GPUs, how
    many share the latents, and the memory of each. at_once: run both at once, on separate GPUs if there are several."""
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
    return min(found, key=lambda way: way.together)
