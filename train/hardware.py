"""What the machine offers: the device and the fastest product type. Importing this probes nothing."""

import functools

import torch

from residscope.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA if available, else the CPU. Raises `UsageError` if it is absent."""
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
    """The type of the encoder's product: `name`, or for "auto" the fastest that the hardware has instructions for,
    without measuring, so that a resumed run gets the same. `UsageError` for int8 if the 8-bit screen cannot run."""
    if name == "int8" and device.type == "cuda":
        raise UsageError("--dtype int8 is for CPUs; CUDA has --dtype bfloat16, which is as fast")
    if name == "int8" and not has_byte_products():
        raise UsageError("--dtype int8 needs numba and a CPU with AVX512-VNNI: leave --dtype out for the fastest here")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _has_amx() else "int8" if has_byte_products() else "float32"


def dense_dtype(product_dtype: torch.dtype) -> torch.dtype:
    """The type of products that are needed in full, in runs with `product_dtype`; checkpoints record it.

    For int8, whose screen finds only the k largest: bfloat16 on CPUs with AMX, else float32, even on CPUs with AVX-512
    bfloat16 instructions, which made products no faster (benchmarks/results/2026-11-28-kernels.md).
    """
    if product_dtype != torch.int8:
        return product_dtype
    return torch.bfloat16 if _has_amx() else torch.float32


@functools.cache
def has_byte_products() -> bool:
    """Whether the 8-bit screen can run: numba is installed, and compiles for a CPU that has AVX512-VNNI."""
    try:
        from llvmlite import binding
        from numba import config
    except ImportError:
        return False
    asked: str | None = getattr(config, "CPU_FEATURES", None)  # NUMBA_CPU_FEATURES; empty for a generic CPU
    return binding.get_host_cpu_features().get("avx512vnni", False) if asked is None else "+avx512vnni" in asked


def _has_amx() -> bool:
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # torch has no public function for it
