"""Defaults that depend on the model and the device; a model that is spread over several."""

import gc
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.integrations.accelerate as spreading
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from harvest.run import harvest
from harvest.settings import default_batch_size, load_weights, resolve
from residscope.errors import ResidscopeError, UsageError
from store.activations import ActivationStore
from tests.support.harvesting import MakeConfig
from tests.support.models import ARCHITECTURES, tiny_config, tiny_model


def test_the_default_batch_keeps_within_its_bounds() -> None:
    assert default_batch_size(2048, 34_560, "cuda") == 3  # SmolLM2-135M: 256 MiB
    assert default_batch_size(2048, 6_144, "cuda") == 4  # pythia-70m: 8192 tokens
    assert default_batch_size(131_072, 10**6, "cuda") == 1
    assert default_batch_size(256, 6_144, "cpu") == 4
    assert default_batch_size(2048, 6_144, "cpu") == 1
    assert default_batch_size(2048, 34_560, "cuda", "50GB") == 2
    assert default_batch_size(128, 4_608, "cpu", "256MB") == 4  # 6 are a 64th of it


def leave_memory(n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU that has so much memory."""
    if hasattr(spreading, "accelerate_max_memory"):
        monkeypatch.setattr(spreading, "accelerate_max_memory", lambda given: {"cpu": n_bytes})
    else:  # transformers before 5
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=n_bytes))


def experts(folder: Path) -> Path:
    """A model with experts, whose files have another layout than its tensors."""
    shutil.copytree(tiny_model("llama", folder / "llama"), folder / "experts")
    config = MixtralConfig(**tiny_config("llama").to_diff_dict() | {"num_local_experts": 2, "model_type": "mixtral"})
    MixtralForCausalLM(config).save_pretrained(folder / "experts")
    return folder / "experts"


def pickled(folder: Path) -> Path:
    """A model whose weights are in no safetensors file."""
    shutil.copytree(tiny_model("llama", folder / "llama"), folder / "pickled")
    weights = folder / "pickled" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    return folder / "pickled"


@pytest.mark.parametrize("make", [experts, pickled])
def test_weights_that_must_be_laid_out_anew_are_spread_and_leave_nothing(
    make: Callable[[Path], Path], config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": str(make(tmp_path)), "max_tokens": 120}
    whole = harvest(config(**options, out=tmp_path / "whole.zarr")).content_hash
    (tmp_path / "left").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "left"))
    leave_memory(20_000, monkeypatch)
    assert harvest(config(**options, device_map="auto")).content_hash == whole
    gc.collect()
    assert not [*(tmp_path / "left").iterdir()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_larger_than_the_memory_is_spread_and_gives_the_same_vectors(
    architecture: str, config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = harvest(config(architecture, max_tokens=120, out=tmp_path / "whole.zarr")).content_hash
    embedding = load_weights(resolve(config(architecture))).base.get_input_embeddings().weight
    # There is one device here, so that what does not fit lies on the disk.
    leave_memory(embedding.nbytes // 2, monkeypatch)
    model = load_weights(resolve(config(architecture, device_map="auto")))
    assert any(weight.is_meta for weight in model.blocks.parameters())
    assert harvest(config(architecture, max_tokens=120, device_map="auto")).content_hash == whole
    assert ActivationStore.open(tmp_path / "acts.zarr").content_hash == whole


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"n_workers": 2}, "--device-map spreads one model over all GPUs: leave --n-workers and --scheduler out"),
        ({"random_init": True}, "--device-map takes weights as they are in files, not random weights"),
    ],
)
def test_what_is_not_spread_is_said(flags: dict[str, Any], said: str, config: MakeConfig) -> None:
    with pytest.raises(UsageError, match=said):
        resolve(config(device_map="auto", **flags))


def test_spreading_needs_accelerate(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResidscopeError, match="needs accelerate: pip install accelerate"):
        resolve(config(device_map="auto"))
