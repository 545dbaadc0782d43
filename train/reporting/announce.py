"""What a training prints on stderr while it runs: what it will do and need, warnings, and the progress bar."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from residscope.console import counted, human_bytes
from residscope.errors import ResidscopeError
from residscope.memory import free_memory
from train.data import TrainingData
from train.resolve import MemoryEstimate, RunPlan
from train.validation import Validation


def say(text: str) -> None:
    """Print a line for the user on stderr."""
    print(f"train: {text}", file=sys.stderr, flush=True)


def warn(warnings: Iterable[str]) -> None:
    """Print each distinct warning once; "" stands for none."""
    for warning in sorted(filter(None, {*warnings})):
        say(f"warning: {warning}")


def tell_plans(plans: Sequence[RunPlan], n_runs: int, memory: MemoryEstimate | None) -> None:
    """Say what will run, on what, and how much memory it takes; `plans`: the unfinished ones of all `n_runs`."""
    plan = plans[0]  # only used for what all plans share
    many = "" if n_runs == 1 else f"{len(plans)} of {counted(n_runs, 'run')} to do in one pass: "
    n_latents, ks = [p.model.n_latents for p in plans], [p.model.active for p in plans if p.model.active]
    limit = f"k {spread(ks)}, " if ks else ""
    say(
        f"{many}{spread(n_latents)} latents, {limit}{counted(len(plan.stream_layers or plan.layers), 'layer')} of "
        f"d_model {plan.model.d_model}; {counted(plan.steps, 'step')} of {plan.chosen.batch_size:,} vectors "
        f"(epochs: {plan.vectors / plan.vectors_per_epoch:.3g}), learning rate "
        f"{spread([p.chosen.lr for p in plans], '.2g')}, of the encoder "
        f"{spread([p.chosen.lr * p.chosen.encoder_lr for p in plans], '.2g')} (recipe {plan.chosen.recipe})"
    )
    threads = counted(torch.get_num_threads(), "thread")
    machine = f"{plan.device}, {plan.product_dtype} product, {plan.kernels} kernels, {threads}"
    if memory is not None:
        machine += f"; memory about {human_bytes(memory.device)} and {human_bytes(memory.shuffle)} for the shuffle"
        machine += f", in each of {memory.local} processes" * (memory.local > 1)
    say(machine)


def refuse_too_large(memory: MemoryEstimate, device: torch.device, n_runs: int) -> None:
    """Raise `ResidscopeError` if the machine or the device has less free memory than training needs."""
    way_out = "lower --n-latents or --expansion-factor, --batch-size, --tile-mb or --window-gb"
    if n_runs > 1:
        way_out += ", or do fewer runs at once"
    if device.type == "cuda":
        way_out += ", or divide the latents over GPUs (--n-procs, --shard-latents)"
    elif memory.local > 1:
        way_out += ", or use fewer processes"
    needed = {torch.device("cpu"): memory.local * memory.shuffle, device: memory.device}
    if device.type == "cpu":
        needed = {device: memory.local * (memory.shuffle + memory.device)}
    for place, size in needed.items():
        free = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else free_memory()
        if free is not None and size > free:
            sizes = f"needs about {human_bytes(size)} on {place.type}, {human_bytes(free)} are free"
            raise ResidscopeError(f"out of memory: this run {sizes}: {way_out}")


def progress_bar(step: int, steps: int) -> tqdm:
    """A bar on a terminal, nothing elsewhere: a log gets a line at each validation instead."""
    return tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5, disable=None)


def bar_words(lines: Sequence[Mapping], data: TrainingData, *, vectors: int, seconds: float, waited: float) -> str:
    """The bar's text: the metrics of the runs' last lines (of several runs, the range) and the speed. `vectors` were
    streamed in the last `seconds`, `waited` of which were spent waiting for data."""

    def span(name: str, form: str) -> str:
        return spread([line[name] for line in lines if line[name] is not None], form)

    row_bytes = data.store.meta.d_model * data.store.meta.itemsize
    return (
        f"FVU {span('fvu', '.3f')}, L0 {span('l0', '.1f')}, dead {span('dead_fraction', '.1%')}, "
        f"{vectors / seconds:.0f} vectors/s, {vectors / len(data.layers) / seconds:.0f} tokens/s, "
        f"{vectors * row_bytes / seconds / 1e9:.2g} GB/s, data wait {min(1.0, waited / seconds):.0%}"
    )


def tell_diverged(where: str, checkpoints: Sequence[Path], *, any_left: bool) -> None:
    """Warn of runs whose loss or weights became NaN or infinite; raise `ResidscopeError` if no other run is left."""
    way_out = "lower --lr, or set --clip-norm, and start again with --overwrite"
    if checkpoints and not any_left:
        raise ResidscopeError(f"{where}: diverged, the loss or a weight is NaN or infinite: {way_out}")
    for path in checkpoints:
        say(f"warning: {path} diverged at {where} (loss or weights not finite); its weights are useless: {way_out}")


def tell_finished(plan: RunPlan, metrics: Mapping[str, Any]) -> None:
    """Say that a run has nothing left to do; metrics: its last line."""
    diverged = not math.isfinite(metrics["loss"] or 0)
    how = ", but it diverged (NaN loss): train it again alone, with a lower --lr" if diverged else ""
    say(f"{plan.config.out} is finished ({plan.steps} steps): nothing to do{how}")


def tell_validation(bar: tqdm, where: str, sample: Sequence[Validation]) -> None:
    """Show the FVU on a sample beside the bar, or print it if there is no bar."""
    text = f"FVU {spread([each.fvu for each in sample], '.3f')} on {counted(sample[0].tokens, 'held-out token')}"
    bar.set_description(text, refresh=False)
    if bar.disable:
        say(f"{where}: {text}")


def spread(values: Sequence[float], form: str = "d") -> str:
    """The common value, or the range: "0.21 to 0.35"."""
    if not values:
        return "-"
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
