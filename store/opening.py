"""What is at a path: a store or not, and its attributes once everything that says what they are is found to be sound.

Not here: the shards, which may be missing or damaged (activations.py, verify.py).
"""

import json
from pathlib import Path

from residscope.errors import IncompatibleError, UsageError
from store import arrays
from store.manifest import FILE, Manifest
from store.meta import StoreMeta


def require_store(path: Path) -> None:
    """Raise `UsageError` when there is nothing at `path`, `IncompatibleError` when that is no store."""
    if not path.exists():
        raise UsageError(f"{path}: there is no such file or folder; make a store with `harvest`")
    if not (path / "zarr.json").is_file() or not (path / FILE).is_file():
        raise IncompatibleError(f"{path}: no activation store is there; make one with `harvest`")


def read_meta(path: Path, manifest: Manifest) -> StoreMeta:
    """The store's attributes; raises when the manifest, any array's metadata or the attributes are damaged."""
    if manifest.problems:
        raise IncompatibleError(f"{path}: {manifest.problems[0]}. `residscope verify {path}` says what else is damaged")
    for name in manifest.checksums:
        if name.endswith("zarr.json"):
            arrays.read_checked(path, name, manifest.checksums)
    return StoreMeta.from_attributes(json.loads((path / "zarr.json").read_bytes())["attributes"])
