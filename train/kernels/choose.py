"""Which kernels to use: the one place that decides, by device, number type and what is installed."""

import functools
import importlib.util

import torch
from torch import Tensor

from residscope.errors import ResidscopeError, UsageError
from residscope.memory import keep_freed_memory
from train.kernels.interface import Kernels
from train.kernels.plain import TORCH

_COMPILED = {"cpu": "numba", "cuda": "triton"}
"""Kind of device -> the package that compiles kernels for it."""


def choose_kernels(like: Tensor, name: str = "auto") -> Kernels:
    """The kernels for tensors of the type and on the device of `like`.

    "auto": the compiled ones if they apply (float32 or float64; numba on a CPU, Triton on CUDA, installed), else plain
    torch. "torch", "numba" and "triton": only these; raises `UsageError` if they do not apply, `ResidscopeError` if
    they are not installed.
    """
    if like.device.type == "cpu":
        keep_freed_memory(2**26)  # Each step makes the same temporaries, except AuxK's.
    compiled = _COMPILED.get(like.device.type)
    applies = like.dtype in (torch.float32, torch.float64)
    if name == "auto":
        name = compiled if applies and compiled is not None and _installed(compiled) else "torch"
    if name == "torch":
        return TORCH
    if name != compiled or not applies:
        kind = "a CPU" if name == "numba" else "CUDA"
        raise UsageError(f"{name} kernels run on {kind}, in float32 or float64; found {like.device}, {like.dtype}")
    if not _installed(name):
        raise ResidscopeError(f"{name} is not installed: `pip install {name}`, or leave out --kernels {name}")
    # Imported only now, because either takes half a second.
    if name == "numba":
        from train.kernels.cpu.backend import NUMBA

        return NUMBA
    from train.kernels.cuda.backend import TRITON

    return TRITON


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
