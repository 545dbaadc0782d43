"""A tiny store, and a short run over it."""

from pathlib import Path

import pytest

from tests.support.stores import make_store, random_activations
from tests.support.training import train_config
from train.config import TrainConfig


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 tokens in 25 documents, three layers of 12 dimensions."""
    path = tmp_path_factory.mktemp("data") / "acts.zarr"
    make_store(path, random_activations(n_tokens=400), chunk_tokens=32)
    return path


@pytest.fixture
def config(store: Path, tmp_path: Path) -> TrainConfig:
    """17 steps: one epoch of 1,080 vectors."""
    return train_config(
        store=store,
        out=tmp_path / "ckpt.pt",
        n_latents=40,
        k=4,
        batch_size=64,
        dead_tokens=20,
        window_gb=1e-5,
        log_every=4,
        threads=1,
        kernels="torch",
    )
