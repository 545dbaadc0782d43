"""Damaged and tampered weights are refused in one line by every reader, whatever the damage is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from residscope.errors import IncompatibleError
from tests.support.saes import STORE, assert_equal, make_sae, make_variant
from train.checkpoint import load_checkpoint, save_checkpoint
from train.formats.files import read_checkpoint, read_sae, write_sae, write_safetensors


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
    assert "ckpt.pt: not a readable checkpoint" in refusal(lambda: load_checkpoint(checkpoint))


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
        (lambda c: c["config"].update(n_latents=10**12), "W_enc should be [1000000000000, 16]"),
        (
            lambda c: c["state_dict"].update(W_enc=c["state_dict"]["W_enc"].to_sparse()),
            "W_enc should hold dense floats",
        ),
        (lambda c: c["state_dict"].update(W_enc=c["state_dict"]["W_enc"].to(torch.complex64)), "found complex64"),
        (lambda c: c.update(store=[1]), "store and trainer should be mappings"),
        (lambda c: c["store"].update(layers="x"), "layers should be integers, found 'x'"),
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
