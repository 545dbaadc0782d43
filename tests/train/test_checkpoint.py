"""Checkpoints come back as they were written; damage is refused in one line, by the readers of all formats."""

import errno
import json
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from residscope.errors import IncompatibleError, UsageError
from tests.support.saes import STORE, assert_equal, make_sae, make_variant
from train.checkpoint import load_checkpoint, save_checkpoint
from train.formats.files import read_checkpoint, read_sae, write_sae, write_safetensors
from train.model import MLSAE, SAEConfig


@pytest.fixture
def sae() -> MLSAE:
    sae = MLSAE(SAEConfig(d_model=5, n_latents=12, k=3))
    sae.initialize(0, b_pre=torch.arange(5.0) / 10)
    return sae


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, make_sae(), store=STORE, trainer={"step": 3})
    return path


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(IncompatibleError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tamper(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_one_flipped_bit_in_the_weights_is_found_by_the_check_sums(checkpoint: Path, part: float) -> None:
    data = bytearray(checkpoint.read_bytes())
    data[int(len(data) * part)] ^= 4
    checkpoint.write_bytes(data)
    assert "ckpt.pt: cannot be read as plain tensors (Bad CRC-32" in refusal(lambda: load_checkpoint(checkpoint))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("to", ["pt", "safetensors", "saelens", "sparsify", "mlsae"])
def test_weights_that_are_not_finite_are_refused_in_every_format(to: Any, value: float, tmp_path: Path) -> None:
    sae = make_sae()
    if to == "saelens":  # which cannot hold another standardisation
        sae = make_sae("none")
    sae.W_dec.data[3, 1] = value
    path = tmp_path / f"ckpt.{to}"
    if to == "pt":
        save_checkpoint(path, sae, store=STORE, trainer={})
    elif to == "safetensors":
        write_safetensors(sae, path, store=STORE, trainer={})
    else:
        path = tmp_path / "folder"
        write_sae(sae, path, to)
    said = refusal(lambda: read_sae(path))
    assert f"should hold finite numbers, found {value}" in said
    assert "W_dec" in said
    assert path.name in said


def test_a_threshold_that_is_not_measured_yet_is_no_damage(tmp_path: Path) -> None:
    sae = make_variant("jumprelu")
    sae.log_threshold.data.fill_(-torch.inf)
    save_checkpoint(tmp_path / "ckpt.pt", sae, store={}, trainer={})
    assert torch.equal(load_checkpoint(tmp_path / "ckpt.pt").sae.log_threshold, sae.log_threshold)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["config"].update(n_latents=10**12), "W_enc should have shape [1000000000000, 16]"),
        (
            lambda c: c["state_dict"].update(W_enc=c["state_dict"]["W_enc"].to_sparse()),
            "more than tensors and plain values (torch._utils._rebuild_sparse_tensor)",
        ),
        (
            lambda c: c["state_dict"].update(W_enc=c["state_dict"]["W_enc"].to(torch.complex64)),
            "more than tensors and plain values (torch.ComplexFloatStorage)",
        ),
        (lambda c: c.update(store=[1]), "store and trainer should be mappings"),
        (lambda c: c["store"].update(layers="x"), "layers should be block indices, each once, found 'x'"),
        (lambda c: c["store"].update(validation=3), "validation should have a fraction"),
        (lambda c: c["store"]["validation"].update(fraction="x"), "validation should have a fraction"),
        (lambda c: c["store"]["validation"].update(fraction=float("nan")), "validation should have a fraction"),
    ],
)
def test_a_tampered_checkpoint_is_refused(checkpoint: Path, change: Callable[[Any], Any], said: str) -> None:
    tamper(checkpoint, change)
    assert said in refusal(lambda: load_checkpoint(checkpoint))


def test_an_export_whose_header_asks_for_more_memory_than_there_is_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.safetensors"
    write_safetensors(make_sae(), path, store=STORE, trainer={})
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["config"] = json.dumps({**json.loads(header["config"]), "n_latents": 10**12})
    del header["xxh3_128"]
    save_file(tensors, path, header)
    assert "ckpt.safetensors: damaged" in refusal(lambda: read_sae(path))


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt.safetensors"])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path, name: str) -> None:
    path, sae = tmp_path / name, make_sae()
    save_checkpoint(path, sae, store=STORE, trainer={}) if name == "ckpt.pt" else write_safetensors(
        sae, path, store=STORE, trainer={}
    )
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    # Anywhere, and more often in the records at the beginning and in the index at the end.
    places = [
        *rng.integers(len(data), size=60),
        *rng.integers(1500, size=60),
        *(len(data) - 1 - rng.integers(1500, size=120)),
    ]
    refused = 0
    for at in map(int, places):
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            found = read_checkpoint(path)
        except IncompatibleError:
            refused += 1
        else:
            assert_equal(found.sae, sae)
            assert found.store == STORE
    assert refused > 150


