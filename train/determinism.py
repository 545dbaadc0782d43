"""The same bits from the same run: what has to be switched in torch for it, and back afterwards.

On a CPU every operation of a step has one order of summing for a given number of threads, so nothing is slower for it.
On CUDA torch replaces sums that are made with atomics (index_add, and scatter with repeats) by sorted ones, and cuBLAS
works in a fixed workspace: expect steps that are some per cent slower, more where AuxK is busy.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def deterministic(device: torch.device, wanted: bool | None) -> Iterator[bool]:
    """Insist on deterministic operations if `wanted` (default: on a CPU); yields whether that is so."""
    on = device.type == "cpu" if wanted is None else wanted
    before = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    if on and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    # The same switch as `use_deterministic_algorithms`, which imports torch's compiler first: nearly two seconds.
    torch.set_deterministic_debug_mode("error" if on else "default")
    # It would fill memory that is about to be written over: costly, and no part of determinism here.
    memory.fill_uninitialized_memory = False
    try:
        yield on
    finally:
        torch.set_deterministic_debug_mode(before)
        memory.fill_uninitialized_memory = filled
