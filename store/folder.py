"""A store's folder as a whole: whether a path holds a store, reading its metadata, and making a new store.

How: a folder is a store if it has the root group's zarr.json and the manifest. Its metadata is trusted once every
metadata file has the hash that the manifest's header gives.
"""

import json
import shutil
import tempfile
from pathlib import Path

from residscope.console import stop_on_signals
from residscope.errors import IncompatibleError, UsageError
from residscope.reading import reading
from residscope.urls import URL
from store import arrays
from store.arrays import TokenTable
from store.checksums import file_hashes, read_checked
from store.files import sync, sync_tree
from store.manifest import FILE, FOLDER, LOCK, Manifest, WriterLock, read_manifest, write_header
from store.meta import StoreMeta
from store.remote.objects import ObjectLock, StoreLock


def is_store(path: Path) -> bool:
    """Whether an activation store, complete or not, is at `path`."""
    if isinstance(path, URL):  # It is one once it has the manifest's header, which is written last.
        return (path / FILE).is_file() and (path / FILE).get(0, 1).data == b"{"
    return (path / "zarr.json").is_file() and (path / FILE).is_file()


def require_store(path: Path) -> None:
    """Raise `UsageError` when nothing is at `path`, `IncompatibleError` when it is not a store."""
    if not path.exists():
        raise UsageError(f"{path}: there is no such file or folder; make a store with `harvest`")
    if not is_store(path):
        raise IncompatibleError(f"{path} is not an activation store; make one with `harvest`")


def refuse_inside_store(out: Path, flag: str = "--out", *, may_be_one: bool = False) -> None:
    """`UsageError` when `out`, the value of `flag`, is inside a store (links followed), or, unless `may_be_one`, is a
    store or a URL (only stores are made at URLs)."""
    if isinstance(out, URL) and not may_be_one:
        raise UsageError(f"{flag} {out} should be on a disk: write {out.name} there, then copy it to the URL")
    real = out.resolve()
    for folder in (real, *real.parents):
        if is_store(folder) and not (may_be_one and folder == real):
            where = "an activation store" if folder == real else f"inside the activation store {folder}"
            raise UsageError(f"{flag} {out} is {where}; choose a path outside it")


def read_meta(path: Path, manifest: Manifest) -> StoreMeta:
    """The store's attributes; raises when the manifest, any array's metadata or the attributes are damaged."""
    if manifest.problems:
        raise IncompatibleError(f"{path}: {manifest.problems[0]}. `residscope verify {path}` lists all damage")
    for name in manifest.checksums:
        if name.endswith("zarr.json"):
            read_checked(path, name, manifest.checksums)
    with reading(f"{path}: the store's attributes are damaged: not readable as JSON"):
        attributes = dict(json.loads(read_checked(path, "zarr.json", manifest.checksums))["attributes"])
    meta = StoreMeta.from_attributes(attributes)
    arrays.check_counts(path, meta, manifest.checksums)
    return meta


def make_objects(path: URL, meta: StoreMeta, tokens: TokenTable) -> tuple[URL, ObjectLock]:
    """Like `make_folder`, at a URL: a crash's leftovers are removed first, the manifest's header is written last."""
    begun = (path / FILE).is_file()
    lock = ObjectLock(path) if begun or not path.exists() else None
    if lock is None or is_store(path):
        raise IncompatibleError(f"{path} exists already: open it, remove it, or choose another name")
    for leftover in path.glob("*") if begun else ():
        if leftover != path / FILE:
            leftover.unlink()
    with tempfile.TemporaryDirectory(prefix="residscope-") as name:
        folder, of_folder = make_folder(Path(name) / "store", meta, tokens)
        of_folder.close()
        for file in read_manifest(folder).checksums:
            lock.write(path / file, [(folder / file).read_bytes()])
        lock.append((folder / FILE).read_bytes())
    return path, lock


def make_folder(path: Path, meta: StoreMeta, tokens: TokenTable) -> tuple[Path, StoreLock]:
    """Make a store without shards; returns its path and its writer's lock.

    It is built in the folder `PATH.planning`, which is first cleared of what a crash left there, and renamed as a
    whole. If `path` is a link, the store is made at its target, because a folder cannot be renamed over a link.
    """
    if isinstance(path, URL):
        return make_objects(path, meta, tokens)
    path = path.resolve() if path.is_symlink() else path
    building = path.with_name(path.name + ".planning")
    lock = WriterLock(building, path)
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise IncompatibleError(f"{path} exists already: open it, remove it, or choose another path")
        for entry in (*building.iterdir(), *(building / FOLDER).iterdir()):
            if entry not in (building / FOLDER, building / LOCK):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        with stop_on_signals() as stopped:  # zarr's event loop prints pages to stderr when a signal interrupts it.
            arrays.make_arrays(building, meta, tokens)
        if stopped():
            raise KeyboardInterrupt
        write_header(building, meta.config_hash, file_hashes(building))
        sync_tree(building)
        building.replace(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        lock.close()
        raise
    return path, lock
