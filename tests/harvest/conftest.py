"""Fixtures and helpers of the harvest tests: tiny models, made once a session, small texts, small shards, crashes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from harvest import run
from harvest.config import HarvestConfig
from store.activations import ActivationStore
from tests.support.models import tiny_model

# A machine that is busy makes an example slow, not wrong.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

ModelFolder = Callable[[str], Path]
MakeConfig = Callable[..., HarvestConfig]

CHUNK, SHARD = 32, 96
"""Tokens in a chunk and in a shard of `small_shards`."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The folder of a tiny model of an architecture; the same one at each call."""
    root = tmp_path_factory.mktemp("models")
    return lambda architecture: tiny_model(architecture, root / architecture)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """Five .txt documents of different lengths, one of them empty; 1 byte is 1 token of the tiny tokenizers."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, length in enumerate((150, 40, 0, 333, 64)):
        (folder / f"{i}.txt").write_text("".join(chr(97 + (i * 7 + j * j) % 26) for j in range(length)))
    return folder


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 96 tokens, so that a small text fills several, none of them aligned to sequences."""
    monkeypatch.setattr(run, "chunk_and_shard_tokens", lambda *sizes: (CHUNK, SHARD))


@pytest.fixture
def config(tmp_path: Path, model_folder: ModelFolder, text_folder: Path) -> MakeConfig:
    """Makes configurations: 20-token sequences, 3 in a batch, 591 tokens of text and separators."""

    def make(architecture: str = "gpt2", **changes: Any) -> HarvestConfig:
        return HarvestConfig(
            **{
                "model": str(model_folder(architecture)),
                "out": tmp_path / "acts.zarr",
                "dataset": str(text_folder),
                "context_length": 20,
                "batch_size": 3,
                **changes,
            }
        )

    return make


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def crash_after(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Let the n-th shard's write fail before it is committed."""
    original = ActivationStore.write_shard
    calls: list[int] = []

    def write(self: ActivationStore, shard: int, data: np.ndarray, keep: np.ndarray) -> None:
        calls.append(shard)
        if len(calls) > n:
            raise RuntimeError("crash")
        original(self, shard, data, keep)

    monkeypatch.setattr(ActivationStore, "write_shard", write)
