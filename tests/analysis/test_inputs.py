"""What was opened is what is used: files that are exchanged while an analysis runs change nothing, or stop it."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis import inputs, jobs, run
from residscope.errors import IncompatibleError
from store.activations import ActivationStore
from tests.support.small import Small, make_small, run_small, save_small
from tests.support.stores import make_store, random_activations
from train.model import MLSAE, SAEConfig, sae_hash

NUMBERS = ("variance", "reconstruction", "layers", "validation", "baseline", "provenance")


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return make_small(tmp_path)


def numbers(small: Small, out: Path, **options: Any) -> dict[str, Any]:
    summary = run_small(small, out, **{"downstream_tokens": 0, "latent_logits": False, **options})
    return {name: summary[name] for name in NUMBERS}


def replace_checkpoint(small: Small, *, same_weights: bool = False) -> None:
    config = small.weights.config
    other = MLSAE(SAEConfig(d_model=config.d_model, n_latents=config.n_latents, k=config.k - same_weights))
    other.initialize(7, torch.zeros(config.d_model))
    if same_weights:
        other.load_state_dict(small.weights.state_dict())
    save_small(small.sae, other, ActivationStore.open(small.store), {})


def exchange_store(small: Small) -> None:
    """Put another store of the same shape in its place."""
    meta = ActivationStore.open(small.store).meta
    small.store.rename(small.store.with_name("away.zarr"))
    values = random_activations(*small.x.shape, seed=5)
    changes = {name: getattr(meta, name) for name in ("layers", "n_model_layers", "stored_dtype", "chunk_tokens")}
    make_store(small.store, values, document=small.document, keep=small.keep, shard_tokens=48, **changes)


@pytest.fixture
def before_sum(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Has something done when the n-th sum over shards begins: 0 is the encoding, 1 the PCA baseline."""

    def arrange(n: int, action: Callable[[], None]) -> None:
        calls, compute = [], jobs.Threads.compute

        def first(*arguments: Any) -> Any:
            calls.append(0)
            if len(calls) == n + 1:
                action()
            return compute(*arguments)

        monkeypatch.setattr(jobs.Threads, "compute", first)

    return arrange


@pytest.mark.parametrize("n", [0, 1])
def test_threads_use_the_autoencoder_that_was_opened(small, tmp_path, before_sum, n):
    expected = numbers(small, tmp_path / "a")
    assert expected["provenance"]["sae"]["hash"] == sae_hash(small.weights)
    before_sum(n, lambda: replace_checkpoint(small))
    assert numbers(small, tmp_path / "b") == expected


@pytest.mark.parametrize("same_weights", [False, True])
def test_another_process_refuses_another_autoencoder(small, tmp_path, before_sum, monkeypatch, same_weights):
    monkeypatch.setattr(run, "opened_here", lambda *_: contextlib.nullcontext())  # as if it had opened nothing yet
    expected = numbers(small, tmp_path / "a", seed=1)
    before_sum(0, lambda: replace_checkpoint(small, same_weights=same_weights))
    with pytest.raises(
        IncompatibleError, match=r"ckpt\.pt is not the autoencoder that was opened first: its hash shou"
    ):
        numbers(small, tmp_path / "b", seed=2)
    assert not (tmp_path / "b/summary.json").exists()
    assert numbers(small, tmp_path / "c", seed=1) != expected


@pytest.mark.parametrize("n", [0, 1])
def test_another_store_is_refused(small, tmp_path, before_sum, n):
    before_sum(n, lambda: exchange_store(small))
    with pytest.raises(IncompatibleError, match=r"another (shard or )?store|replaced while it was in use"):
        numbers(small, tmp_path / "out")
    assert not (tmp_path / "out/summary.json").exists()
    shutil.rmtree(small.store)
    small.store.with_name("away.zarr").rename(small.store)
    assert numbers(small, tmp_path / "out")


def test_another_process_refuses_another_store(small, tmp_path, before_sum, monkeypatch):
    monkeypatch.setattr(run, "opened_here", lambda *_: contextlib.nullcontext())
    before_sum(0, lambda: exchange_store(small))
    with pytest.raises(IncompatibleError, match=r"acts\.zarr is not the store that was opened first: its content hash"):
        numbers(small, tmp_path / "out")


def test_nothing_of_an_analysis_is_kept_for_another(small, tmp_path):
    """A second analysis in the same process looks at its own checkpoint, whatever the first has in memory."""
    first = numbers(small, tmp_path / "a")
    replace_checkpoint(small)
    second = numbers(small, tmp_path / "b")
    assert second["variance"] != first["variance"]
    assert second["provenance"]["sae"]["hash"] == sae_hash(inputs.open_inputs(small.store, small.sae).sae)
