"""What two processes train, once for all tests of this folder."""

from pathlib import Path
from typing import Any

import pytest

from residscope.options import with_values
from tests.support.ranks import in_ranks
from tests.support.training import StopAt, train_config
from train.config import TrainConfig
from train.run import train


@pytest.fixture(scope="session")
def base(store: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """17 steps, in which latents die; 41 latents, which two do not share evenly."""
    flags: dict[str, Any] = {"n_latents": 41, "k": 4, "batch_size": 64, "dead_tokens": 20, "dtype": "float32"}
    flags |= {"window_gb": 1e-5, "log_every": 4, "threads": 1, "kernels": "torch", "lr": 0.002, "encoder_scale": 1.0}
    return train_config(store=store, out=tmp_path_factory.mktemp("one") / "ckpt.pt", **flags)


@pytest.fixture(scope="session")
def two(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes trained, in a folder, and what each of them says."""
    folder = tmp_path_factory.mktemp("two")
    stopped = with_values(base, out=folder / "to-two.pt", steps=17)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.stop_on_signals", lambda: StopAt(8))
        with pytest.raises(BaseException, match="stopped after step 8"):
            train(stopped)
    return folder, in_ranks(2, "everything", folder / "work", with_values(base, steps=17), folder)
