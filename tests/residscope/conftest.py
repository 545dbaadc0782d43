"""A small store for the commands that look at one."""

from pathlib import Path

import pytest

from tests.support.stores import make_store, random_activations


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """60 tokens at layers 3 and 5 of a model, in two shards."""
    store = make_store(
        tmp_path / "a.zarr",
        random_activations(60, 2, 4),
        chunk_tokens=16,
        shard_tokens=32,
        layers=(3, 5),
        provenance={"model": "some/model"},
    )
    return store.path
