"""Checks whether a store may be made at --out: never over anything else, and only if it fits. Tested in test_run.py."""

import os
import shutil
import sys
from contextlib import closing
from pathlib import Path

from harvest.options_file import options_file
from harvest.settings import Settings
from residscope.destinations import nearest_folder, refuse_shared, require_name, require_space
from residscope.errors import IncompatibleError, ResidscopeError
from residscope.urls import URL
from store.folder import is_store, refuse_inside_store
from store.manifest import FILE, WriterLock

# Statistics, folders and metadata, generously.
_SPARE_BYTES = 16 << 20
_TOKEN_BYTES = 13  # a token's entries in the token columns
_LINE_BYTES = 32  # a number or hash in a line of the manifest


def has_begun(out: Path) -> bool:
    """Whether there is a store, complete or not, at `out`; raises if `out` is neither a store nor free."""
    refuse_inside_store(out, may_be_one=True)
    require_name(out)
    refuse_shared(out, options_file(out))
    if isinstance(out, URL) and (not out.exists() or (out / FILE).is_file()):
        return is_store(out)  # If it is not, a run was killed before the store was made.
    if not out.exists() or (out.is_dir() and not any(out.glob("*"))):
        parent = nearest_folder(out.absolute().parent)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ResidscopeError(f"--out {out}: {parent} cannot be written to; choose another place")
        return False
    if not is_store(out):
        reason = "is not an activation store and will not be overwritten. Choose another --out, or remove it"
        raise IncompatibleError(f"--out {out} exists, {reason}")
    return True


def require_room(out: Path, settings: Settings, n_tokens: int, most: int | None = None) -> None:
    """`ResidscopeError` if the disk has no room for a store of `n_tokens`; says how many tokens would fit. most: bytes
    that the store never exceeds."""
    if isinstance(out, URL):
        return
    freed = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else 0
    needed = min(disk_bytes(settings, n_tokens), most or sys.maxsize)
    try:
        require_space(out, needed - freed)
    except ResidscopeError as error:
        room = shutil.disk_usage(nearest_folder(out.absolute())).free + freed - _SPARE_BYTES
        fitting = max(room * n_tokens // (needed - _SPARE_BYTES), 0)
        raise ResidscopeError(f"{error}. {fitting:,} tokens would fit; nothing was written") from error


def disk_bytes(settings: Settings, n_tokens: int) -> int:
    """Bytes of a store of `n_tokens` on the disk: vectors, token columns, and the moments and line of every shard."""
    n_layers, (_, shard) = len(settings.layers), settings.chunk_and_shard(n_tokens)
    of_shards = -(-n_tokens // shard) * (2 * 8 * n_layers * settings.d_model + _LINE_BYTES * (10 + n_layers))
    return n_tokens * (settings.bytes_per_token + _TOKEN_BYTES) + of_shards + _SPARE_BYTES


def remove_store(out: Path) -> None:
    """Remove a store so that a crash leaves none at `out`: it is first renamed to a name that `create` clears."""
    if isinstance(out, URL):
        (out / FILE).put(b"\n")  # From now on it counts as a store whose making was interrupted.
        for path in sorted(out.glob("*"), key=lambda path: path == out / FILE):
            path.unlink()
        return
    out = out.resolve() if out.is_symlink() else out  # A link's target is removed, and the link stays.
    with closing(WriterLock(out, out)):
        removed = out.with_name(out.name + ".planning")
        if removed.exists():
            shutil.rmtree(removed)
        out.rename(removed)
        shutil.rmtree(removed)
