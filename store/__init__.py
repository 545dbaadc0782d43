"""Activation stores: the residual stream of every token at every layer, as a Zarr v3 group on a local disk.

`ActivationStore.open(path)` is where a reader begins; `docs/store-format.md` defines what is on the disk. The names
below are loaded when first used, so that importing `store` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from store.activations import ActivationStore
    from store.dask_arrays import dask_array
    from store.loader import WindowLoader

__all__ = ["ActivationStore", "WindowLoader", "dask_array"]

_MODULES = {
    "ActivationStore": "store.activations",
    "WindowLoader": "store.loader",
    "dask_array": "store.dask_arrays",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'store' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
