"""`train --dry-run`: how many steps, how much memory, disk and time, from a few steps whose result is discarded.

The steps are those of the real run on the real data, so the time is that of this machine now; nothing is written.
Not included: AuxK, which costs nothing until latents die and then up to half a step more; a disk that gets slower.
Tested in test_outputs.py.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from residscope.console import human_bytes, human_seconds
from store.activations import ActivationStore
from train.parallel.ranks import Ranks
from train.resolve import MemoryEstimate, RunPlan, weight_copies

MEASURED_STEPS, MEASURED_SECONDS, WARM_STEPS = 20, 10.0, 2
"""Timing stops after this many steps or seconds; the warm steps, which compile and first touch memory, come before."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What training would take."""

    runs: int
    """Autoencoders trained at once."""
    steps: int
    """Batches of the stream."""
    vectors: int
    """Vectors of the stream, over all epochs."""
    bytes_read: int
    """Bytes read from the store, over all epochs."""
    processes: int
    """Processes on this machine."""
    memory_bytes: int
    """Memory of each process on its training device."""
    shuffle_bytes: int
    """Main memory for the shuffle of each process."""
    checkpoint_bytes: int
    """Disk for the finished checkpoints of all runs and their safetensors."""
    interim_bytes: int
    """Disk for a checkpoint of each run during training, with the optimiser, and the temporary file of one."""
    measured_steps: int
    seconds_per_step: float
    """Mean of the measured steps."""
    seconds: float
    """Time of all steps at that speed."""


def time_steps(one_step: Callable[[], None], plan: RunPlan, device: torch.device, ranks: Ranks) -> list[float]:
    """Make some steps of a run, equally many on all ranks; the seconds of each one after everything is compiled."""
    seconds: list[float] = []
    for number in range(1, plan.steps + 1):
        if ranks.any(len(seconds) >= MEASURED_STEPS or sum(seconds) >= MEASURED_SECONDS):
            break
        began = time.perf_counter()
        one_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number > WARM_STEPS or number == plan.steps:
            seconds.append(time.perf_counter() - began)
    return seconds


def foresee(
    plans: Sequence[RunPlan], store: ActivationStore, memory: MemoryEstimate, seconds: Sequence[float]
) -> DryRun:
    """What runs of these plans take in one pass; seconds: the times of the measured steps."""
    plan, meta, mean = plans[0], store.meta, sum(seconds) / len(seconds)
    weights = [8 * each.model.n_latents * each.model.d_model for each in plans]
    interim = [size * weight_copies(each) for size, each in zip(weights, plans, strict=True)]
    return DryRun(
        runs=len(plans),
        steps=plan.steps,
        vectors=plan.vectors,
        bytes_read=plan.vectors * meta.d_model * meta.itemsize,
        processes=memory.local,
        memory_bytes=memory.device,
        shuffle_bytes=memory.shuffle,
        checkpoint_bytes=2 * sum(weights),
        interim_bytes=sum(interim) + max(interim),
        measured_steps=len(seconds),
        seconds_per_step=mean,
        seconds=mean * plan.steps,
    )


def describe(found: DryRun) -> str:
    """What `--dry-run` prints without --json."""
    runs = "" if found.runs == 1 else f"{found.runs} autoencoders at once, "
    each = "" if found.processes == 1 else f", in each of {found.processes} processes"
    read, interim = human_bytes(found.bytes_read), human_bytes(found.interim_bytes)
    memory, shuffle = human_bytes(found.memory_bytes), human_bytes(found.shuffle_bytes)
    return (
        f"{runs}{found.steps:,} steps, {found.vectors:,} vectors; {read} of the store to read\n"
        f"memory: {memory} to train, {shuffle} for the shuffle{each}\n"
        f"disk: {human_bytes(found.checkpoint_bytes)} at the end, up to {interim} during training\n"
        f"time: about {human_seconds(found.seconds)} ({found.seconds_per_step:.3g} s a step, mean of "
        f"{found.measured_steps}), AuxK not counted\n"
        "nothing was written"
    )
