"""Have the shards that a store lacks filled by worker processes, and commit what they put on the disk.

How: groups of shards become Dask tasks (`harvest.workers.task`), as many at once as there are workers. A shard's bytes
depend on its tokens alone, so it does not matter who fills what, or how often. This process, which holds the store's
lock, commits each shard once; the manifest's lines are put in order at the end (`ActivationStore.finalize`). Of a group
whose worker was killed, or that failed, each shard is tried by itself.
"""

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from harvest.config import HarvestConfig
from harvest.fill import Filled, progressing
from harvest.options_file import options_in_full
from harvest.sequences import sequence_batches, shard_groups
from harvest.settings import Settings
from harvest.workers.task import FillSpec, dependences, fill_shards, forget
from residscope.cluster import (
    ATTEMPTS,
    POLL_SECONDS,
    code_hash,
    connected,
    failed,
    n_cores,
    require_worker,
    with_our_code,
)
from residscope.console import DISK_ERRORS
from residscope.errors import ResidscopeError, is_out_of_memory, said
from store.activations import ActivationStore
from store.shards import PutShard

KILLED_AT_ONCE = {"distributed.scheduler.allowed-failures": 0}
"""Dask's own count of a task's killed workers blames all tasks that they had; ours is by shard."""


def fill_by_workers(store: ActivationStore, config: HarvestConfig, settings: Settings) -> Filled:
    """Fill every missing shard of a store that is open for writing, as `harvest.fill.fill` does.

    Raises as that does; `ResidscopeError` where a shard failed three times, no worker comes or the scheduler goes.
    """
    begin, missing, n_workers = time.perf_counter(), store.missing_shards(), config.workers.n_workers
    batches = sequence_batches(store.tokens.position, settings.batch_size * store.meta.context_length)
    options = options_in_full(config)
    if settings.spec.source == "hub":
        options["revision"] = settings.spec.revision
    tokens = 0
    with (
        progressing(store) as (stopped, advance),
        connected(config.workers.scheduler, n_workers or 1, f"--n-workers {n_workers}", **KILLED_AT_ONCE) as client,
        store.incoming() as folder,
    ):
        spec = FillSpec(
            store=str(store.path.resolve()),
            config_hash=store.meta.config_hash,
            folder=folder,
            options=options,
            batch_size=settings.batch_size,
            needed=dependences(settings),
            cores=max(n_cores() // n_workers, 1) if n_workers else None,
        )
        groups = shard_groups(batches, missing, store.meta.shard_tokens, n_workers or require_worker(client))

        def take(put: PutShard) -> None:
            nonlocal tokens
            store.commit_shard(put)
            tokens += put.record.tokens
            advance(put.record.tokens)

        try:
            run_tasks(client, spec, groups, take, stopped)
        finally:
            with suppress(Exception):
                client.run(forget)
    return Filled(len(missing), tokens, time.perf_counter() - begin)


def run_tasks(
    client: Any,
    spec: FillSpec,
    groups: Sequence[list[int]],
    take: Callable[[PutShard], object],
    stopped: Callable[[], bool],
) -> None:
    """Have each group of shards filled by a worker; `take` what becomes of each shard, until `stopped()`."""
    from distributed import CancelledError, Future, KilledWorker, wait
    from distributed.comm.core import CommClosedError

    waiting, running, failures = deque(groups), dict[Future, list[int]](), Counter[int]()

    def submit() -> None:
        while waiting and len(running) < require_worker(client):
            key = f"harvest-{uuid.uuid4().hex}"
            future = client.submit(with_our_code, code_hash(), fill_shards, spec, waiting[0], key=key)
            running[future] = waiting.popleft()

    def try_again(shards: list[int], times: int, why: str) -> None:
        failures.update(dict.fromkeys(shards, times))
        if worst := [shard for shard in shards if failures[shard] >= ATTEMPTS]:
            raise failed(worst, why)
        waiting.extendleft([shard] for shard in reversed(shards))

    while (waiting or running) and not stopped():
        submit()
        with suppress(TimeoutError):
            wait(list(running), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
        finished = [(future, running.pop(future)) for future in list(running) if future.done()]
        submit()  # Before anything is committed, so that workers need not wait for that.
        for future, shards in finished:
            try:
                for put in future.result():
                    take(put)
            except KilledWorker as error:
                try_again(shards, error.allowed_failures + 1, "the death of its worker, perhaps for want of memory")
            except (CancelledError, CommClosedError) as error:
                way_out = "start it again, and run the same command to continue"
                raise ResidscopeError(f"the Dask scheduler went away ({said(error)}): {way_out}") from None
            except Exception as error:
                lasting = isinstance(error, OSError) and error.errno in DISK_ERRORS
                if lasting or isinstance(error, ResidscopeError) or is_out_of_memory(error):
                    raise
                try_again(shards, 1, f"{type(error).__name__}: {said(error)}")
