"""Dask workers, on this machine or of a running scheduler: starting or finding them, and requiring that they run the
same code. What they do is in `analysis.jobs` and `harvest.filling.workers`. Worker processes import this module first.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

import residscope
from residscope.errors import IncompatibleError, ResidscopeError
from residscope.reading import reading

CONNECT_SECONDS = 10
"""How long a scheduler or a worker may take to answer."""

SAY_AFTER, GIVE_UP_AFTER, POLL_SECONDS = 10, 300, 1
"""Seconds without a worker until the user is told, and until the command fails; seconds between two checks."""

ATTEMPTS = 3
"""How many times a task is tried."""

PACKAGES = ("residscope", "store", "harvest", "train", "analysis")

PRELOAD = ["residscope", "residscope.cluster"]
"""What worker processes import first, so that they find our packages whatever is on PYTHONPATH."""

R = TypeVar("R")


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def connected(scheduler: str, n_workers: int, may_die: int = ATTEMPTS) -> Iterator[Any]:
    """A `distributed.Client` of the scheduler at an address, or of `n_workers` new one-thread "processes". Dask gives
    up a task that killed more than `may_die` of them."""
    from dask import config
    from distributed import Client, LocalCluster

    for name in ("distributed", "distributed.client"):  # They log tracebacks; our errors are one line.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        if scheduler == "processes":
            options: Any = {"threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": logging.CRITICAL}
            fewer = "perhaps for lack of memory: use fewer with --n-workers"
            settings = {"distributed.scheduler.allowed-failures": may_die}
            with config.set(settings), reading("a worker process died when it started", fewer, ResidscopeError):
                local = stack.enter_context(LocalCluster(n_workers=n_workers, preload=PRELOAD, **options))
            client = stack.enter_context(Client(local))
        else:
            silent = f"--scheduler {scheduler}: no Dask scheduler answers there within {CONNECT_SECONDS} s"
            with reading(silent, "start one with `dask scheduler`, or leave --scheduler out", ResidscopeError):
                client = stack.enter_context(Client(scheduler, timeout=CONNECT_SECONDS))
            _require_our_code(client)
        tqdm.write(f"Dask dashboard: {client.dashboard_link}", file=sys.stderr)
        yield client


def dask_setup(worker: Any) -> None:
    """Called in each worker process: ignore Ctrl-C, which the terminal also sends to the process that started it."""
    if getattr(worker, "nanny", None):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def require_worker(client: Any) -> int:
    """Wait for workers and return their number; `ResidscopeError` if none appears."""
    seconds: float = 0
    while not (found := len(client.nthreads())):
        text = f"had no worker for {seconds} s: start some with `dask worker {client.scheduler.address}`"
        if seconds >= GIVE_UP_AFTER:
            raise ResidscopeError(f"the Dask scheduler {text}, then run the command again")
        if seconds == SAY_AFTER:
            tqdm.write(f"the Dask scheduler {text}; waiting {GIVE_UP_AFTER} s", file=sys.stderr)
        time.sleep(POLL_SECONDS)
        seconds += POLL_SECONDS
    return found


def on_workers(client: Any, function: Callable[[], Any]) -> dict[str, Any]:
    """What function() returns or raises on each worker, by address; workers that do not answer are left out."""
    found: dict[str, Any] = {}
    addresses = list(client.nthreads())

    def ask(address: str) -> None:
        with suppress(Exception, asyncio.CancelledError):  # the worker left, or the scheduler
            found.update(client.run(function, workers=[address], on_error="return"))

    # Dask would wait forever for a frozen worker.
    threads = [threading.Thread(target=ask, args=(address,), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    end = time.monotonic() + CONNECT_SECONDS
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))
    return dict(found)


def failed(shards: Sequence[int], why: str) -> ResidscopeError:
    """The error for shards whose task failed at every attempt."""
    which = f"shard {shards[0]}" if len(shards) == 1 else f"shards {shards[0]} to {shards[-1]}"
    return ResidscopeError(f"{which} failed {ATTEMPTS} times, last with {why}")


def this_worker() -> Any:
    """The Dask worker that runs this task, or None in a thread of the user's own process."""
    if (distributed := sys.modules.get("distributed")) is None:
        return None
    try:
        return distributed.get_worker()
    except ValueError:
        return None


@cache
def code_hash() -> str:
    """A hash of the sources that this process runs: workers of another version would give different numbers."""
    import xxhash

    home = Path(residscope.__file__).parent.parent
    digest = xxhash.xxh3_128()
    for package in PACKAGES:
        for path in sorted((home / package).rglob("*.py")):
            digest.update(f"{path.relative_to(home)}:".encode() + path.read_bytes())
    return digest.hexdigest()


def with_our_code(code: str, function: Callable[..., R], *arguments: Any) -> R:
    """function(*arguments); `IncompatibleError` if this process does not have the sources whose hash is `code`."""
    if code != code_hash():
        raise _other_code(f"in {Path(residscope.__file__).parent}", code_hash(), code)
    return function(*arguments)


def _require_our_code(client: Any) -> None:
    """`IncompatibleError` if a worker has other sources than this process. A worker that joins later refuses its tasks
    (`with_our_code`), or, if its version does not have that function, crashes on them."""

    def find() -> str:  # Pickled by value, so that any version can run it.
        from importlib import import_module

        return import_module("residscope.cluster").code_hash()

    asked, answers = client.nthreads().keys(), on_workers(client, find)
    for address in (asked & client.nthreads().keys()) - answers.keys():
        text = "does not answer: its tasks are stuck for 5 to 10 minutes, until the scheduler drops it; better stop it"
        tqdm.write(f"the Dask worker at {address} {text}", file=sys.stderr)
    for address, found in answers.items():
        if found != code_hash() and not isinstance(found, OSError):  # OSError: the worker has gone.
            raise _other_code(f"at {address}", found, code_hash())


def _other_code(where: str, found: Any, expected: str) -> IncompatibleError:
    return IncompatibleError(
        f"the Dask worker {where} has another version of residscope, or none: the hash of its sources should be "
        f"{expected}, found {found}: start workers from the environment of this command"
    )
