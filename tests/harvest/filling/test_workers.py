"""Worker processes: the same bytes as one process makes, whoever fills what, and whatever becomes of a worker."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.client import FuturesCancelledError
from distributed.comm.core import CommClosedError

from harvest.config import HarvestConfig
from harvest.filling import workers
from harvest.filling.workers import FillSpec, fill_shards, run_tasks
from harvest.options_file import options_in_full
from harvest.run import harvest
from residscope import cluster
from residscope.errors import IncompatibleError, Interrupted, ResidscopeError, UsageError
from store.activations import ActivationStore
from store.shards import PutShard
from tests.support.harvesting import MakeConfig, harvest_config, tree


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a scheduler in this process, with two workers that are threads of it."""
    from distributed import LocalCluster

    local: Any = LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0")
    with local:
        yield local.scheduler_address


@pytest.fixture
def whole(config: MakeConfig, tmp_path: Path, small_shards: None) -> dict[str, bytes]:
    """The files of the store that one process makes: 591 tokens in 7 shards."""
    harvest(config(out=tmp_path / "whole.zarr"))
    return tree(tmp_path / "whole.zarr")


def put_with(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Have `before(shard)` called before a worker puts a shard."""
    put = ActivationStore.put_shard

    def putting(self: ActivationStore, shard: int, *given: Any, **options: Any) -> PutShard:
        before(shard)
        return put(self, shard, *given, **options)

    monkeypatch.setattr(ActivationStore, "put_shard", putting)


def test_workers_make_the_bytes_of_one_process(
    config: MakeConfig, whole: dict[str, bytes], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where tasks end out of order, and where some shards are there."""
    groups = [[4], [0, 1], [6], [2, 3, 5]]
    monkeypatch.setattr(workers, "shard_groups", lambda *_: groups)
    found = harvest(config(scheduler=address))
    assert tree(tmp_path / "acts.zarr") == whole
    assert (found.shards_written, found.tokens) == (7, 591)
    assert "scheduler" not in (tmp_path / "acts.harvest.toml").read_text(encoding="utf-8")
    assert not workers._last
    monkeypatch.undo()
    assert harvest(config(scheduler=address)).shards_written == 0


def test_a_shard_that_always_fails_is_named_and_the_others_stay(
    config: MakeConfig, whole: dict[str, bytes], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fail(shard: int) -> None:
        tried.append(shard)
        if shard == 2:
            raise RuntimeError("a lasting trouble")

    put_with(monkeypatch, fail)
    with pytest.raises(ResidscopeError, match=r"^shard 2 failed 3 times, last with RuntimeError: a lasting trouble$"):
        harvest(config(scheduler=address))
    assert tried.count(2) == 3
    out = tmp_path / "acts.zarr"
    assert 2 in ActivationStore.open(out, partial=True).missing_shards()
    assert not list(out.glob("incoming-*"))
    monkeypatch.undo()
    harvest(config(scheduler=address))  # Whose sizes of shards are the store's own.
    assert tree(out) == whole


def test_a_passing_trouble_is_tried_again(
    config: MakeConfig, whole: dict[str, bytes], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fail_first(shard: int) -> None:
        tried.append(shard)
        if tried.count(shard) == 1:
            raise RuntimeError("a passing trouble")

    put_with(monkeypatch, fail_first)
    harvest(config(scheduler=address))
    assert tree(tmp_path / "acts.zarr") == whole


@pytest.mark.parametrize(
    "error", [ResidscopeError("layer 1, token 3: too large"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a")]
)
def test_an_error_that_the_user_must_act_on_stops_at_once(
    config: MakeConfig, small_shards: None, address: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tried: list[int] = []

    def fail(shard: int) -> None:
        tried.append(shard)
        raise error

    put_with(monkeypatch, fail)
    monkeypatch.setattr(workers, "shard_groups", lambda *_: [list(range(7))])
    with pytest.raises(type(error), match=str(error.args[-1])[:20]):
        harvest(config(scheduler=address))
    assert tried == [0]


def test_an_interrupted_harvest_is_continued(
    config: MakeConfig, whole: dict[str, bytes], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "shard_groups", lambda *_: [[3], [0, 1, 2], [4, 5, 6]])
    original = workers.run_tasks

    def run(client: Any, spec: FillSpec, groups: Any, take: Callable[[PutShard], object], stopped: Any) -> None:
        done: list[PutShard] = []

        def take_and_note(put: PutShard) -> None:
            take(put)
            done.append(put)

        original(client, spec, groups, take_and_note, lambda: bool(done))

    monkeypatch.setattr(workers, "run_tasks", run)
    with pytest.raises(Interrupted, match=r"stopped with [1-6] of 7 shards complete; run the same command"):
        harvest(config(scheduler=address))
    monkeypatch.undo()
    harvest(config())
    assert tree(tmp_path / "acts.zarr") == whole


@pytest.mark.parametrize("error", [CommClosedError("lost"), FuturesCancelledError([])], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["run_tasks", "cluster.require_worker"])
def test_a_scheduler_that_goes_away_is_one_line(
    config: MakeConfig, address: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"harvest.filling.workers.{where}", fail)
    with pytest.raises(
        ResidscopeError, match=r"^the Dask scheduler went away \(.*\): start it again, and run the same"
    ):
        harvest(config(scheduler=address))


def test_a_worker_that_outlives_its_command_writes_nothing(
    config: MakeConfig, whole: dict[str, bytes], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is when the command was killed, and another run has opened the store for writing."""
    specs: list[FillSpec] = []
    monkeypatch.setattr(workers, "run_tasks", lambda client, spec, *_: specs.append(spec))
    with pytest.raises(Interrupted):
        harvest(config(scheduler=address))
    before = tree(tmp_path / "acts.zarr")
    worker = SimpleNamespace(address="tcp://b:2", state=SimpleNamespace(nthreads=1))
    monkeypatch.setattr(cluster, "this_worker", lambda: worker)
    with pytest.raises(IncompatibleError, match=r"incoming-\w+\.tmp is gone: the harvest has ended"):
        fill_shards(specs[0], [0, 1])
    workers.forget()
    elsewhere = specs[0]._replace(store=str(tmp_path / "elsewhere.zarr"))  # as on a machine that lacks the folder
    with pytest.raises(UsageError, match=r"^the Dask worker at tcp://b:2: .*elsewhere\.zarr"):
        fill_shards(elsewhere, [0, 1])
    assert tree(tmp_path / "acts.zarr") == before
    workers.forget()


def test_a_worker_that_would_give_other_vectors_is_refused(
    config: MakeConfig, small_shards: None, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = workers.dependences
    answers = iter([{"torch": "0.1"}])  # Of the command, which asks first.
    monkeypatch.setattr(workers, "dependences", lambda settings: {**original(settings), **next(answers, {})})
    with pytest.raises(
        IncompatibleError, match=r"the Dask worker at .* would give other vectors: torch is .*, 0\.1 here"
    ):
        harvest(config(scheduler=address))


class Future:
    """What a client gives for a task that is done."""

    def __init__(self, result: Callable[[], list[Any]]) -> None:
        self.result = result

    def done(self) -> bool:
        return True


def test_a_shard_whose_workers_die_is_named_and_the_others_of_its_group_are_filled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from distributed import KilledWorker

    tasks: list[list[int]] = []

    def submit(function: Any, code: str, task: Any, spec: Any, shards: list[int], key: str) -> Future:
        def result() -> list[Any]:
            tasks.append(shards)
            if 3 in shards:
                raise KilledWorker(key, SimpleNamespace(address="tcp://here:1"), 0)  # type: ignore[arg-type]
            return list(shards)

        return Future(result)

    monkeypatch.setattr("distributed.wait", lambda *_, **options: None)
    client = SimpleNamespace(submit=submit, nthreads=lambda: {"a": 1})
    taken: list[Any] = []
    spec = FillSpec("a.zarr", "incoming", {}, {}, 1)
    with pytest.raises(ResidscopeError, match="shard 3 failed 3 times, last with the death of its worker"):
        run_tasks(client, spec, [[0, 1], [2, 3, 4], [5]], taken.append, lambda: False)
    assert taken == [0, 1, 5, 2, 4]
    assert tasks == [[0, 1], [2, 3, 4], [5], [2], [3], [4], [3]]


@pytest.mark.slow
def test_processes_make_the_bytes_of_one_also_when_one_is_killed(
    config: MakeConfig, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, killed = workers.run_tasks, []

    def run(client: Any, spec: FillSpec, groups: Any, take: Callable[[PutShard], object], stopped: Any) -> None:
        def kill_then_take(put: PutShard) -> None:
            if not killed:
                killed.extend(client.run(os.getpid).values())
                os.kill(killed[0], signal.SIGKILL)
            take(put)

        original(client, spec, [[shard] for shard in range(7)], kill_then_take, stopped)

    monkeypatch.setattr(workers, "run_tasks", run)
    harvest(config(n_workers=2))
    assert len(set(killed)) == 2
    assert tree(tmp_path / "acts.zarr") == whole


@pytest.mark.parametrize(
    ("device", "cores", "expected"),
    [("auto", 2, "cuda:1"), ("cuda", 2, "cuda:1"), ("cuda:0", 2, "cuda:0"), ("auto", None, "auto")],
)
def test_each_worker_of_this_machine_takes_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int | None, expected: str
) -> None:
    class Asked(Exception):
        pass

    def resolve(config: HarvestConfig) -> None:
        raise Asked(config.weights.device)

    worker = SimpleNamespace(name=3, state=SimpleNamespace(nthreads=1))
    monkeypatch.setattr(cluster, "this_worker", lambda: worker)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    monkeypatch.setattr(workers, "resolve", resolve)
    options = options_in_full(harvest_config(device=device))
    with pytest.raises(Asked, match=f"^{expected}$"):
        fill_shards(FillSpec("a.zarr", "incoming", options, {}, cores), [0])
