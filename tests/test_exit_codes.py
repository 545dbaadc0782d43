"""docs/command-line.md's rule for exit codes: 2 for what was typed, 3 for what was given and cannot be used."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_model
from tests.support.stores import make_store, random_activations

READERS = {
    "info": ("residscope.cli", "info STORE"),
    "harvest": ("harvest.cli", "--model model --dataset 0.txt --context-length 32 --out STORE"),
    "fit-lens": ("harvest.lens.cli", "--model model --store STORE --out lens"),
    "train": ("train.cli", "--store STORE --n-latents 40 --k 4 --out new.pt --kernels torch"),
    "dry-run": ("train.cli", "--store STORE --n-latents 40 --k 4 --out new.pt --kernels torch --dry-run"),
    "compare": ("train.cli", "compare --store STORE --sae ckpt.pt --out comparison"),
    "analyze": ("analysis.cli", "--store STORE --sae ckpt.pt --no-report --out out"),
}
"""Every command that opens a store."""

Run = Callable[[str, str], tuple[int, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, a store of 3 layers and d_model 12, and an autoencoder trained on it."""
    root = tmp_path_factory.mktemp("codes")
    tiny_model("gpt2", root / "model")
    (root / "0.txt").write_text("a text " * 40)
    make_store(root / "acts.zarr", random_activations(n_tokens=200))
    words = f"--store {root}/acts.zarr --n-latents 40 --k 4 --out {root}/ckpt.pt --kernels torch --batch-size 64"
    assert importlib.import_module("train.cli").main(words.split()) == 0
    return root


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code and last line of stderr of a command in that folder."""
    monkeypatch.chdir(folder)
    capsys.readouterr()

    def command(module: str, words: str) -> tuple[int, str]:
        try:
            code = importlib.import_module(module).main(words.split())
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        lines = capsys.readouterr().err.splitlines()
        return code, lines[-1] if lines else ""

    return command


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_a_store_that_is_damaged_or_none_is_3_and_one_that_is_not_there_2(name: str, run: Run, folder: Path) -> None:
    module, words = READERS[name]
    make_store(folder / f"{name}.zarr", random_activations(n_tokens=200))
    flip(folder / f"{name}.zarr" / "manifest/0.jsonl", 5)  # every reader looks at it
    code, line = run(module, words.replace("STORE", f"{name}.zarr"))
    assert (code, "is damaged" in line) == (3, True), line
    code, line = run(module, words.replace("STORE", "model"))
    assert (code, "activation store" in line) == (3, True), line
    if name != "harvest":  # which makes one there
        code, line = run(module, words.replace("STORE", "nowhere.zarr"))
        assert (code, "no such file or folder" in line) == (2, True), line


@pytest.mark.parametrize("name", ["train", "analyze"])
def test_a_chunk_with_a_flipped_bit_is_3(name: str, run: Run, folder: Path) -> None:
    module, words = READERS[name]
    make_store(folder / f"{name}-chunk.zarr", random_activations(n_tokens=200))
    flip(folder / f"{name}-chunk.zarr" / "resid_post/c.0.0.0", 100)
    code, line = run(module, words.replace("STORE", f"{name}-chunk.zarr"))
    assert (code, "checksum of token chunk 0" in line) == (3, True), line


def test_other_inputs_that_are_damaged_or_no_such_thing_are_3(run: Run, folder: Path) -> None:
    (folder / "bad.pt").write_bytes((folder / "ckpt.pt").read_bytes()[:1000])
    (folder / "bad-lens").mkdir()
    (folder / "bad-lens" / "config.json").write_text('{"num_hidden_layers": 3, "d_model": 32}')
    (folder / "bad-lens" / "params.pt").write_bytes(b"rubbish")
    (folder / "bad-model").mkdir()
    for file in (folder / "model").iterdir():
        (folder / "bad-model" / file.name).write_bytes(file.read_bytes())
    (folder / "bad-model" / "model.safetensors").write_bytes(b"rubbish")
    (folder / "bad.jsonl").write_text("{")
    (folder / "analysis").mkdir()
    (folder / "analysis" / "summary.json").write_text("{")
    torch.save({"some": "thing"}, folder / "thing.pt")
    harvest = "--model model --dataset 0.txt --context-length 32 --out new.zarr"
    for module, words in (
        ("analysis.cli", "--store acts.zarr --sae bad.pt"),
        ("analysis.cli", "--store acts.zarr --sae thing.pt"),
        ("analysis.cli", "--compare analysis --out compared"),
        ("train.cli", "compare --store acts.zarr --sae bad.pt"),
        ("train.cli", "--store acts.zarr --out bad.pt --resume --kernels torch"),
        ("train.formats.cli", "bad.pt converted --to mlsae"),
        ("harvest.cli", harvest.replace("--model model", "--model bad-model")),
        ("harvest.cli", harvest.replace("--model model", "--model analysis")),
        ("harvest.cli", harvest.replace("0.txt", "bad.jsonl")),
        ("harvest.cli", f"{harvest} --lens ./bad-lens"),
        ("harvest.cli", f"{harvest} --lens ./analysis"),
    ):
        code, line = run(module, words)
        assert (code, "error: " in line) == (3, True), (words, line)
    assert not (folder / "new.zarr").exists()


def test_what_is_not_there_is_2(run: Run) -> None:
    harvest = "--model model --dataset 0.txt --context-length 32 --out new.zarr"
    for module, words in (
        ("analysis.cli", "--store acts.zarr --sae ./none.pt"),
        ("analysis.cli", "--compare none"),
        ("train.cli", "compare --store acts.zarr --sae none.pt"),
        ("train.formats.cli", "./none.pt converted --to mlsae"),
        ("harvest.cli", harvest.replace("--model model", "--model ./none")),
        ("harvest.cli", harvest.replace("0.txt", "none.txt")),
        ("harvest.cli", harvest.replace("0.txt", "none*")),
        ("harvest.cli", f"{harvest} --lens ./none"),
    ):
        assert run(module, words)[0] == 2, words
