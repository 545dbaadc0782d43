"""Tasks and their tree: order, retries, failures, and the choice of a pool. Clusters are tried for real, once each."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis import jobs
from residscope.errors import Interrupted, ResidscopeError


def add(parts):
    return [item for part in parts for item in part]


def shards(n):
    return list(range(0, 2 * n, 2))


def run(pool, task, arguments=(), n_shards=20):
    return jobs.run(pool, "test", task, arguments, add, dict.fromkeys(shards(n_shards), 3))


def echo(shards):
    return list(shards)


def fail_first(folder, shards):
    """Fails the first time for every second group of shards."""
    marker = Path(folder) / f"{shards[0]}"
    if shards[0] % 4 == 0 and not marker.exists():
        marker.touch()
        raise RuntimeError("a passing trouble")
    return list(shards)


def fail_always(shards):
    if 6 in shards:
        raise RuntimeError("a lasting trouble")
    return list(shards)


def refuse(folder, shards):
    (Path(folder) / f"{os.getpid()}-{len(list(Path(folder).iterdir()))}").touch()
    raise ResidscopeError("shard 0 is damaged")


def die_once(folder, shards):
    """Kills its own process the first time that shard 6 is asked for."""
    marker = Path(folder) / "died"
    if 6 in shards and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return list(shards)


@pytest.mark.parametrize("n_workers", [1, 3])
@pytest.mark.parametrize("n_shards", [1, 2, 8, 9, 65, 300])
def test_results_are_merged_in_the_order_of_shards(n_workers, n_shards):
    assert run(jobs.Threads(n_workers), echo, n_shards=n_shards) == shards(n_shards)


@pytest.mark.parametrize("n_shards", [1, 255, 256, 257, 5000])
def test_groups_cover_every_shard_once_and_are_no_more_than_the_limit(n_shards):
    groups = jobs.shard_groups(n_shards)
    assert [i for group in groups for i in range(n_shards)[group]] == list(range(n_shards))
    assert len(groups) <= max(jobs.TASKS, -(-n_shards // jobs.TASK_SHARDS))


def test_a_task_that_fails_is_tried_again(tmp_path):
    assert run(jobs.Threads(2), fail_first, (str(tmp_path),)) == shards(20)
    assert len(list(tmp_path.iterdir())) == 10


def test_a_task_that_always_fails_names_its_shards(monkeypatch):
    with pytest.raises(ResidscopeError, match=r"shard 6 failed 3 times, last with RuntimeError: a lasting trouble"):
        run(jobs.Threads(2), fail_always)
    monkeypatch.setattr(jobs, "TASKS", 5)
    with pytest.raises(ResidscopeError, match=r"shards 0 to 6 failed 3 times"):
        run(jobs.Threads(2), fail_always)


def test_an_error_that_the_user_must_act_on_is_not_tried_again(tmp_path):
    with pytest.raises(ResidscopeError, match="shard 0 is damaged"):
        run(jobs.Threads(1), refuse, (str(tmp_path),), n_shards=1)
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_is_said_to_be_one():
    def interrupt(shards):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="Run the same command to start again"):
        run(jobs.Threads(1), interrupt)


def test_workers_share_the_cores_and_leave_torch_as_it_was():
    before = torch.get_num_threads()
    seen = run(jobs.Threads(max(2, before)), lambda shards: [torch.get_num_threads()])
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_a_worker_that_is_killed_changes_nothing_in_the_result(tmp_path):
    with jobs.open_pool("processes", 2, 8) as pool:
        assert run(pool, die_once, (str(tmp_path),), n_shards=8) == shards(8)
    assert (tmp_path / "died").exists()


@pytest.mark.slow
def test_a_cluster_at_an_address_gives_the_same_and_its_errors_arrive():
    from distributed import LocalCluster

    local: Any = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0")
    with local as cluster, jobs.open_pool(cluster.scheduler_address, None, 4) as pool:
        assert run(pool, echo, n_shards=4) == shards(4)
        with pytest.raises(ResidscopeError, match="shard 6 failed 3 times"):
            run(pool, fail_always, n_shards=4)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://x:1"])
def test_an_address_that_does_not_answer_is_one_clear_error(address, monkeypatch):
    monkeypatch.setattr("residscope.cluster.CONNECT_SECONDS", 1)
    with (
        pytest.raises(ResidscopeError, match=f"--scheduler {address}: no Dask scheduler answers"),
        jobs.open_pool(address, None, 1),
    ):
        pass


@pytest.mark.slow
def test_worker_processes_find_our_packages_whatever_lies_on_the_path(tmp_path):
    for name in ("store", "train", "analysis", "harvest"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('a file of the user')")
    code = """
import residscope
from analysis import jobs

def echo(shards):
    import store.meta
    return list(shards)

def merge(parts):
    return sum(parts, [])

with jobs.open_pool("processes", 1, 2) as pool:
    print(jobs.run(pool, "test", echo, (), merge, {3: 1, 5: 1}))
"""
    root = str(Path(jobs.__file__).parents[1])
    path = os.pathsep.join([str(tmp_path), root])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[3, 5]", done.stderr[-2000:]


def test_memory_that_a_task_is_refused_is_no_fault_of_its_shards():
    def refused(shards):
        raise MemoryError("10 GiB")

    with pytest.raises(MemoryError, match="10 GiB"):
        run(jobs.Threads(1), refused, n_shards=1)
