"""`residscope run`: its two commands are ones that the parsers take, and one's failure or a signal ends both."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from harvest import estimate
from harvest.config import HarvestConfig
from residscope.commands import run
from residscope.destinations import held_alone
from residscope.errors import ResidscopeError, UsageError
from residscope.options import parse_options, to_flat
from tests.support.models import tiny_model
from train.checkpoint import load_checkpoint
from train.config import TrainConfig

ASKED = ["--model", "m", "--dataset", "pydoc", "--tokens", "1e6", "--disk", "50GB"]
FOREVER = "import time; time.sleep(600)"
POPEN = subprocess.Popen


def test_the_commands_are_valid_and_fit_each_other() -> None:
    options = run.parse([*ASKED, "--out", "there", "--k", "16", "--harvest-flags", "--context-length 64"])
    commands = run.sides(options)
    harvested = parse_options(HarvestConfig, commands["harvest"], prog="harvest", description="")
    trained = parse_options(TrainConfig, commands["train"], prog="train", description="")
    assert (harvested.max_tokens, harvested.storage.rolling, to_flat(harvested)["context_length"]) == (
        10**6,
        "50GB",
        64,
    )
    assert harvested.out == trained.store == Path("there/acts.zarr")
    assert (trained.out, trained.follow, trained.resume) == (Path("there/ckpt.pt"), True, True)
    in_memory = run.sides(run.parse([*ASKED, "--store", "/dev/shm/a.zarr"]))
    assert all("/dev/shm/a.zarr" in flags for flags in in_memory.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "many"], "--tokens should be a number"),
        (
            ["--overwrite"],
            "does not take --overwrite of `train`: leave it out. To start over, remove the folder run",
        ),
        (["--shard-latents", "2"], "sets --shard-latents of `train`: leave it out"),
        (["--harvest-flags=--out=elsewhere"], "sets --out of `harvest`"),
        (["--harvest-flags=--help"], "does not take --help of `harvest`"),
        (["--no-follow"], "sets --follow of `train`"),
        (["--tokens", "0"], "--tokens should be at least 1, .* found 0 and '50GB'"),
        (["--disk", "0GB"], "--disk a size such as 50GB, found 1000000 and '0GB'"),
        (["--harvest-flags", "--text-column it's"], "--harvest-flags .*: no closing quotation"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run.parse([*ASKED, *words])


def stand_in(monkeypatch: pytest.MonkeyPatch, **scripts: str) -> list[Any]:
    """Run these scripts in the places of the two commands; gives the processes, once they are started."""
    started: list[Any] = []

    def popen(command: list[str], **options: Any) -> Any:
        started.append(POPEN([sys.executable, "-c", scripts[command[3]]], stderr=subprocess.DEVNULL, **options))
        return started[-1]

    monkeypatch.setattr(run.subprocess, "Popen", popen)
    return started


@pytest.mark.parametrize(
    ("failing", "code", "way_out"),
    [
        ("harvest", 1, "the same command continues both"),
        ("train", 2, "change what is named above, or, to start over, remove the folder .* and the store there"),
        ("train", 3, "change what is named above"),
    ],
)
def test_who_fails_ends_the_other(
    failing: str, code: int, way_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = {"harvest": FOREVER, "train": FOREVER, failing: f"raise SystemExit({code})"}
    started = stand_in(monkeypatch, **scripts)
    with pytest.raises(ResidscopeError, match=f"{failing} ended with exit code {code}; .*{way_out}") as caught:
        run.run(run.parse([*ASKED, "--out", str(tmp_path), "--store", "there"]))
    assert caught.value.exit_code == code
    assert all(side.poll() is not None for side in started)


def test_a_second_one_for_the_same_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".run").mkdir()
    with (
        held_alone(tmp_path / ".run", tmp_path),
        pytest.raises(ResidscopeError, match=f"--out {tmp_path}: another process is writing there"),
    ):
        run.run(run.parse([*ASKED, "--out", str(tmp_path)]))


def test_a_signal_ends_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    started = stand_in(monkeypatch, harvest=FOREVER, train=FOREVER)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.time, "sleep", interrupt)
    assert run.main([*ASKED, "--out", str(tmp_path)]) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert [side.poll() is not None for side in started] == [True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_both_end_when_it_is_killed(tmp_path: Path) -> None:
    """They share its stdout, which ends with the last of them."""
    side = tmp_path / "side"
    side.write_text("#!/bin/sh\necho begun\nexec sleep 600\n")
    side.chmod(0o700)
    code = f"import sys; from residscope.commands import run; sys.executable = {str(side)!r}; run.main(sys.argv[1:])"
    words = [sys.executable, "-c", code, *ASKED, "--out", str(tmp_path / "out")]
    with POPEN(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == [b"begun\n"] * 2
        parent.kill()
        assert parent.communicate(timeout=60) == (b"", None)


def test_both_halves_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model("gpt_neox", tmp_path / "model")
    words = ["--model", str(model), "--dataset", "pydoc", "--tokens", "6000", "--disk", "1MB"]
    words += ["--out", str(tmp_path / "out"), "--harvest-flags", "--context-length 32", "--n-latents", "32", "--k", "4"]
    assert run.main([*words, "--batch-size", "128", "--window-gb", "0.0001", "--threads", "1"]) == 0
    assert "ckpt.pt: trained within 1MB of activations in " in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt").trainer["finished"]
    assert not (tmp_path / "out" / ".run").exists()


def test_a_dry_run_takes_the_flags_of_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two layers in float32, one of them trained on: 10 steps of a tenth of 6,000 vectors."""
    monkeypatch.setattr(estimate, "_MEASURE_SECONDS", 0.0)
    model = tiny_model("gpt_neox", tmp_path / "model")
    words = ["--model", str(model), "--dataset", "pydoc", "--tokens", "6000", "--disk", "2MB", "--dry-run"]
    words += ["--harvest-flags", "--context-length 32 --layers 0,2 --store-dtype float32"]
    words += ["--out", str(tmp_path / "out"), "--batch-size", "600", "--n-latents", "64", "--layers", "2", "--k", "4"]
    assert run.main([*words, "--sweep", "lr=1e-3,2e-3"]) == 0
    said, token_bytes = capsys.readouterr().out, 2 * 4 * AutoConfig.from_pretrained(model).hidden_size
    for expected in (f"6,000 tokens x {token_bytes} bytes (float32)", "at most 2 MB at once", "2 autoencoders at once"):
        assert expected in said
    assert "10 steps, 6,000 vectors" in said
    for more, wrong in ((["--epochs", "2"], "is trained on once"), (["--steps", "11"], "is trained on once")):
        assert run.main([*words, *more]) == 2
        assert wrong in capsys.readouterr().err
    assert run.main([*words, "--layers", "1"]) == 2
    assert "--layers: `harvest` does not store layer 1" in capsys.readouterr().err
    words[words.index("2MB")] = "0.1MB"
    assert run.main(words) == 2
    assert "this store needs at least" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
