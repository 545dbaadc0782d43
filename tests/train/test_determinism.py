"""A resume in other surroundings continues, and says in one line what changed."""

from pathlib import Path

import pytest
import torch

from residscope.options import with_values
from tests.support.stores import make_store, random_activations
from tests.support.training import train_config
from train.determinism import differences, surroundings
from train.run import train
from train.trainer import Trainer


def test_only_what_changed_is_said() -> None:
    before = {"residscope": "0.1", "torch": "2", "numba": "1"}
    assert differences(before, before) is None
    assert differences({}, before) is None  # a checkpoint from before they were kept
    now = {"residscope": "0.2", "torch": "2", "cpu": "AVX2"}
    assert differences(before, now) == "residscope 0.1 -> 0.2, numba 1 -> none, cpu none -> AVX2"


def test_a_resume_warns_in_one_line_and_ends_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "acts.zarr", random_activations(n_tokens=200), chunk_tokens=32)
    config = train_config(
        store=tmp_path / "acts.zarr", out=tmp_path / "ckpt.pt", n_latents=24, k=3, batch_size=64, validation_fraction=0
    )
    config = with_values(config, checkpoint_every=2, threads=1)
    train(with_values(config, out=tmp_path / "whole.pt"))
    save = Trainer.save

    def then_stop(self: Trainer, *, finished: bool) -> None:
        save(self, finished=finished)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    saved = torch.load(config.out, weights_only=True)
    now = saved["trainer"]["surroundings"]
    assert {"residscope", "torch", "cpu"} <= set(now)
    for before in (now, None, {**now, "torch": "1.0", "cpu": "another"}):
        trainer = {**saved["trainer"], "surroundings": before}
        if before is None:
            del trainer["surroundings"]
        torch.save({**saved, "trainer": trainer}, config.out)
        train(with_values(config, resume=True))
        warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        if before in (now, None):
            assert warnings == []
        else:
            (line,) = warnings
            assert (
                f"torch 1.0 -> {now['torch']}, cpu another -> {now['cpu']}: the result will not be bit for bit" in line
            )
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "ckpt"))
    assert all(torch.equal(tensor, resumed["state_dict"][name]) for name, tensor in whole["state_dict"].items())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_multiplied_beside_the_screen_is_kept(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.determinism.dense_dtype", lambda dtype: torch.bfloat16)
    found = surroundings("cpu", "torch", dtype)
    assert found.get("products beside the screen") == (None if dtype == "float32" else "bfloat16")
