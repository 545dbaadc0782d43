"""The command: exit codes, one line for every mistake, JSON on stdout."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harvest.cli import main
from store.activations import ActivationStore
from tests.support.harvesting import ModelFolder
from tests.support.lenses import write_lens


class Outcome(NamedTuple):
    code: int
    stdout: str
    error: str
    """The last line of stderr."""


Harvest = Callable[..., Outcome]


@pytest.fixture
def command(
    tmp_path: Path, model_folder: ModelFolder, text_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> Harvest:
    """Runs the command with good options, but for those that a test gives; without a network."""
    import huggingface_hub

    def unreachable(*args: Any, **options: Any) -> Any:
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    monkeypatch.chdir(tmp_path)

    def run(**changes: Any) -> Outcome:
        options = {
            "model": model_folder("gpt2"),
            "out": "acts.zarr",
            "dataset": text_folder,
            "context_length": 20,
            **changes,
        }
        words: list[str] = []
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
        try:
            code = main(words)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return Outcome(code, found.out, (found.err.strip().splitlines() or [""])[-1])

    return run


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_text_that_is_not_there_is_missed_before_a_model_is_looked_for(
    command: Harvest, dry_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*args: Any, **options: Any) -> Any:
        raise AssertionError("the model was looked for first")

    for module in ("run", "estimate"):
        monkeypatch.setattr(f"harvest.{module}.resolve", unwanted)
    found = command(dataset="missing.jsonl", **({"dry_run": True} if dry_run else {}))
    assert (found.code, found.error) == (
        2,
        "harvest: error: --dataset missing.jsonl: there is no such file or folder",
    )


def test_a_run_prints_a_summary_and_then_has_nothing_to_do(command: Harvest) -> None:
    first = command()
    assert first.code == 0
    assert "591 of 4 documents" in first.stdout
    assert "layers 0-2" in first.stdout
    assert "nothing to do" in command().stdout


def test_json_is_one_line(command: Harvest) -> None:
    dry = json.loads(command(dry_run=True, json=True, max_tokens=100).stdout)
    assert (dry["dry_run"], dry["tokens"], dry["bytes"]) == (True, 100, 100 * 3 * 32 * 2)
    assert not Path("acts.zarr").exists()
    done = json.loads(command(json=True).stdout)
    assert (done["dry_run"], done["tokens"], done["layers"]) == (False, 591, [0, 1, 2])
    assert done["content_hash"] == ActivationStore.open("acts.zarr").content_hash


def test_a_dry_run_in_words(command: Harvest) -> None:
    assert "nothing was written" in command(dry_run=True).stdout
    assert "DOES NOT FIT" not in command(dry_run=True).stdout


MISTAKES: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": ({"model": "phytia-1b"}, 2, "unknown model 'phytia-1b'"),
    "no network, model": ({"model": "pythia-1b"}, 1, "model 'EleutherAI/pythia-1b': the hub cannot be reached"),
    "no network, data": ({"dataset": "owner/name"}, 1, "data set 'owner/name': the hub cannot be reached"),
    "no network, lens": ({"lens": "auto"}, 1, "space 'AlignmentResearch/tuned-lens': the hub cannot be reached"),
    "bad hub id": ({"model": "a/b/c"}, 2, "neither a path that exists nor a hub id"),
    "no folder": ({"model": "./nowhere"}, 2, "there is no such file or folder"),
    "missing .csv": ({"dataset": "missing.csv"}, 2, "--dataset missing.csv: there is no such file or folder"),
    "missing data set": ({"dataset": "missing.jsonl"}, 2, "--dataset missing.jsonl: there is no such file or folder"),
    "data set name": ({"dataset": "no such set"}, 2, "neither a path that exists nor a hub id"),
    "missing column": ({"dataset": "rows.jsonl"}, 2, "no column 'text'; its columns are content, id"),
    "bad split": ({"split": "test"}, 2, "--split: local files have no splits"),
    "no text": ({"dataset": "empty.txt"}, 3, "no text found"),
    "bad layers": ({"layers": "0-x"}, 2, "--layers should be block indices and ranges"),
    "layers beyond": ({"layers": "0-5"}, 2, "gpt2 has layers 0 to 2, found 5"),
    "context too long": ({"context_length": 100}, 2, "--context-length 100: gpt2 takes at most 64 tokens"),
    "no separator": ({"document_separator": "\N{SNOWMAN}", "model": "narrow"}, 2, "the tokenizer has no token for it"),
    "bad device": ({"device": "cuda:7"}, 2, "--device cuda:7 is not available"),
    "no such device": ({"device": "abacus"}, 2, "--device abacus is not available"),
    "no store": ({"out": "other"}, 3, "--out other exists, is not an activation store and will not be overwritten"),
    "a file": ({"out": "rows.jsonl"}, 3, "--out rows.jsonl exists, is not an activation store"),
    "below a file": ({"out": "rows.jsonl/acts.zarr"}, 2, "acts.zarr: a part of this path is a file"),
    "no lens": ({"lens": "./nolens"}, 2, "--lens ./nolens: there is no such folder"),
    "another lens": ({"lens": "lens"}, 3, "is for 4 layers and d_model 8, the model has 3 and 32"),
    "corrupt gguf": ({"model": "bad.gguf"}, 3, "bad.gguf: not a GGUF file"),
    "corrupt weights": ({"model": "broken"}, 3, "broken: its model cannot be loaded"),
    "no model": ({"model": "other"}, 3, "model other: the folder has no config.json"),
    "no kind of model": ({"model": "rows.jsonl"}, 3, "model rows.jsonl: not a .gguf file"),
    "no kind of text": ({"dataset": "bad.gguf"}, 3, "--dataset bad.gguf: unknown file type"),
    "a device for text": ({"dataset": "/dev/null"}, 3, "--dataset /dev/null is a pipe or device: give a file"),
    "a device for a model": ({"model": "/dev/null"}, 3, "model /dev/null: not a .gguf file"),
    "no texts": ({"dataset": "lens"}, 3, "file there"),
    "torn text": ({"dataset": "torn.jsonl"}, 3, "torn.jsonl line 1: not valid JSON"),
    "lens is a file": ({"lens": "./rows.jsonl"}, 3, "--lens ./rows.jsonl is a file: give the folder"),
    "no such lens": ({"lens": "./other"}, 3, "--lens ./other: the folder has no"),
    "number": ({"max_tokens": 0}, 2, "--max-tokens should be at least 1, found 0"),
    "workers": ({"n_workers": 10**6}, 2, "on this machine, found 1000000"),
    "no number": ({"max_tokens": "many"}, 2, "argument --max-tokens: invalid int value: 'many'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_its_exit_code(
    name: str, command: Harvest, tmp_path: Path, model_folder: ModelFolder
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"content": "a", "id": 1}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"text": "a')
    (tmp_path / "bad.gguf").write_bytes(b"rubbish")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    write_lens(tmp_path / "lens")
    for target in ("broken", "narrow"):
        shutil.copytree(model_folder("gpt2"), tmp_path / target)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"rubbish")
    narrow = tmp_path / "narrow" / "tokenizer.json"
    tokenizer = json.loads(narrow.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {k: v for k, v in vocabulary.items() if k.isascii()}
    narrow.write_text(json.dumps(tokenizer))
    before = sorted(path for path in tmp_path.rglob("*"))
    options, code, message = MISTAKES[name]
    found = command(**options)
    assert (found.code, found.stdout) == (code, "")
    assert found.error.startswith("harvest: error: ")
    assert message in found.error
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(command: Harvest, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    found = command(out="locked/acts.zarr")
    assert found.code == 1
    assert "cannot be written to" in found.error


def test_a_disk_that_fills_up_while_writing(command: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(self: Any, *args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "acts.zarr/resid_post/c.0.0.0")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationStore, "write_shard", full)
        found = command()
    assert found.code == 1
    assert "No space left on device" in found.error
    assert "continue where they stopped" in found.error
    assert command().code == 0


def test_a_column_that_is_not_there_is_found_before_the_weights_load(
    command: Harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harvest import run

    (tmp_path / "rows.jsonl").write_text('{"content": "x"}\n')
    monkeypatch.setattr(run, "load_weights", lambda *args, **options: pytest.fail("the weights are loaded"))
    for changes in ({}, {"shuffle_documents": 3}):
        found = command(dataset="rows.jsonl", **changes)
        assert found.code == 2
        assert "no column 'text'" in found.error


def test_another_configuration_is_exit_code_3(command: Harvest) -> None:
    assert command().code == 0
    found = command(max_tokens=100)
    assert found.code == 3
    assert "--max-tokens is 1000000 there and 100 here" in found.error
    assert command(max_tokens=100, overwrite=True).code == 0


def test_an_interrupt_while_tokenising_is_exit_code_130(command: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from harvest import run

    def terminated(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return run.load_weights(*args, **options)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run, "make_table", terminated)
    found = command()
    assert (found.code, found.error) == (130, "harvest: error: interrupted; run the same command to continue")
    assert not Path("acts.zarr").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_runs_as_a_module() -> None:
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "residscope", "harvest", "--help"], capture_output=True, text=True, check=True
    )
    assert "--document-separator" in done.stdout
