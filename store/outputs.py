"""Where other results may go: not into a store, which holds what `harvest` wrote and nothing else, and not over another
command's of the same name.

How: a path is in a store if it, or a folder above it, links followed, has a store's two signs. What it does not do:
ask whether the path can be written.
"""

import json
from pathlib import Path

from residscope.errors import UsageError
from store.manifest import FILE


def is_store(path: Path) -> bool:
    """Whether an activation store, whole or not, is at `path`."""
    return (path / "zarr.json").is_file() and (path / FILE).is_file()


def refuse_inside_store(out: Path, flag: str = "--out", *, may_be_one: bool = False) -> None:
    """`UsageError` where `out`, which the user gave with `flag`, is inside of a store, or is one unless it may be."""
    real = out.resolve()
    for folder in (real, *real.parents):
        if is_store(folder) and not (may_be_one and folder == real):
            where = "is an activation store" if folder == real else f"lies in the activation store {folder}"
            raise UsageError(f"{flag} {out} {where}, which is left as it is: choose a place outside of it")


def refuse_comparison_of(command: str, out: Path, member: str) -> None:
    """`UsageError` where the folder `out` holds the compare.json of `command`, which has `member`: two commands
    compare, and give their files the same names."""
    try:
        found = json.loads((out / "compare.json").read_bytes())
    except (OSError, ValueError):
        return
    if isinstance(found, dict) and member in found:
        raise UsageError(f"--out {out} holds a comparison by `{command}`, which is left alone: choose another folder")
