"""What a worker process does: put some shards of a store on the disk, for the command that holds its lock to commit.

How: a process makes of the options what the command made of them, and refuses if that is another model, lens, device or
library. It loads the model once. All that it writes goes into a folder of random name that the command has made in the
store (`ActivationStore.incoming`) and that is gone once the command has ended, or another opens the store. So a worker
that outlives its command, or finds another store at the path, can write nothing, and stops at the next block.
"""

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harvest.config import HarvestConfig
from harvest.fill import BatchRunner, Filler
from harvest.record import surroundings
from harvest.settings import Settings, load_weights, resolve
from residscope.cluster import this_worker
from residscope.errors import IncompatibleError
from residscope.options import from_flat
from store.activations import ActivationStore
from store.shards import PutShard


@dataclass(frozen=True, kw_only=True)
class FillSpec:
    """What all tasks of a harvest share; small, and able to travel."""

    store: str
    """Path of the store."""
    config_hash: str
    """The store's, checked by every process."""
    folder: str
    """Where shards are put, below the store."""
    options: dict[str, Any]
    """The harvest's, by their flags' names, with local paths in full."""
    batch_size: int
    needed: dict[str, Any]
    """What the vectors depend on (`dependences`), as the command has it."""
    cores: int | None
    """Of each worker of this machine; None for workers that were there, each of which has its own."""


def dependences(settings: Settings) -> dict[str, Any]:
    """What the vectors depend on and the options do not say for certain, in JSON."""
    spec, lens = settings.spec, settings.lens
    model = {"model": spec.fingerprint or spec.revision, "adapter": spec.adapter, "dtype": settings.dtype}
    return {**model, "lens": lens.fingerprint if lens else None, **surroundings(settings)}


def fill_shards(spec: FillSpec, shards: list[int]) -> list[PutShard]:
    """Put `shards` (ascending) into the folder; raises what `harvest.fill` raises, and `IncompatibleError` where this
    process would make other vectors, or folder or store are gone."""
    with _one_at_a_time:  # A worker may have several threads, and the model has one place for hooks.
        store, filler = _opened(spec)
        folder = store.path / spec.folder
        puts: list[PutShard] = []

        def put(shard: int, data: np.ndarray) -> None:
            puts.append(store.put_shard(shard, data, spec.folder, threads=filler.writer_threads))

        try:
            filler.run(shards, put, stopped=lambda: not folder.exists())
        except FileNotFoundError:
            if folder.exists():
                raise
        if not folder.exists():
            ended = "the harvest has ended, or another folder is in this store's place"
            raise IncompatibleError(f"{folder} is gone: {ended}; run the same command to continue")
        return puts


def forget() -> None:
    """Give the memory of the model back."""
    _last.clear()


_one_at_a_time = threading.Lock()
_last: dict[str, tuple[ActivationStore, Filler]] = {}


def _opened(spec: FillSpec) -> tuple[ActivationStore, Filler]:
    """The store, and what fills its shards; made at the first task of a harvest."""
    worker = this_worker()
    cores = spec.cores or (worker.state.nthreads if worker else None)
    if cores:
        torch.set_num_threads(cores)
    if spec.folder not in _last:
        _last.clear()
        options = dict(spec.options)
        if spec.cores and worker and options["device"] in ("auto", "cuda") and torch.cuda.device_count() > 1:
            options["device"] = f"cuda:{worker.name % torch.cuda.device_count()}"
        settings = replace(resolve(from_flat(HarvestConfig, options)), batch_size=spec.batch_size)
        found = dependences(settings)
        if differing := [name for name in found if found[name] != spec.needed[name]]:
            name = differing[0]
            raise IncompatibleError(
                f"the Dask worker {worker.address if worker else ''} would give other vectors: {name} is {found[name]} "
                f"there, {spec.needed[name]} here; do not change the model while it is harvested, and run workers and "
                "this command on like machines, from one environment"
            )
        store = ActivationStore.open(Path(spec.store), partial=True)
        if store.meta.config_hash != spec.config_hash:
            raise IncompatibleError(f"{spec.store} is not the store that is filled; start workers that see the same")
        runner = BatchRunner(load_weights(settings), settings)
        _last[spec.folder] = store, Filler(store, runner, spec.batch_size, cores)
    return _last[spec.folder]
