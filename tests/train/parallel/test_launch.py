"""`train --n-procs` as a process: what ends one of several, in one line, and going on after a kill."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from residscope.errors import ResidscopeError, UsageError
from tests.support.training import train_config
from train.parallel.launch import joined

ROOT = Path(__file__).parents[3]
FLAGS = ["--n-latents=41", "--k=4", "--batch-size=64", "--threads=1", "--kernels=torch", "--window-gb=1e-5"]
FLAGS += ["--dtype=float32", "--lr=0.002", "--encoder-scale=1", "--dead-tokens=20", "--log-every=4", "--steps=17"]
FLAGS += ["--n-procs=2", "--checkpoint-every=5"]
"""Those of `base`."""

KILLING = """
import os, signal
from pathlib import Path
from train import trainer
save, children = trainer.save_checkpoint, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")

def killing(*arguments, **options):
    save(*arguments, **options)
    for child in children.read_text().split():
        os.kill(int(child), signal.SIGKILL)

trainer.save_checkpoint = killing
from train.cli import main
raise SystemExit(main())
"""


def run(store: Path, out: Path, *flags: str, script: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "residscope", "train"] if script is None else ["-c", script]
    words = [sys.executable, *start, "--store", str(store), "--out", str(out), *FLAGS, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=240)


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if "error" in line or "Traceback" in line]


def test_after_a_kill_there_is_one_line_and_a_resume_ends_with_the_same_bits(
    store: Path, tmp_path: Path, two: tuple[Path, Any]
) -> None:
    broken = tmp_path / "broken.pt"
    killed = run(store, broken, script=KILLING)
    assert killed.returncode == 1
    line = "another process of this run has ended (killed?): --resume continues from the last checkpoint"
    assert errors(killed.stderr) == [f"train: error: {line}"]
    done = run(store, broken, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("validation on") == 1  # the first alone speaks
    assert broken.read_bytes() == (two[0] / "topk.pt").read_bytes()


def test_another_number_than_torchrun_started_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    started = joined(train_config(store=store, n_procs=3), [])
    with pytest.raises(UsageError, match="--n-procs 3: torchrun has started 2 processes: leave it out"), started:
        pass


@pytest.mark.parametrize(
    ("size", "words"), [("abc", "WORLD_SIZE is 'abc' in the"), ("2", "without RANK and MASTER_ADDR")]
)
def test_what_another_launcher_left_in_the_environment_is_named(
    store: Path, monkeypatch: pytest.MonkeyPatch, size: str, words: str
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match=words), joined(train_config(store=store), []):
        pass


def test_one_whose_variables_are_not_whole_speaks(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = run(store, tmp_path / "a.pt", "--n-procs=1")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "WORLD_SIZE is 2 in the environment, without MASTER_ADDR and MASTER_PORT" in done.stderr


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"RANK": "2"}, 2, "RANK is '2' in the environment: should be a number of at most 1"),
        ({"RANK": "x"}, 2, "RANK is 'x' in the environment: should be a number"),
        ({"MASTER_PORT": "x"}, 2, "MASTER_PORT is 'x' in the environment"),
        ({"MASTER_PORT": "70000"}, 2, "MASTER_PORT is '70000' in the environment: should be a number of at most 65535"),
    ],
)
def test_wrong_variables_are_one_line(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], code: int, words: str
) -> None:
    sound = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**sound, **changed}.items():
        monkeypatch.setenv(name, value)
    done = run(store, tmp_path / "a.pt", "--n-procs=1")
    said = [line for line in done.stderr.splitlines() if not line.startswith("train: one of")]
    assert (done.returncode, len(said)) == (code, 1), done.stderr
    assert words in said[0]


def test_who_waits_for_others_ends_at_a_signal(store: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, "-m", "residscope", "train", "--store", str(store), "--out", str(tmp_path / "a.pt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        assert waiting.stderr.readline().startswith("train: one of 2")
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(60) == 130
        assert waiting.stderr.read() == "train: error: interrupted; run the same command again\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "no such host"])
def test_who_was_started_by_one_that_is_gone_ends(store: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": host, "MASTER_PORT": port}
    for name, value in {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("train.parallel.launch._SERVED", 0.1)
    with (
        pytest.raises(ResidscopeError, match=f"no process answers at {host}:{port}"),
        joined(train_config(store=store), []),
    ):
        pass


@pytest.mark.parametrize(("flag", "words"), [("--lr=0.5", "another lr"), ("--resume", "another checkpoint")])
def test_processes_that_would_train_something_else_are_refused(
    store: Path, tmp_path: Path, two: tuple[Path, Any], flag: str, words: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    both, places = [], [tmp_path / "first", tmp_path / "second"]
    for rank, place in enumerate(places):  # as on two machines that do not share a disk
        place.mkdir()
        variables = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        line = [sys.executable, "-m", "residscope", "train", f"--store={store}", "--out=a.pt", *FLAGS[:-2]]
        line += [flag] if flag == "--resume" or rank else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
        both.append((line, place, environment))
    if flag == "--resume":
        (places[0] / "a.pt").write_bytes((two[0] / "one.pt").read_bytes())
    begun = [subprocess.Popen(w, cwd=p, env=e, stderr=subprocess.PIPE, text=True) for w, p, e in both]
    said = [process.communicate(timeout=240)[1] for process in begun]
    assert [process.returncode for process in begun] == [3, 3], said
    assert f"process 1 of 2 has {words} than the first (0)" in said[0]
    assert {path.name for path in places[0].iterdir()} <= {"a.pt"}


def test_latents_that_cannot_be_shared_are_refused_before_a_file_changes(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.pt"
    assert run(store, out, "--n-procs=1").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for flag in ("--overwrite", "--resume"):
        done = run(store, out, flag, "--shard-latents=2", "--steps=30")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "41 latents do not make as many equal parts" in done.stderr
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("device", "gpus"), [("auto", 1), ("cuda:1", 2)])
def test_more_processes_than_gpus_are_refused_before_one_waits_for_another(
    store: Path, monkeypatch: pytest.MonkeyPatch, device: str, gpus: int
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    started = joined(train_config(store=store, n_procs=2, device=device), [])
    with (
        pytest.raises(UsageError, match=f"--device {device}: .* 2 processes .* there are {gpus}: start fewer"),
        started,
    ):
        pass


def test_a_dry_run_of_two_is_of_what_two_take(store: Path, tmp_path: Path) -> None:
    large = ["--n-latents=20000", "--tile-mb=1", "--aux-coef=0", "--device=cpu"]
    done = run(store, tmp_path / "a.pt", "--dry-run", "--json", *large, "--shard-latents=2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["processes"], found["steps"], found["measured_steps"]) == (2, 17, 15)
    assert not [*tmp_path.iterdir()]
    alone = run(store, tmp_path / "a.pt", "--dry-run", "--json", *large, "--n-procs=1")
    half = 20_000 * 12 * 4  # of the bytes of W_enc and W_dec; and so of their gradients and moments
    assert json.loads(alone.stdout)["memory_bytes"] - found["memory_bytes"] == 3 * half
