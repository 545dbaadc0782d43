"""Dask workers: they have our sources, and where there are none, one line says so."""

import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from residscope import cluster
from residscope.errors import IncompatibleError, ResidscopeError


def test_a_worker_of_another_version_is_refused():
    """At the start by what it says of itself, in whatever way it fails to; one that comes later by itself."""
    for found in ("another", ImportError("No module named 'residscope'")):
        with pytest.raises(
            IncompatibleError, match=r"the Dask worker at tcp://b:2 has another version .* start workers"
        ):
            cluster._require_our_code(Answering({"tcp://a:1": cluster.code_hash(), "tcp://b:2": found}))
    gone = OSError("Scheduler Broadcast: connection reset")  # a worker that has died meanwhile
    cluster._require_our_code(Answering({"tcp://a:1": cluster.code_hash(), "tcp://b:2": gone}))
    assert cluster.with_our_code(cluster.code_hash(), max, 1, 2) == 2
    with pytest.raises(IncompatibleError, match="another version of residscope"):
        cluster.with_our_code("of another version", max, 1, 2)


def test_a_worker_that_does_not_answer_is_named_and_holds_up_no_start(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.1)
    frozen = threading.Event()
    try:
        cluster._require_our_code(Answering({"tcp://a:1": frozen, "tcp://b:2": cluster.code_hash()}))
    finally:
        frozen.set()
    assert capsys.readouterr().err.startswith("the Dask worker at tcp://a:1 does not answer: ")


class Answering:
    """A client whose workers answer so; not before an event, where they give one."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers

    def nthreads(self) -> dict[str, int]:
        return dict.fromkeys(self.answers, 1)

    def run(self, function: object, workers: list[str], on_error: str) -> dict[str, Any]:
        answer = self.answers[workers[0]]
        if isinstance(answer, threading.Event):
            answer.wait()
        return {workers[0]: answer}


class NoWorkers:
    """A client of a scheduler that has no worker until the `n`-th time it is asked."""

    scheduler = SimpleNamespace(address="tcp://here:1")

    def __init__(self, n: float) -> None:
        self.left = n

    def nthreads(self) -> dict[str, int]:
        self.left -= 1
        return {} if self.left > 0 else {"a": 1}


def test_a_cluster_without_workers_is_said_to_be_one_and_given_up(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.5)
    monkeypatch.setattr(cluster, "SAY_AFTER", 2)
    monkeypatch.setattr(cluster, "GIVE_UP_AFTER", 5)
    monkeypatch.setattr(cluster.time, "sleep", lambda _: None)
    assert cluster.require_worker(NoWorkers(9)) == 1
    said = capsys.readouterr().err
    assert said.count("had no worker for 2.0 s: start some with `dask worker tcp://here:1`; waiting 5 s") == 1
    with pytest.raises(ResidscopeError, match=r"had no worker for 5\.0 s: start some with `dask worker tcp://here:1`"):
        cluster.require_worker(NoWorkers(float("inf")))


def test_a_worker_process_that_dies_at_its_start_is_one_line(monkeypatch):
    def start(**_):
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr("distributed.LocalCluster", start)
    with (
        pytest.raises(ResidscopeError, match=r"^a worker process died when it started \(Nanny failed"),
        cluster.connected("processes", 2),
    ):
        pass


def test_shards_that_failed_are_named():
    assert str(cluster.failed([3], "OSError: gone")) == "shard 3 failed 3 times, last with OSError: gone"
    assert "shards 3 to 5 failed 3 times" in str(cluster.failed([3, 4, 5], "why"))


def test_only_worker_processes_leave_ctrl_c_to_the_one_that_started_them():
    before = signal.getsignal(signal.SIGINT)
    try:
        cluster.dask_setup(SimpleNamespace(nanny=None))
        assert signal.getsignal(signal.SIGINT) is before
        cluster.dask_setup(SimpleNamespace(nanny="tcp://here:1"))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
