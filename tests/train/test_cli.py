"""The command as a process: exit codes, one line per error, signals, kill -9 at random moments."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.checkpoint import load_checkpoint
from train.cli import main

ROOT = Path(__file__).parents[2]
FLAGS = ["--n-latents=600", "--k=4", "--batch-size=64", "--epochs=20", "--threads=1"]
FLAGS += ["--checkpoint-every=5", "--validate-every=0"]


def command(store: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "residscope", "train", "--store", str(store), "--out", str(out), *FLAGS, *flags]


def run(store: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(store, out, *flags), cwd=ROOT, capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


SIGNALLED = """
import os, sys
at, number, folder = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)

def count(event, arguments):
    global at
    if event in ("open", "os.rename") and str(arguments[0]).startswith(folder):
        at -= 1
        if at == 0:
            os.kill(os.getpid(), number)

sys.addaudithook(count)
from train.cli import main
raise SystemExit(main())
"""


def run_signalled(at: int, number: signal.Signals, store: Path, out: Path, *flags: str) -> int:
    """Train in a process that sends itself a signal before it opens or renames its `at`-th file; its exit code. So no
    test depends on how fast the machine is; `benchmarks/bench_resume.py` kills at moments of the clock."""
    words = ["-c", SIGNALLED, str(at), str(number.value), str(out.parent), *command(store, out, *flags)[4:]]
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, env=environment()).returncode


def steps_logged(out: Path) -> list[int]:
    lines = out.with_name("ckpt.metrics.jsonl").read_text().splitlines()
    return [entry["step"] for entry in map(json.loads, lines) if "split" not in entry]


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "ckpt.pt"
    done = run(store, out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["training"]["step"] == result["plan"]["steps"] == 338
    assert result["validation"]["fvu"] < 0.9
    return out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bytes(
    store: Path, whole: Path, tmp_path: Path
) -> None:
    """Mistake 12. Five kill -9, each at a random one of its writes; the checkpoint is never torn."""
    out = tmp_path / "ckpt.pt"
    moments = random.Random(0)
    for _ in range(5):
        code = run_signalled(moments.randint(12, 40), signal.SIGKILL, store, out, "--resume")
        assert code == -signal.SIGKILL
        saved = load_checkpoint(out)
        torch.testing.assert_close(saved.sae.W_dec.norm(dim=1), torch.ones(600), rtol=0, atol=1e-6)
    assert load_checkpoint(out).trainer["finished"] is False
    done = run(store, out, "--resume")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert steps_logged(out) == steps_logged(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_130(store: Path, whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "ckpt.pt"
    assert run_signalled(20, number, store, out) == 130
    step = load_checkpoint(out).trainer["step"]
    assert 5 <= step < 338
    assert run(store, out, "--resume").returncode == 0
    assert out.read_bytes() == whole.read_bytes()


def test_wrong_input_gets_one_line_and_its_exit_code(
    store: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = tmp_path / "evil.pt"
    torch.save({"format": 1, "config": Path, "state_dict": print}, evil)
    out = tmp_path / "ckpt.pt"
    cases = [
        ((store, out, "--k", "601"), 2, "k is 601, but there are only 600 latents"),
        ((store, out, "--batch-size", "0"), 2, "--batch-size should be above 0"),
        ((store, out, "--n-procs", "1000000"), 2, "on this machine, found 1000000"),
        ((store, out, "--threads", "100000"), 2, "--threads should be at most 1024"),
        ((store, out, "--window-gb", "1e308"), 2, "--window-gb should be above 0 and below 1e+12"),
        ((store, out, "--dead-tokens", str(2**63)), 2, "--dead-tokens should be above 0 and below 1e+12"),
        ((store, whole), 2, "exists already"),
        ((tmp_path / "none.zarr", out), 2, "no such file or folder"),
        ((store, evil, "--resume"), 3, "loading it could run code"),
        ((store, whole, "--resume", "--k", "5"), 3, "k was 4"),
    ]
    for arguments, code, message in cases:
        assert main(command(*arguments)[4:]) == code
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1, printed.err
        assert printed.out == ""
    assert not out.exists()


def test_the_number_of_latents_is_said_once(
    store: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, in a file, or in both; the written flags have it once, so that they can be used again."""
    options = tmp_path / "options.toml"
    options.write_text("expansion-factor = 2\n")
    both = "--n-latents 600 and --expansion-factor 2 both set the number of latents: give only one"
    out = tmp_path / "ckpt.pt"
    for flags in (["--expansion-factor", "2"], ["--config", str(options)]):
        assert main(command(store, out, *flags)[4:]) == 2
        printed = capsys.readouterr().err
        assert both in printed
        assert printed.count("\n") == 1
    options.write_text("expansion_factor = 2.0\nn_latents = 600\n")
    assert main(["--store", str(store), "--out", str(out), "--config", str(options)]) == 2
    assert both in capsys.readouterr().err
    assert not out.exists()
    left = whole.with_name("ckpt.config.toml")
    assert "expansion_factor" not in left.read_text()
    assert main(["--config", str(left), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_killed_at_random_moments_ends_with_the_same_bytes(store: Path, tmp_path: Path) -> None:
    """Mistake 12, for two runs in one pass: a kill between their two checkpoints leaves them at different steps."""
    sweep = ["--sweep", "k=2,4"]
    names = ["ckpt.k=2.pt", "ckpt.k=4.pt", "ckpt.k=2.safetensors", "ckpt.k=4.safetensors"]
    assert run(store, tmp_path / "whole" / "ckpt.pt", *sweep).returncode == 0
    out, moments = tmp_path / "broken" / "ckpt.pt", random.Random(1)
    for _ in range(3):
        code = run_signalled(moments.randint(20, 60), signal.SIGKILL, store, out, *sweep, "--resume")
        assert code == -signal.SIGKILL
    assert run(store, out, *sweep, "--resume").returncode == 0
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == out.with_name(name).read_bytes(), name