def test_an_export_from_before_there_were_check_sums_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.safetensors"
    write_safetensors(make_sae(), path, store=STORE, trainer={})
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["xxh3_128"]
    save_file(tensors, path, header)
    assert_equal(read_checkpoint(path).sae, make_sae())


def test_a_checkpoint_gives_back_what_went_in(sae: MLSAE, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, sae, store={"content_hash": "abc"}, trainer={"step": 3, "silent": torch.arange(12)})
    found = load_checkpoint(path)
    assert found.config == sae.config
    assert found.store == {"content_hash": "abc"}
    assert found.trainer["step"] == 3
    assert torch.equal(found.trainer["silent"], torch.arange(12))
    assert {tensor.data_ptr() % 64 for tensor in found.sae.state_dict().values()} == {0}  # as torch aligns its own
    x = torch.randn(4, 5)
    assert torch.equal(found.sae(x).x_hat, sae(x).x_hat)
    assert os.listdir(tmp_path) == ["ckpt.pt"]  # noqa: PTH208 (no temporary file stays)


def test_a_checkpoint_has_the_documented_layout(sae: MLSAE, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, sae, store={}, trainer={})
    content = torch.load(path, weights_only=True)
    assert set(content) == {"format", "config", "state_dict", "store", "trainer"}
    assert content["format"] == 1
    assert {k: tuple(v.shape) for k, v in content["state_dict"].items()} == {
        "W_enc": (12, 5),
        "W_dec": (12, 5),
        "b_pre": (5,),
    }


def test_a_failed_write_leaves_the_old_checkpoint(sae: MLSAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, sae, store={"turn": 1}, trainer={})

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.checkpoint.save_tensors", no_space)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, sae, store={"turn": 2}, trainer={})
    assert load_checkpoint(path).store == {"turn": 1}
    assert list(tmp_path.iterdir()) == [path]  # what was half written does not stay on a full disk


def test_a_full_disk_is_told_as_such_and_nothing_of_the_attempt_is_left(sae: MLSAE, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, sae, store={"turn": 1}, trainer={})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # torch hides what the system says of such a write
    try:
        with pytest.raises(OSError, match=r"File too large.*ckpt\.pt") as caught:
            save_checkpoint(path, sae, store={"turn": 2}, trainer={"large": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]
    assert path.read_bytes() == before


class Bomb:
    """Runs a command when a careless loader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(writer: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"format": 1, "config": Bomb(mark), "state_dict": {}}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(IncompatibleError, match=r"refused|never loaded") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_no_checkpoint() -> None:
    with pytest.raises(UsageError, match="no such checkpoint"):
        load_checkpoint(Path("nowhere.pt"))


def test_files_that_are_no_whole_checkpoint_are_refused_in_one_line(sae: MLSAE, tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, sae, store={}, trainer={})
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:1000])
    empty = tmp_path / "empty.pt"
    empty.touch()
    text = tmp_path / "text.pt"
    text.write_text("hello")
    archive = tmp_path / "archive.pt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b")
    foreign = tmp_path / "foreign.pt"
    torch.save({"weight": torch.zeros(3)}, foreign)
    for path in (cut, empty, text, archive, foreign):
        with pytest.raises(IncompatibleError) as caught:
            load_checkpoint(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_the_config_are_named(sae: MLSAE, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, sae, store={}, trainer={})
    content = torch.load(path, weights_only=True)
    content["state_dict"]["W_dec"] = torch.zeros(2, 5)
    torch.save(content, path)
    with pytest.raises(IncompatibleError, match=r"W_dec should have shape \[12, 5\].*found \[2, 5\]"):
        load_checkpoint(path)
    torch.save({**content, "format": 9}, path)
    with pytest.raises(IncompatibleError, match="checkpoint format 9"):
        load_checkpoint(path)
    torch.save({**content, "config": {"width": 5}}, path)
    with pytest.raises(IncompatibleError, match="config should have"):
        load_checkpoint(path)
