"""Run a sum over shards: one Dask task per group of whole shards, and a tree that merges what they return.

Groups and tree depend only on the number of shards, so sums are always added in the same order and the result does not
depend on the number of workers. If a worker dies, Dask runs its tasks again.

Threads of this process are the default: encoding, reading and summing all release the interpreter's lock, so threads
are as fast as processes, share one copy of the weights and start at once. Processes (a LocalCluster) cost seconds to
start. Such a worker uses one torch thread; threads of this process share its torch threads.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import Delayed, delayed
from tqdm import tqdm

from analysis.tiles import STOPPING
from residscope import cluster
from residscope.console import progress
from residscope.errors import Interrupted, ResidscopeError, is_out_of_memory, said

TASKS = 256
"""Groups that a store's shards are divided into at most, if `TASK_SHARDS` allows: enough for many workers, few enough
that merging costs nothing."""

TASK_SHARDS = 16
"""Shards per group at most, 1 to 17 GB: the work that is lost when a worker dies."""

MERGE_WIDTH = 8
"""Sums merged by one node of the tree."""

R = TypeVar("R")


def run(
    pool: "Pool",
    name: str,
    task: Callable[..., R],
    arguments: tuple[Any, ...],
    merge: Callable[[Sequence[R]], R],
    tokens: Mapping[int, int],
) -> R:
    """The sum of `task(*arguments, shards) -> R` over the shards of `tokens`, which are ascending.

    name: label of the progress bar. Workers must be able to import task and merge, which adds results in order, and to
    unpickle arguments, which should be small. tokens: shard -> the tokens in it that count for progress.
    """
    shards = tuple(tokens)
    # A scheduler treats tasks with the same key as one task, and may serve several analyses at once.
    prefix = f"{name}-{uuid.uuid4().hex}"
    leaves, tokens_of = [], {}
    for number, group in enumerate(shard_groups(len(shards))):
        key = f"{prefix}-{number:05d}"
        tokens_of[key] = sum(tokens[shard] for shard in shards[group])
        attempted = (attempt, task, arguments, shards[group], tokens_of[key])
        leaves.append(delayed(cluster.with_our_code)(cluster.code_hash(), *attempted, dask_key_name=key))
    with progress(name, "tok", sum(tokens.values())) as bar:
        try:
            return pool.compute(_tree(leaves, merge, prefix), tokens_of, bar)
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
            delayed(cluster.with_our_code)(
                cluster.code_hash(), merge, nodes[i : i + MERGE_WIDTH], dask_key_name=f"{name}-merge-{level}-{i:05d}"
            )
            for i in range(0, len(nodes), MERGE_WIDTH)
        ]
    return nodes[0]


def attempt(task: Callable[..., R], arguments: tuple[Any, ...], shards: tuple[int, ...], tokens: int) -> R:
    """task(*arguments, shards), tried up to `ATTEMPTS` times; errors that the user must fix are not retried."""
    if (worker := cluster.this_worker()) is not None:
        torch.set_num_threads(1)
    for left in reversed(range(cluster.ATTEMPTS)):
        try:
            result = task(*arguments, shards)
        except Exception as error:
            if isinstance(error, ResidscopeError) or (left == 0 and is_out_of_memory(error)):
                raise
            if left == 0:
                raise cluster.failed(shards, f"{type(error).__name__}: {error}") from error
        else:
            if worker is not None:
                worker.log_event(_TOPIC, tokens)
            return result
    raise AssertionError("unreachable")


@contextmanager
def open_pool(scheduler: str, n_workers: int | None, n_tasks: int, report: Path | None = None) -> Iterator["Pool"]:
    """The pool that `--scheduler` names: threads, processes, or the address of a Dask scheduler.

    report: HTML file to write Dask's performance report to, at the end.
    """
    if report is not None and find_spec("bokeh") is None:
        raise ResidscopeError("--performance-report needs bokeh: pip install 'residscope[dashboard]', or leave it out")
    if scheduler == "threads":
        with _profile(report) if report else nullcontext():
            yield Threads(n_workers or min(cluster.n_cores(), n_tasks))
    else:
        from distributed import performance_report

        with (
            cluster.connected(scheduler, n_workers or cluster.n_cores()) as client,
            performance_report(filename=str(report)) if report else nullcontext(),
        ):
            yield Cluster(client)


@contextmanager
def _profile(report: Path) -> Iterator[None]:
    """Write a page with the tasks, CPU and memory use of this process's threads to `report`."""
    from dask.diagnostics.profile import Profiler, ResourceProfiler
    from dask.diagnostics.profile_visualize import visualize

    with Profiler() as tasks, ResourceProfiler() as resources:
        yield
    visualize([tasks, resources], filename=str(report), show=False, save=True)


@dataclass(frozen=True)
class Threads:
    """Threads of this process."""

    n_workers: int

    def compute(self, root: Delayed, tokens: dict[str, int], bar: "tqdm[Any]") -> Any:
        """The value of `root`; advances the bar by `tokens[key]` when the task of that key is done."""
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, before // self.n_workers))
        STOPPING.clear()
        try:
            with Callback(posttask=lambda key, *_: bar.update(tokens.get(key, 0))):
                return compute(root, scheduler="threads", num_workers=self.n_workers, optimize_graph=False)[0]
        except BaseException:
            STOPPING.set()
            raise
        finally:
            torch.set_num_threads(before)


_TOPIC = "residscope-analysis"


@dataclass(frozen=True)
class Cluster:
    """The workers of a Dask scheduler."""

    client: Any
    """distributed.Client"""

    def compute(self, root: Delayed, tokens: dict[str, int], bar: "tqdm[Any]") -> Any:
        from distributed import CancelledError, KilledWorker, wait
        from distributed.comm.core import CommClosedError

        self.client.subscribe_topic(_TOPIC, lambda event: bar.update(event[1]))
        future = self.client.compute(root, optimize_graph=False)
        try:
            while not future.done():
                cluster.require_worker(self.client)
                with suppress(TimeoutError):
                    wait(future, timeout=cluster.POLL_SECONDS)
            return future.result()
        except KilledWorker as error:
            advice = "perhaps for lack of memory; use fewer with --n-workers, or leave --scheduler out"
            raise ResidscopeError(f"the workers of task {error.task} were killed repeatedly, {advice}") from None
        except (CancelledError, CommClosedError) as error:
            raise ResidscopeError(f"the Dask scheduler went away ({said(error)}): start it again") from None
        finally:
            self.client.unsubscribe_topic(_TOPIC)


Pool = Threads | Cluster
