"""What the machine offers: device, fast product type, free memory. Nothing here is looked at on import."""

import importlib.util
import os

import torch

from residscope.console import human_bytes
from residscope.errors import ResidscopeError, UsageError


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one, else the CPU. `UsageError` if it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such kind of device; try auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda are supported")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UsageError(f"--device {name}: this machine has {count} CUDA devices; try --device cpu")
    return device


def resolve_product_dtype(name: str, device: torch.device) -> str:
    """The type of the encoder's product: `name`, or for "auto" the fastest that the hardware has instructions for.

    By capability and not by a measurement, so that a resumed run finds what it had. `UsageError` for products of
    integers where there are none.
    """
    if device.type == "cuda":
        if name in _INTEGERS:
            raise UsageError(
                f"--dtype {name} is for CPUs; CUDA has --dtype bfloat16, which is as fast and cannot overflow"
            )
        if name == "auto":
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        return name
    if name in _INTEGERS and not _has_integer_products():
        raise UsageError(
            f"--dtype {name} needs numba and a CPU with AVX512-VNNI: leave --dtype out for the fastest here"
        )
    if name == "auto":
        # There is no public question for it. Without AMX a bfloat16 product is slower than a float32 one.
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        return "bfloat16" if has_amx() else "int8" if _has_integer_products() else "float32"
    return name


_INTEGERS = ("int8", "int16")
"""Types of product that are compiled here, for processors with AVX512-VNNI."""


def _has_integer_products() -> bool:
    if importlib.util.find_spec("numba") is None:
        return False
    from train.kernels.cpu.int16 import integer_products_run  # here, because loading numba takes half a second

    return integer_products_run()


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had now, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:  # noqa: PTH123 (not a file that is there to be read as a path)
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None


def check_memory(needed: int, device: torch.device, way_out: str) -> None:
    """Raise `ResidscopeError` if `needed` bytes are more than there are."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ResidscopeError(
            f"this run needs about {human_bytes(needed)} on {device.type}, and {human_bytes(free)} are free: {way_out}"
        )
