"""Autoencoders in our own and in other projects' formats: `read_sae` and `write_sae`, loaded when asked for."""

from importlib import import_module
from typing import Any

__all__ = ["read_checkpoint", "read_sae", "write_sae"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'train.formats' has no attribute {name!r}")
    return getattr(import_module("train.formats.files"), name)
