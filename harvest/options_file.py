"""The options of a harvest, kept next to its store (acts.zarr -> acts.harvest.toml), and the path of its model.

How: names of local files and folders are written as absolute paths, so that the file works from any working folder. It
is used to continue and repair the store, and tells an analysis where the model is, of which the store itself has only
the name and the hash. `harvest.model.checks` checks that the model there is still the same. Tested in
tests/harvest/test_run.py and tests/analysis/model/test_findings.py.
"""

import tomllib
from pathlib import Path
from typing import Any

from harvest.config import HarvestConfig
from harvest.text.sources import is_on_disk
from residscope.destinations import held_alone, refuse_shared
from residscope.errors import IncompatibleError
from residscope.names import beside
from residscope.options import to_flat, to_toml
from residscope.reading import CONFIG_BYTES, read_whole, reading
from store.files import atomic_write


def options_file(store: Path) -> Path:
    """The path of the options of the store at `store`."""
    return beside(store, ".harvest.toml")


def options_in_full(config: HarvestConfig) -> dict[str, Any]:
    """The options that determine the store's content, by flag name, with local names as absolute paths."""
    texts = [
        _in_full(choice.name) + word.strip()[len(choice.name) :] if is_on_disk(choice.name) else word
        for choice, word in zip(config.text.choices, config.text.dataset, strict=True)
    ]
    values = {**to_flat(config), "dataset": tuple(texts)}
    for name in ("model", "lens"):
        if values[name] is not None and _is_here(values[name]):
            values[name] = _in_full(values[name])
    for name in ("overwrite", "dry_run", "json", "n_workers", "scheduler"):
        del values[name]
    return values


def save_options(config: HarvestConfig) -> None:
    """Write the options next to the store, for --config, repairs and analyses; `UsageError` over another store's."""
    with held_alone(config.out.absolute().parent, config.out, wait=True):  # acts and acts.zarr would share the file
        refuse_shared(config.out, options_file(config.out))
        atomic_write(options_file(config.out), [to_toml(options_in_full(config)).encode()])


def recorded_place(store: Path, what: str) -> str | None:
    """The local "model" or "lens" that `store` was harvested with, if its options name one that still exists."""
    path = options_file(store)
    try:
        with reading(path):
            value = tomllib.loads(read_whole(path, CONFIG_BYTES).decode()).get(what)
    except (OSError, IncompatibleError):
        return None
    return value if isinstance(value, str) and _is_here(value) else None


def _is_here(name: str) -> bool:
    return Path(name).expanduser().exists()


def _in_full(name: str) -> str:
    return str(Path(name).expanduser().resolve())
