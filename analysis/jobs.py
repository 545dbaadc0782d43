"""Run a sum over shards: one Dask task per group of whole shards, and a tree that merges what they return.

Groups and tree depend on the number of shards alone, not on workers, so the sums have one order and the result is the
same however many work. A worker that dies loses the tasks that it held: Dask runs them again.

Threads of this process are the default: encoding, reading and summing all release the interpreter's lock, so threads
are as fast as processes, share one copy of the weights and start at once. Processes (a LocalCluster) cost seconds to
start. With several workers each has one torch thread, or its share of the cores.
"""

import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import xxhash
from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import Delayed, delayed
from tqdm import tqdm

import residscope
from analysis.tiles import keep_going, stop_tasks
from residscope.errors import IncompatibleError, Interrupted, ResidscopeError, is_out_of_memory, said
from residscope.reading import reading

TASKS = 256
"""Groups of shards that a store is cut into at most, where they are small: enough for many workers, few enough that
merging costs nothing."""

TASK_SHARDS = 16
"""Shards of a group at most, 1 to 17 GB: what a worker that dies takes with it."""

MERGE_WIDTH = 8
"""Sums that one node of the tree merges."""

ATTEMPTS = 3
"""How often a task is tried."""

CONNECT_SECONDS = 10
"""How long a scheduler may take to answer."""

PACKAGES = ("residscope", "store", "harvest", "train", "analysis")

PRELOAD = ["residscope"]
"""What worker processes import first, so that they find our packages whatever files lie on PYTHONPATH."""

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class ShardSum(Generic[R]):
    """A sum over shards, described."""

    name: str
    """What the progress bar says."""
    task: Callable[..., R]
    """task(*arguments, shards) -> R, importable by workers."""
    arguments: tuple[Any, ...]
    """Small, and able to travel."""
    merge: Callable[[Sequence[R]], R]
    """Adds results, in order."""
    shards: tuple[int, ...]
    """Shards to sum over, ascending."""
    tokens: tuple[int, ...]
    """Tokens of each of `shards` that count, for progress."""


def run(total: ShardSum[R], pool: "Pool") -> R:
    """The sum over all shards."""
    groups = shard_groups(len(total.shards))
    # A scheduler takes tasks of one key for the same task, and may serve several analyses at once.
    name = f"{total.name}-{uuid.uuid4().hex}"
    leaves, tokens = [], {}
    for number, group in enumerate(groups):
        key = f"{name}-{number:05d}"
        tokens[key] = sum(total.tokens[group])
        arguments = (attempt, total.task, total.arguments, total.shards[group], tokens[key])
        leaves.append(delayed(with_our_code)(code_hash(), *arguments, dask_key_name=key))
    with tqdm(total=sum(tokens.values()), desc=total.name, unit=" tokens", unit_scale=True, disable=None) as bar:
        try:
            return pool.compute(_tree(leaves, total.merge, name), tokens, bar)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; nothing was written. Run the same command to start again") from None


