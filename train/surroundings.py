"""What a run's last bits depend on beside its plan, its store and its threads: versions, and the processor.

A checkpoint keeps it, and a resume in other surroundings is warned of: it goes on, but its end is not promised to be
that of an unbroken run. What it does not do: tell which of the changes matters.
"""

import importlib.metadata
from collections.abc import Mapping

import torch

from train.hardware import dense_dtype
from train.resolve import RunPlan


def surroundings(plan: RunPlan) -> dict[str, str]:
    """Versions of this program and of what computes, and what the processor has."""
    found = {name: _version(name) for name in ("residscope", "torch", plan.kernels)}
    if plan.product_dtype == "int8":
        found["products beside the screen"] = str(dense_dtype(plan.torch_dtype)).removeprefix("torch.")
    if plan.device == "cuda":
        return found | {"card": torch.cuda.get_device_name()}
    return found | {"cpu": torch.backends.cpu.get_cpu_capability()}


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What changed, in words; None if nothing did, or if it was not recorded."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not before or not names:
        return None
    return ", ".join(f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}" for name in names)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
