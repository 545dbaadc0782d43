"""Reproducing a run bit for bit: the switches in torch, and what the last bits depend on besides the plan.

On a CPU every operation of a step sums in one order for a given number of threads, so nothing gets slower. On
CUDA torch replaces sums that use atomics (index_add, and scatter with repeats) by sorted ones, and cuBLAS works in a
fixed workspace: steps get some per cent slower, more where AuxK is busy.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from residscope.names import versions
from train.hardware import dense_dtype
from train.parallel.ranks import ALONE, Ranks


@contextlib.contextmanager
def deterministic(device: torch.device, wanted: bool | None) -> Iterator[None]:
    """Insist on deterministic operations if `wanted` (default: on a CPU)."""
    on = device.type == "cpu" if wanted is None else wanted
    before = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    if on and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    # Does the same as `use_deterministic_algorithms`, which first imports torch's compiler: nearly two seconds.
    torch.set_deterministic_debug_mode("error" if on else "default")
    # Deterministic mode would fill memory that is about to be overwritten, which is slow.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        memory.fill_uninitialized_memory = filled


def surroundings(device: str, kernels: str, product_dtype: str, ranks: Ranks = ALONE) -> dict[str, str]:
    """Versions of this program, torch and the kernels, the processor's instruction set, and the number of processes
    that train together if there are several."""
    found = versions("residscope", "torch", kernels)
    del found["python"]
    if ranks.size > 1:
        found["processes"] = str(ranks)
    if product_dtype == "int8":
        found["products beside the screen"] = str(dense_dtype(torch.int8)).removeprefix("torch.")
    if device == "cuda":
        return found | {"card": torch.cuda.get_device_name()}
    return found | {"cpu": torch.backends.cpu.get_cpu_capability()}


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What changed, in words; None if nothing changed or `before` was not recorded."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not before or not names:
        return None
    return ", ".join(f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}" for name in names)