def shard_groups(n_shards: int) -> list[slice]:
    """Runs of consecutive shards, all of one length but the last."""
    size = max(1, min(-(-n_shards // TASKS), TASK_SHARDS))
    return [slice(start, min(start + size, n_shards)) for start in range(0, n_shards, size)]


def _tree(nodes: list[Delayed], merge: Callable[..., Any], name: str) -> Delayed:
    level = 0
    while len(nodes) > 1:
        level += 1
        nodes = [
            delayed(with_our_code)(
                code_hash(), merge, nodes[i : i + MERGE_WIDTH], dask_key_name=f"{name}-merge-{level}-{i:05d}"
            )
            for i in range(0, len(nodes), MERGE_WIDTH)
        ]
    return nodes[0]


@cache
def code_hash() -> str:
    """A hash of the sources that this process runs: workers of another version would add other numbers to the sums."""
    home = Path(residscope.__file__).parent.parent
    digest = xxhash.xxh3_128()
    for package in PACKAGES:
        for path in sorted((home / package).rglob("*.py")):
            digest.update(f"{path.relative_to(home)}:".encode() + path.read_bytes())
    return digest.hexdigest()


def with_our_code(code: str, function: Callable[..., R], *arguments: Any) -> R:
    """function(*arguments), unless this process has other sources than the one with this `code_hash`."""
    if code != code_hash():
        raise _other_code(f"in {Path(residscope.__file__).parent}", code_hash(), code)
    return function(*arguments)


def _require_our_code(client: Any) -> None:
    """`IncompatibleError` where a worker has other sources than this process. One that comes later refuses its tasks
    (`with_our_code`), or, of a version that does not know them, dies of them."""

    def find() -> str:  # Travels by value, so that any version can run it.
        from importlib import import_module

        return import_module("analysis.jobs").code_hash()

    for address, found in client.run(find, on_error="return").items():
        if found != code_hash():
            raise _other_code(f"at {address}", found, code_hash())


def _other_code(where: str, found: Any, expected: str) -> IncompatibleError:
    return IncompatibleError(
        f"the Dask worker {where} has another version of residscope, or none: the hash of its sources should be "
        f"{expected}, found {found}: start workers from the environment of this command"
    )


def attempt(task: Callable[..., R], arguments: tuple[Any, ...], shards: tuple[int, ...], tokens: int) -> R:
    """task(*arguments, shards), tried up to `ATTEMPTS` times; an error that the user must act on is not tried again."""
    worker = _worker()
    if worker is not None:
        torch.set_num_threads(1)
    for left in reversed(range(ATTEMPTS)):
        try:
            result = task(*arguments, shards)
        except ResidscopeError:
            raise
        except Exception as error:
            if left == 0:
                if is_out_of_memory(error):
                    raise
                which = f"shard {shards[0]}" if len(shards) == 1 else f"shards {shards[0]} to {shards[-1]}"
                last = f"{type(error).__name__}: {error}"
                raise ResidscopeError(f"{which} failed {ATTEMPTS} times, last with {last}") from error
        else:
            if worker is not None:
                worker.log_event(_TOPIC, tokens)
            return result
    raise AssertionError("unreachable")


@contextmanager
def open_pool(scheduler: str, n_workers: int | None, n_tasks: int, report: Path | None = None) -> Iterator["Pool"]:
    """The pool that `--scheduler` names: threads, processes, or the address of a Dask scheduler.

    report: where to write Dask's own page of what ran when, once all is done.
    """
    if report is not None and find_spec("bokeh") is None:
        raise ResidscopeError("--performance-report needs bokeh: pip install 'residscope[dashboard]', or leave it out")
    if scheduler == "threads":
        with _profile(report) if report else nullcontext():
            yield Threads(n_workers or min(n_cores(), n_tasks))
    else:
        from distributed import performance_report

        with (
            _cluster(scheduler, n_workers or n_cores()) as pool,
            performance_report(filename=str(report)) if report else nullcontext(),
        ):
            yield pool


@contextmanager
def _profile(report: Path) -> Iterator[None]:
    """Tasks, processor and memory of this process's threads, drawn to `report`."""
    from dask.diagnostics.profile import Profiler, ResourceProfiler
    from dask.diagnostics.profile_visualize import visualize

    with Profiler() as tasks, ResourceProfiler() as resources:
        yield
    visualize([tasks, resources], filename=str(report), show=False, save=True)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Threads:
    """Threads of this process."""

    n_workers: int

    def compute(self, root: Delayed, tokens: dict[str, int], bar: "tqdm[Any]") -> Any:
        """The value of `root`; advances the bar by `tokens[key]` when the task of that key is done."""
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, before // self.n_workers))
        keep_going()
        try:
            with Callback(posttask=lambda key, *_: bar.update(tokens.get(key, 0))):
                return compute(root, scheduler="threads", num_workers=self.n_workers, optimize_graph=False)[0]
        except BaseException:
            stop_tasks()
            raise
        finally:
            torch.set_num_threads(before)


_TOPIC = "residscope-analysis"
_FEWER = "perhaps for want of memory: use fewer with --n-workers, or leave --scheduler out"
_POLL_SECONDS = 1


@dataclass(frozen=True)
class Cluster:
    """The workers of a Dask scheduler."""

    client: Any
    """distributed.Client"""
    say_after: int = 10
    """Seconds without a worker after which the user is told."""
    give_up_after: int = 300
    """Seconds without a worker after which the analysis fails."""

    def compute(self, root: Delayed, tokens: dict[str, int], bar: "tqdm[Any]") -> Any:
        from distributed import CancelledError, KilledWorker, wait
        from distributed.comm.core import CommClosedError

        self.client.subscribe_topic(_TOPIC, lambda event: bar.update(event[1]))
        future = self.client.compute(root, optimize_graph=False)
        try:
            while not future.done():
                self._require_worker()
                with suppress(TimeoutError):
                    wait(future, timeout=_POLL_SECONDS)
            return future.result()
        except KilledWorker as error:
            raise ResidscopeError(f"the workers of task {error.task} were killed repeatedly: {_FEWER}") from None
        except (CancelledError, CommClosedError) as error:
            raise ResidscopeError(f"the Dask scheduler went away ({said(error)}): start it again") from None
        finally:
            self.client.unsubscribe_topic(_TOPIC)

    def _require_worker(self) -> None:
        """Return once the scheduler has a worker; `ResidscopeError` where none comes."""
        seconds = 0
        while not self.client.nthreads():
            text = f"no worker since {seconds} s: start some with `dask worker {self.client.scheduler.address}`"
            if seconds >= self.give_up_after:
                raise ResidscopeError(f"the Dask scheduler has {text}, then run the command again")
            if seconds == self.say_after:
                tqdm.write(f"the Dask scheduler has {text}; waiting {self.give_up_after} s", file=sys.stderr)
            time.sleep(_POLL_SECONDS)
            seconds += _POLL_SECONDS


Pool = Threads | Cluster


@contextmanager
def _cluster(scheduler: str, n_workers: int) -> Iterator[Cluster]:
    """A client of the scheduler at an address, or of a LocalCluster of `n_workers` one-thread processes."""
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # its tracebacks; what they say is said in one line
    if scheduler == "processes":
        options: Any = {"threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": logging.CRITICAL}
        with reading("--scheduler processes: a worker died at its start", _FEWER, ResidscopeError):
            local = LocalCluster(n_workers=n_workers, preload=PRELOAD, **options)
        with local, Client(local) as client:
            _say_dashboard(client)
            yield Cluster(client)
        return
    silent = f"--scheduler {scheduler}: no Dask scheduler answers there within {CONNECT_SECONDS} s"
    with reading(silent, "start one with `dask scheduler`, or leave --scheduler out", ResidscopeError):
        client = Client(scheduler, timeout=CONNECT_SECONDS)
    with client:
        _say_dashboard(client)
        _require_our_code(client)
        yield Cluster(client)


def _say_dashboard(client: Any) -> None:
    tqdm.write(f"Dask dashboard: {client.dashboard_link}", file=sys.stderr)


def _worker() -> Any:
    """The Dask worker that runs this task, or None in a thread of the user's own process."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return distributed.get_worker()
    except ValueError:
        return None
