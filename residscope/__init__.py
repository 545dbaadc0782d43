"""Cache a transformer's residual stream, train one sparse autoencoder on all layers, and see where latents are active.

    import residscope
    store = residscope.ActivationStore.open("acts.zarr")

Names are imported when first used, so that `import residscope` is quick. The code is in four packages next to this
one, `store`, `harvest`, `train` and `analysis`: common words, which a user's own files may shadow. So once this package
is imported, those names refer to its own packages, whatever is in the working folder or on PYTHONPATH; your own file
train.py can still be run, but not imported. The commands start here for the same reason.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

_HOME = Path(__file__).resolve().parent.parent
_OWN = ("analysis", "harvest", "store", "train")
_MODULES = {
    "ActivationStore": "store.activations",
    "AnalyzeConfig": "analysis.config",
    "HarvestConfig": "harvest.config",
    "ResidscopeError": "residscope.errors",
    "TrainConfig": "train.config",
    "WindowLoader": "store.loader",
    "analyze": "analysis.run",
    "dask_array": "store.dask_arrays",
    "from_flat": "residscope.options",
    "harvest": "harvest.run",
    "load_checkpoint": "train.checkpoint",
    "open": "analysis.live.opened",
    "read_sae": "train.formats.files",
    "steer": "analysis.live.model",
    "train": "train.run",
}
__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


class _OwnPackages:
    """Finds the packages next to this one, before any folder of `sys.path` is searched."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(_HOME)]) if name in _OWN else None


def _shadowing(name: str) -> Path | None:
    """The file of a foreign module that was imported under one of our packages' names before this package."""
    origin = getattr(sys.modules.get(name), "__file__", None)
    return Path(origin) if origin and not Path(origin).resolve().is_relative_to(_HOME / name) else None


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("residscope")
    if name not in _MODULES:
        raise AttributeError(f"module 'residscope' has no attribute {name!r}")
    package = _MODULES[name].partition(".")[0]
    if shadowing := _shadowing(package):
        what = f"but {shadowing} was already imported under that name: import residscope first, or rename that file"
        raise ImportError(f"residscope.{name} is in the package `{package}`, {what}")
    return getattr(import_module(_MODULES[name]), name)


if _OwnPackages not in sys.meta_path:
    sys.meta_path.insert(0, _OwnPackages)  # type: ignore[arg-type]
