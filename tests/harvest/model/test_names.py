"""Names of models: what each stands for, what pins it, and what is said of one that is none."""

import json
import re
import shutil
from pathlib import Path

import pytest

from harvest.model.names import resolve_model
from residscope.errors import IncompatibleError, UsageError
from tests.support.harvesting import ModelFolder
from tests.support.models import tiny_model


def test_the_fingerprint_follows_the_weights_and_not_the_place(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder("gpt2")
    copy = tmp_path / "other"
    shutil.copytree(folder, copy)
    assert resolve_model(str(copy)).fingerprint == resolve_model(str(folder)).fingerprint
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = resolve_model(str(copy))
    assert changed.fingerprint != resolve_model(str(folder)).fingerprint
    random = resolve_model(str(copy), random_init=True)
    assert random.fingerprint == resolve_model(str(folder), random_init=True).fingerprint


def test_names_that_are_no_models(tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"")
    folder = tmp_path / "weightless"
    shutil.copytree(model_folder("gpt2"), folder)
    (folder / "model.safetensors").unlink()
    wordless = tmp_path / "wordless"
    shutil.copytree(model_folder("gpt2"), wordless, ignore=shutil.ignore_patterns("tokenizer*"))
    cases = {
        "phytia-1b": "did you mean pythia-1b",
        "./nowhere": "no such file or folder",
        "nothing.gguf": "no such file or folder",
        "empty": "no config.json",
        "model.bin": r"not a \.gguf file",
        "weightless": "no weights",
        "wordless": "no tokenizer",
        "a/b/c": "neither a path that exists nor a hub id",
    }
    for name, message in cases.items():
        kind = IncompatibleError if Path(name).exists() else UsageError
        with pytest.raises(kind, match=message):
            resolve_model(name)
    with pytest.raises(UsageError, match="the name is empty"):  # and not the working folder
        resolve_model("")
    with pytest.raises(UsageError, match="has no revisions"):
        resolve_model("weightless", revision="main")


def test_every_file_that_may_be_read_counts(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("gpt2"), tmp_path / "copy"))
    before = resolve_model(str(folder)).fingerprint
    read = (
        "generation_config.json",
        "tekken.json",
        "chat_template.jinja",
        "added_tokens.json",
        "vocab.txt",
        "modeling.py",
    )
    for name in (*read, "model.safetensors.index.json", "preprocessor_config.json", "tokenizer.model.v3", "unheard.of"):
        was = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(b"{} ")
        assert resolve_model(str(folder)).fingerprint != before, name
        (folder / name).unlink()
        if was is not None:
            (folder / name).write_bytes(was)
    for name in (
        "README.md",
        "LICENSE",
        "train.log",
        "loss.png",
        "optimizer.pt",
        "pytorch_model.bin",
        ".hidden",
        "a.jsonl",
        *("acts.harvest.toml", "ckpt.config.toml", "ckpt.safetensors", "summary.json", "report.html"),  # our own
    ):
        (folder / name).write_bytes(b"{}")
    (folder / "checkpoint-1").mkdir()
    assert resolve_model(str(folder)).fingerprint == before
    (folder / "model.safetensors").unlink()  # Now the other format is what is read.
    assert resolve_model(str(folder)).fingerprint != before


def test_weights_that_do_not_count_for_the_hash_are_not_loaded(tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "sub").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "sub/x.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "x.pt")
    before = resolve_model(str(folder)).fingerprint
    shutil.copy(folder / "model.safetensors", folder / "ckpt.safetensors")
    for name in ("ckpt", "model"):  # as `train` leaves them
        (folder / f"{name}.config.toml").touch()
    assert resolve_model(str(folder)).fingerprint == before
    for name in ("sub/x.safetensors", "../x.safetensors", "x.pt", "ckpt.safetensors"):
        index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(IncompatibleError, match=f"its files say that weights are in {re.escape(name)}"):
            resolve_model(str(folder))
    (folder / "model.safetensors.index.json").write_text("{")
    for name in ("sub/x.safetensors", "x.pt"):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        with pytest.raises(IncompatibleError, match=f"its files say that weights are in {re.escape(name)}"):
            resolve_model(str(folder))


def test_safetensors_of_something_else_do_not_hide_the_weights(tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "sae.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"one")
    before = resolve_model(str(folder)).fingerprint
    (folder / "pytorch_model.bin").write_bytes(b"two")
    assert resolve_model(str(folder)).fingerprint != before
