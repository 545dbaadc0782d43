"""Fills the missing shards of a store with worker processes.

How: groups of shards become Dask tasks, as many at once as there are workers. Each worker resolves the options itself,
refuses if it finds another model, lens, device or library, and loads the model once. A shard's bytes depend on its
tokens alone, so it does not matter which worker fills it, or how many times.

Only the command, which holds the store's lock, commits shards, each once. A worker writes only into a folder with a
random name that the command makes in the store, and that is removed when the command ends or another process opens the
store for writing. So a worker that outlives its command, or sees another store, cannot write, and stops after a block.
"""

import threading
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from harvest.config import HarvestConfig
from harvest.fill import BatchRunner, Filled, Filler, filled
from harvest.options_file import options_in_full
from harvest.record import dependences
from harvest.sequences import sequence_batches, shard_groups
from harvest.settings import Settings, load_weights, resolve
from residscope import cluster
from residscope.console import DISK_ERRORS
from residscope.errors import IncompatibleError, ResidscopeError, is_out_of_memory, said
from residscope.options import from_flat
from store.activations import ActivationStore
from store.shards import PutShard


class FillSpec(NamedTuple):
    """What all tasks of a harvest share; small, and can be pickled."""

    store: str
    folder: str
    """The folder in the store where shards are put."""
    options: dict[str, Any]
    """Options by flag name, with absolute local paths."""
    needed: dict[str, Any]
    """What the options must resolve to (`harvest.record.dependences`)."""
    cores: int | None
    """Cores for each worker on this machine; None for other workers, which know theirs."""


def fill_by_workers(store: ActivationStore, config: HarvestConfig, settings: Settings) -> Filled:
    """Write every missing shard of a store that is open for writing; raises like `harvest.fill.fill`, and
    `ResidscopeError` if a shard failed three times or there is no worker."""
    from distributed import CancelledError
    from distributed.comm.core import CommClosedError

    scheduler, n_workers = config.workers.scheduler, config.workers.n_workers or 1
    options = {**options_in_full(config), "batch_size": settings.batch_size, "revision": settings.spec.revision}
    cores = None if scheduler else max(cluster.n_cores() // n_workers, 1)
    batches = sequence_batches(store.tokens.position, settings.batch_size * store.meta.context_length)

    def work(missing: list[int], stopped: Callable[[], bool], advance: Callable[[int], object]) -> None:
        def take(put: PutShard) -> None:
            store.commit_shard(put)
            advance(put.record.tokens)

        with cluster.connected(scheduler or "processes", n_workers, 0) as client, store.incoming() as folder:
            spec = FillSpec(str(store.path.resolve()), folder, options, dependences(settings), cores)
            try:
                there = cluster.require_worker(client)
                groups = shard_groups(batches, missing, store.meta.shard_tokens, there)
                run_tasks(client, spec, groups, take, stopped)
            except (CancelledError, CommClosedError) as error:
                way_out = "start it again, and run the same command to continue"
                raise ResidscopeError(f"the Dask scheduler went away ({said(error)}): {way_out}") from None
            finally:
                with suppress(Exception, CancelledError):
                    cluster.on_workers(client, forget)

    return filled(store, work)


def run_tasks(
    client: Any,
    spec: FillSpec,
    groups: Iterable[list[int]],
    take: Callable[[PutShard], object],
    stopped: Callable[[], bool],
) -> None:
    """Have workers fill each group of shards, and call `take` with each shard they put, until `stopped()`."""
    from distributed import CancelledError, Future, KilledWorker, wait
    from distributed.comm.core import CommClosedError

    waiting, running, failures = deque(groups), dict[Future, list[int]](), Counter[int]()

    def submit() -> None:
        while waiting and len(running) < cluster.require_worker(client):
            task = cluster.with_our_code, cluster.code_hash(), fill_shards, spec, waiting[0]
            running[client.submit(*task, key=f"harvest-{uuid.uuid4().hex}")] = waiting.popleft()

    def try_again(shards: list[int], times: int, why: str) -> None:
        failures.update(dict.fromkeys(shards, times))
        if worst := [shard for shard in shards if failures[shard] >= cluster.ATTEMPTS]:
            raise cluster.failed(worst, why)
        waiting.extendleft([shard] for shard in reversed(shards))  # Each as its own task, to find the one at fault.

    while (waiting or running) and not stopped():
        submit()
        with suppress(TimeoutError):
            wait(list(running), timeout=cluster.POLL_SECONDS, return_when="FIRST_COMPLETED")
        finished = [(future, running.pop(future)) for future in list(running) if future.done()]
        submit()  # Before anything is committed, so that workers do not have to wait for that.
        for future, shards in finished:
            try:
                puts = future.result()
            except KilledWorker as error:
                try_again(shards, error.allowed_failures + 1, "the death of its worker, perhaps for lack of memory")
            except (CancelledError, CommClosedError):
                raise  # The scheduler went away.
            except Exception as error:
                lasting = isinstance(error, OSError) and error.errno in DISK_ERRORS
                if lasting or isinstance(error, ResidscopeError) or is_out_of_memory(error):
                    raise
                try_again(shards, 1, f"{type(error).__name__}: {said(error)}")
            else:
                for put in puts:
                    take(put)


def fill_shards(spec: FillSpec, shards: list[int]) -> list[PutShard]:
    """The task: put `shards` (ascending) into the folder; `IncompatibleError` if that is gone or the model differs."""
    with _one_at_a_time:  # A worker may have several threads, but the model can have the hooks of only one.
        store, filler = _opened(spec)
        folder, puts = store.path / spec.folder, list[PutShard]()

        def put(shard: int, data: np.ndarray) -> None:
            puts.append(store.put_shard(shard, data, folder=spec.folder))

        with suppress(FileNotFoundError):
            filler.run(shards, put, stopped=lambda: not folder.exists())
        if len(puts) < len(shards):
            raise IncompatibleError(f"{folder} is gone: the harvest has ended, or another store was put in its place")
        return puts


_one_at_a_time = threading.Lock()
_last: dict[str, tuple[ActivationStore, Filler]] = {}


def forget() -> None:
    """Free the model's memory."""
    _last.clear()


def _opened(spec: FillSpec) -> tuple[ActivationStore, Filler]:
    """The store and the filler of its shards; made at a worker's first task of a harvest."""
    worker = cluster.this_worker()
    cores = spec.cores or worker.state.nthreads
    torch.set_num_threads(cores)
    if spec.folder in _last:
        return _last[spec.folder]
    _last.clear()
    options = dict(spec.options)
    if spec.cores and options["device"] in ("auto", "cuda") and (n_gpus := torch.cuda.device_count()) > 1:
        options["device"] = f"cuda:{worker.name % n_gpus}"
    try:
        settings = resolve(from_flat(HarvestConfig, options))
        for name, found in dependences(settings).items():
            if found != spec.needed[name]:
                raise IncompatibleError(
                    f"it would give other vectors: {name} is {found} there, {spec.needed[name]} here; do not change "
                    "the model, and use similar machines and one environment"
                )
        store = ActivationStore.open(spec.store, partial=True)
    except ResidscopeError as error:
        raise type(error)(f"the Dask worker at {worker.address}: {error}") from None
    runner = BatchRunner(load_weights(settings), settings)
    _last[spec.folder] = store, Filler(store, runner, settings.batch_size, cores)
    return _last[spec.folder]
