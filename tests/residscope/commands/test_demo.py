"""The demo: its commands are ones that the parsers take, a stage that fails ends it, and its last words hold the
numbers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis.config import AnalyzeConfig
from harvest.config import HarvestConfig
from residscope.commands import demo
from residscope.options import parse_options
from tests.support.results import write_results
from train.config import TrainConfig


def test_the_commands_are_valid_and_fit_each_other():
    stages = demo.stages(demo.DemoConfig(out=Path("there"), tokens=40_000))
    harvested = parse_options(HarvestConfig, stages["harvest"], prog="harvest", description="")
    trained = parse_options(TrainConfig, stages["train"], prog="train", description="")
    analysed = parse_options(AnalyzeConfig, stages["analyze"], prog="analyze", description="")
    assert (harvested.max_tokens, harvested.text.dataset) == (40_000, ("pydoc",))
    assert harvested.out == trained.store == analysed.store == Path("there/acts.zarr")
    assert trained.out == analysed.sae
    assert analysed.out_dir == Path("there")
    assert list(stages) == ["harvest", "train", "analyze"]


def test_a_stage_that_fails_ends_the_demo_with_its_exit_code(tmp_path, monkeypatch, capsys):
    ran = []

    def run(command, check):
        ran.append(command[3])
        return SimpleNamespace(returncode=3 if "train" in command else 0)

    monkeypatch.setattr(demo.subprocess, "run", run)
    assert demo.main(["--out", str(tmp_path / "demo")]) == 3
    assert ran == ["harvest", "train"]
    captured = capsys.readouterr()
    assert "$ harvest --model smollm2-135m" in captured.out
    assert "train ended with exit code 3" in captured.err


def test_the_last_words_hold_the_decomposition_the_fvu_and_the_dead(tmp_path, monkeypatch, capsys):
    write_results(tmp_path, n_layers=4, n_latents=50)
    monkeypatch.setattr(demo.subprocess, "run", lambda command, check: SimpleNamespace(returncode=0))
    assert demo.main(["--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    mass = summary["variance"]["mass"]
    for name in ("within_token", "between_tokens", "between_latents", "total"):
        assert f"{mass[name]:.3g}" in out
    assert f"{summary['validation_fvu']:.3f}; PCA with 32 components {summary['baseline']['pca']['fvu']:.3f}" in out
    assert f"{summary['latents']['dead']:,} of 50" in out
    for stage in ("harvest took", "train took", "analyze took", "together"):
        assert stage in out


@pytest.mark.parametrize("argv", [["--tokens", "3"]])
def test_too_few_tokens_are_refused(argv, capsys):
    assert demo.main(argv) == 2
    assert "--tokens should be at least" in capsys.readouterr().err


def test_a_file_is_no_folder_for_the_demo(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file")]) == 2
    assert "should be a folder, found a file" in capsys.readouterr().err
