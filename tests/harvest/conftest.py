"""Fixtures of the harvest tests: tiny models, made once a session; no network, one thread, and a cache of the tests'
own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_model

ModelFolder = Callable[[str], Path]


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
