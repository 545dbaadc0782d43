"""What tests of the harvest share: configurations from flags' names, small shards, files of a folder, crashes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harvest.config import HarvestConfig
from residscope.options import from_flat
from store.activations import ActivationStore

ModelFolder = Callable[[str], Path]
MakeConfig = Callable[..., HarvestConfig]

CHUNK, SHARD = 32, 96
"""Tokens in a chunk and in a shard of the fixture `small_shards`."""


def harvest_config(**values: Any) -> HarvestConfig:
    """A configuration from values by the names of their flags."""
    return from_flat(HarvestConfig, {"model": "gpt2", "out": Path("a.zarr"), **values})


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def crash_after(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Let the n-th shard's write fail before it is committed."""
    original = ActivationStore.write_shard
    calls: list[int] = []

    def write(self: ActivationStore, shard: int, data: np.ndarray, **options: Any) -> None:
        calls.append(shard)
        if len(calls) > n:
            raise RuntimeError("crash")
        original(self, shard, data, **options)

    monkeypatch.setattr(ActivationStore, "write_shard", write)
