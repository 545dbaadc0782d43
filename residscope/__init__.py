"""Cache a transformer's residual stream, train one sparse autoencoder on all its layers, see where latents live.

    import residscope
    store = residscope.ActivationStore.open("acts.zarr")

Names are imported when they are asked for, so that `import residscope` costs nothing. The code is in four packages
beside this one, `store`, `harvest`, `train` and `analysis`: plain words, which a user's own files shadow. So this
package, once imported, makes those words mean its own neighbours, whatever lies in the working folder or on PYTHONPATH;
a file of one's own named train.py can still be run, but not be imported. The commands start here for the same reason.
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
    """Finds the packages beside this one, before any folder of `sys.path` is looked at."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(_HOME)]) if name in _OWN else None


def _shadowing(name: str) -> Path | None:
    """The file of a module that took one of our packages' names before this package was imported."""
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
        what = f"but {shadowing} was imported under that name before: import residscope first, or rename that file"
        raise ImportError(f"residscope.{name} is in the package `{package}`, {what}")
    return getattr(import_module(_MODULES[name]), name)


if _OwnPackages not in sys.meta_path:
    sys.meta_path.insert(0, _OwnPackages)  # type: ignore[arg-type]
