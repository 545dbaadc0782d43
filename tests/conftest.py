"""What tests of several packages share."""

from pathlib import Path

import pytest

from tests.support.stores import make_store, random_activations


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole store to train on, made once: 400 tokens (375 kept), 3 layers, d_model 12, chunks of 32. Only read it."""
    return make_store(tmp_path_factory.mktemp("small") / "acts.zarr", random_activations(400), chunk_tokens=32).path
