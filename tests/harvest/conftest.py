"""Fixtures of the harvest tests: tiny models, made once a session, small texts, small shards."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harvest.config import HarvestConfig
from harvest.model import hub
from tests.support.harvesting import CHUNK, SHARD, MakeConfig, ModelFolder, harvest_config
from tests.support.models import tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings that are given once in a process are given once in a test."""
    monkeypatch.setattr(hub, "_said", set())


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
    monkeypatch.setattr("harvest.settings.chunk_and_shard_tokens", lambda *sizes: (CHUNK, SHARD))


@pytest.fixture
def config(tmp_path: Path, model_folder: ModelFolder, text_folder: Path) -> MakeConfig:
    """Makes configurations: 20-token sequences, 3 in a batch, 591 tokens of text and separators."""

    def make(architecture: str = "gpt2", **changes: Any) -> HarvestConfig:
        return harvest_config(
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
