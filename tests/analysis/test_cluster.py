"""Whole analyses on a cluster of processes: the same bits as in threads, also when a worker is killed; light graphs."""

import os
import pickle
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from dask.base import collections_to_expr

from analysis import jobs
from analysis.run import analyze
from residscope.errors import ResidscopeError
from tests.support.small import Small, analyze_config, make_small


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    return make_small(tmp_path_factory.mktemp("small"), n_latents=200)


def run(small: Small, out: Path, **options: Any) -> dict[str, Any]:
    summary = analyze(analyze_config(store=small.store, sae=small.sae, out=out, report=False, **options))
    return {name: value for name, value in summary.items() if name not in ("seconds", "provenance")}


class KillOnce:
    """A worker plugin: the first worker that has finished two tasks of a sum kills its own process, with SIGKILL."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def setup(self, worker: Any) -> None:
        self.done = 0

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        if finish == "memory" and str(key).startswith("encode"):
            self.done += 1
            if self.done == 2:
                try:
                    Path(self.marker).touch(exist_ok=False)
                except FileExistsError:
                    return
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_changes_no_bit_of_the_results(small, tmp_path):
    from distributed import Client, LocalCluster
    from distributed.diagnostics.plugin import WorkerPlugin

    plugin = type("Killer", (KillOnce, WorkerPlugin), {"name": "killer"})(str(tmp_path / "killed"))
    expected = run(small, tmp_path / "threads")
    local: Any = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0")
    with local as cluster, Client(cluster) as client:
        client.register_plugin(plugin)
        found = run(small, tmp_path / "cluster", scheduler=cluster.scheduler_address)
    assert (tmp_path / "killed").exists()
    assert found == expected
    for name in ("latents", "layers", "redundancy"):
        ours, theirs = (tmp_path / folder / f"{name}.parquet" for folder in ("cluster", "threads"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_graph_is_small_whatever_the_autoencoder(small, tmp_path, monkeypatch):
    """Tasks hold paths and integers: a few hundred bytes each, where the weights alone are 19 kB."""
    sizes = []

    def weigh(self, root, tokens, bar):
        graph = collections_to_expr(root).__dask_graph__()
        sizes.extend(len(pickle.dumps(task)) for key, task in graph.items() if "merge" not in str(key))
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.Threads, "compute", weigh)
    with pytest.raises(BaseException, match="interrupted"):
        run(small, tmp_path)
    assert sizes
    assert max(sizes) < 3000


@pytest.mark.parametrize("scheduler", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_the_performance_report_is_written_or_what_it_needs_is_said(small, tmp_path, scheduler):
    report = tmp_path / "performance.html"
    options = {"scheduler": scheduler, "performance_report": report, "n_workers": 1, "pca": False}
    if find_spec("bokeh") is None:
        with pytest.raises(ResidscopeError, match=r"needs bokeh: pip install 'residscope\[dashboard\]'") as refused:
            run(small, tmp_path / "out", **options)
        assert refused.value.exit_code == 1
    else:
        run(small, tmp_path / "out", **options)
        assert "bokeh" in report.read_text(encoding="utf-8").lower()
