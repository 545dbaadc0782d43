"""Activation stores: the residual stream of every token at every layer, as a Zarr v3 group on a disk or at a URL.

`ActivationStore.open(path)` is where a reader begins; `docs/store-format.md` defines what is on the disk. The names
below are loaded when first used, so that importing `store` is quick.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "ActivationStore": "store.activations",
    "Batch": "store.loader",
    "LayerStatistics": "store.moments",
    "StoreMeta": "store.meta",
    "TokenTable": "store.arrays",
    "WindowLoader": "store.loader",
    "dask_array": "store.dask_arrays",
}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'store' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
