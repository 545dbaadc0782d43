"""Whole runs on tiny stores: what they write, what they refuse, and that a broken run ends as an unbroken one."""

import errno
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from residscope.errors import IncompatibleError, Interrupted, ResidscopeError, UsageError
from residscope.options import with_values
from store.shards import ShardReader
from tests.support.stores import make_store, random_activations
from tests.support.training import StopAt, metrics_lines, timeless, train_config
from train import run as loop
from train import trainer
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.data import Vectors
from train.model import MLSAE, sae_hash
from train.reporting.report import describe
from train.resolve import RunPlan
from train.run import train, train_all
from train.trainer import Trainer
from train.validation import ValidationData


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    """34 steps: two epochs, and batches that run over their border."""
    return with_values(config, epochs=2)


def test_a_run_learns_and_leaves_what_others_read(config: TrainConfig) -> None:
    result = train(config)
    assert result.validation is not None
    assert result.validation.fvu < 0.8
    saved = load_checkpoint(config.out)
    assert saved.trainer["step"] == result.plan.steps == 34
    assert saved.trainer["finished"] is True
    assert "optimizer" not in saved.trainer
    assert saved.store["path"] == "acts.zarr"
    assert saved.store["layers"] == [0, 1, 2]
    assert saved.store["validation"] == {"fraction": 0.05, "seed": 0, "n_documents": 25}
    assert len(saved.store["content_hash"]) == 32
    lines = metrics_lines(config.out)
    training = [line for line in lines if "split" not in line]
    assert [line["step"] for line in training] == [*range(4, 33, 4), 34]
    assert set(training[0]) == {
        *("step", "vectors", "tokens", "epoch", "loss", "fvu", "fvu_per_layer", "l0", "auxk", "dead_fraction", "lr"),
        *("vectors_per_second", "data_wait_fraction"),
    }
    assert training[-1]["vectors"] == result.plan.vectors == 2 * result.plan.vectors_per_epoch
    assert training[-1]["tokens"] == training[-1]["vectors"] // 3
    assert training[-1]["epoch"] == 2.0
    validations = [line for line in lines if line.get("split") == "validation"]
    assert [line["step"] for line in validations] == [9, 18, 27, 34]
    assert len(validations[-1]["fvu_per_layer"]) == 3
    assert tomllib.loads(config.out.with_name("ckpt.config.toml").read_text())["k"] == 4


def test_a_disk_that_is_full_at_the_start_stops_nothing_for_good(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, _: memoryview, path: Path) -> None:
        os.write(descriptor, b"k = ")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("store.files.write_all", full)
        with pytest.raises(OSError, match=r"No space left on device: .*ckpt\.config\.toml"):
            train(config)
    train(config)
    first = config.out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("store.files.write_all", full)
        with pytest.raises(OSError, match="No space left"):
            train(with_values(config, overwrite=True))
    assert config.out.read_bytes() == first


@pytest.mark.parametrize("changes", [{}, {"loss_space": "raw"}, {"aux_coef": 0.0}, {"layers": (2, 0)}])
def test_the_decoder_has_unit_norm_in_every_checkpoint(
    config: TrainConfig, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistake 3: saved and evaluated weights that are off-norm."""
    save, seen = trainer.save_checkpoint, []

    def check(path: Path, sae: MLSAE, **rest: Any) -> None:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40), rtol=0, atol=1e-6)
        seen.append(rest["trainer"]["step"])
        save(path, sae, **rest)

    monkeypatch.setattr(trainer, "save_checkpoint", check)
    train(with_values(config, checkpoint_every=5, **changes))
    assert seen[:3] == [5, 10, 15]
    saved = load_checkpoint(config.out)
    torch.testing.assert_close(saved.sae.W_dec.norm(dim=1), torch.ones(40), rtol=0, atol=1e-6)


def test_a_run_is_a_function_of_its_seed(config: TrainConfig) -> None:
    train(config)
    first = config.out.read_bytes()
    train(with_values(config, overwrite=True))
    assert config.out.read_bytes() == first
    train(with_values(config, overwrite=True, seed=1))
    assert config.out.read_bytes() != first


def test_starting_anew_leaves_nothing_of_the_run_before(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped before its first checkpoint must not leave the old weights beside the new flags."""
    train(config)
    beside = [config.out.with_name(name) for name in ("ckpt.pt", "ckpt.safetensors", "ckpt.loss.png")]
    assert all(path.exists() for path in beside)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take", killed)
        with pytest.raises(KeyboardInterrupt):
            train(with_values(config, overwrite=True, seed=1))
    assert not any(path.exists() for path in beside)
    train(with_values(config, resume=True, seed=1))
    assert load_checkpoint(config.out).trainer["config"]["seed"] == 1


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = {"lr": 1e30, "warmup_fraction": 0.0, "loss_space": "raw", "checkpoint_every": 0}
    with pytest.raises(
        ResidscopeError, match=r"step \d+ of 34: diverged, the loss or a weight is NaN or infinite: lower --lr, or set"
    ) as caught:
        train(with_values(config, **diverging))
    assert "\n" not in str(caught.value)
    assert not config.out.exists()
    text = config.out.with_name("ckpt.metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    results = train_all(with_values(config, sweep=("lr=0.001,1e30",)))  # the others of a sweep go on
    assert results[0].metrics["fvu"] < 1
    assert "lr=1e+30" in capsys.readouterr().err


def test_a_run_whose_weights_alone_are_nan_has_diverged(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """A JumpReLU threshold that becomes NaN silences its latent, and the loss stays a number."""
    of_jumprelu = with_values(config, activation="jumprelu", recipe="gao", lr=1e3, warmup_fraction=0.0)
    with pytest.raises(ResidscopeError, match=r"step \d+ of 34: diverged, the loss or a weight is NaN or infinite"):
        train(of_jumprelu)
    results = train_all(with_values(of_jumprelu, sweep=("lr=0.001,1e3",)))
    assert [result.diverged for result in results] == [False, True]


def test_a_rate_that_is_far_too_high_is_to_be_lowered_and_a_short_run_lengthened(config: TrainConfig) -> None:
    for lr, words in (
        (1e3, "times the default rate: lower --lr 1e+03"),
        (1e-30, "with a higher --lr than 1e-30, which is "),
    ):
        result = train(with_values(config, lr=lr, encoder_scale=0.1, overwrite=True))
        assert result.validation is not None
        assert result.validation.fvu > 1
        assert words in describe(result)


def test_validation_and_logging_do_not_touch_the_run(config: TrainConfig) -> None:
    """Mistake 1: dead counters that tick in evaluation. Validating more often changes neither weights nor counters."""
    ends = []
    for validate_every, log_every in ((0, 100), (1, 3)):
        train(with_values(config, validate_every=validate_every, log_every=log_every, overwrite=True))
        ends.append(load_checkpoint(config.out))
    assert torch.equal(ends[0].trainer["silent"], ends[1].trainer["silent"])
    for ours, theirs in zip(ends[0].sae.parameters(), ends[1].sae.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("loss_space", ["standardized", "raw"])
def test_a_run_stopped_again_and_again_ends_with_the_same_bytes(
    config: TrainConfig, loss_space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistake 12: a resume that repeats or skips data. Checkpoint and metrics are those of the unbroken run."""
    config = with_values(config, loss_space=loss_space)  # type: ignore[arg-type]
    train(config)
    whole, lines = config.out.read_bytes(), timeless(metrics_lines(config.out))
    config.out.unlink()
    for steps in (3, 7, 9, 1, 6):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "stop_on_signals", lambda steps=steps: StopAt(steps))
            with pytest.raises(Interrupted, match="same command and --resume"):
                train(with_values(config, resume=True))
        assert load_checkpoint(config.out).trainer["finished"] is False
    train(with_values(config, resume=True))
    assert config.out.read_bytes() == whole
    assert timeless(metrics_lines(config.out)) == lines


def test_resuming_a_finished_run_changes_nothing(config: TrainConfig) -> None:
    result = train(config)
    before = config.out.read_bytes()
    again = train(with_values(config, resume=True))
    assert config.out.read_bytes() == before
    assert again.validation == result.validation
    assert again.metrics == result.metrics


def test_a_finished_run_goes_on_from_its_weights_when_it_is_lengthened(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate rises and falls again over the new steps; stopped on the way, it ends with the same bytes."""
    short = train(config)
    before, files = config.out.read_bytes(), [config.out, config.out.with_suffix(".metrics.jsonl")]
    lines = files[1].read_bytes()
    longer = with_values(config, epochs=4, resume=True)
    result = train(longer)
    assert result.metrics["step"] == result.plan.steps == 68
    assert result.metrics["fvu"] < short.metrics["fvu"]
    rates = {line["step"]: line["lr"] for line in metrics_lines(config.out) if "lr" in line}
    assert rates[34] < rates[40] == result.plan.chosen.lr > rates[68]
    whole = config.out.read_bytes()
    for file, content in zip(files, (before, lines), strict=True):
        file.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_on_signals", lambda: StopAt(7))
        with pytest.raises(Interrupted, match="stopped after step 41 of 68"):
            train(longer)
    train(longer)
    assert config.out.read_bytes() == whole
    assert "rises again first" not in capsys.readouterr().err
    train(with_values(config, epochs=5, resume=True))
    assert "from 68 to 85 steps: the learning rate rises again first, and FVU may" in capsys.readouterr().err
    with pytest.raises(IncompatibleError, match="steps was 85"):
        train(with_values(config, epochs=2, resume=True))


def test_a_run_may_start_from_anothers_weights(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    first = load_checkpoint(config.out)
    other = with_values(config, out=tmp_path / "other.pt", start_from=config.out, k=3, epochs=None, steps=1, lr=1e-30)
    train(other)
    second = load_checkpoint(other.out)
    torch.testing.assert_close(second.sae.W_enc, first.sae.W_enc)
    torch.testing.assert_close(second.sae.W_dec, first.sae.W_dec)
    assert second.trainer["started_from"] == {"name": str(config.out), "hash": sae_hash(first.sae)}
    before = other.out.read_bytes()
    for wrong, words in (
        ({"n_latents": 50, "expansion_factor": None}, "ckpt.pt: n_latents is 40 there and 50 here"),
        ({"start_from": other.out}, "would be replaced by the run's own checkpoint"),
        ({"start_from": tmp_path / "none.pt"}, "none.pt: no such file or folder"),
        (
            {"validation_seed": 1},
            "was trained on documents that are held out here: give --validation-fraction 0.05 --validation-seed 0",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            train(with_values(other, overwrite=True, **wrong))
        assert other.out.read_bytes() == before
    smaller = with_values(other, validation_fraction=0.01, overwrite=True)  # part of what was held out
    train(smaller)
    with pytest.raises(UsageError, match=r"held out here: give --validation-fraction 0.01 --validation-seed 0"):
        train(with_values(other, out=tmp_path / "third.pt", start_from=other.out))
    loop.try_run(with_values(smaller, overwrite=False, resume=True, validation_fraction=0.01))
    train(with_values(other, overwrite=True))
    assert train(with_values(other, start_from=None, resume=True)).plan.config.start_from == config.out
    with pytest.raises(IncompatibleError, match="start_from was"):
        train(with_values(other, start_from=other.out, resume=True))


def test_what_is_no_checkpoint_is_not_overwritten(config: TrainConfig) -> None:
    config.out.write_text("a text")
    for flag in ("overwrite", "resume"):
        with pytest.raises(UsageError, match="exists but is not a checkpoint"):
            train(with_values(config, **{flag: True}))
    assert config.out.read_text() == "a text"
    config.out.write_bytes(b"PK cut short")
    train(with_values(config, overwrite=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": 41}, UsageError, "k is 41, but there are only 40 latents"),
        ({"store": Path("nowhere.zarr")}, UsageError, "nowhere.zarr: there is no such file or folder"),
        ({"layers": (1, 7)}, UsageError, "does not have layer 7, only 0 1 2"),
        ({"device": "gpu"}, UsageError, "no such kind of device"),
        ({"device": "cuda:99"}, UsageError, "CUDA devices"),
        ({"out": Path()}, UsageError, "is a folder"),
        ({"out": Path("ckpt.safetensors")}, UsageError, r"name the checkpoint, such as ckpt\.pt"),
        ({"out": Path("/dev/null"), "overwrite": True}, UsageError, "is not a regular file"),
        ({"n_latents": 10**11}, ResidscopeError, "needs about .* are free: lower"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    config: TrainConfig, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        train(with_values(config, **changes))
    assert "\n" not in str(caught.value)
    assert not config.out.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"k": 0},
        {"lr": -1.0},
        {"steps": 5, "epochs": 1},
        {"resume": True, "overwrite": True},
        {"validation_fraction": 1.0},
        {"warmup_fraction": 1.5},
        {"layers": (1, 1)},
        {"expansion_factor": float("nan")},
        {"expansion_factor": float("inf")},
        {"window_gb": float("inf")},
        {"sparsity_coef": float("inf")},
        {"seed": 2**70},
    ],
)
def test_flags_that_make_no_sense_are_refused(store: Path, changes: dict) -> None:
    with pytest.raises(UsageError):
        train_config(store=store, **changes)


def test_an_incomplete_store_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "part.zarr"
    make_store(path, random_activations(n_tokens=400), chunk_tokens=32, shard_tokens=64)
    manifest = path / "manifest" / "0.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:-1]))
    with pytest.raises(IncompatibleError, match="shards are missing"):
        train(with_values(config, store=path))


def test_too_little_text_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    nothing = np.zeros(40, bool)
    make_store(tmp_path / "none.zarr", random_activations(n_tokens=40), keep=nothing)
    with pytest.raises(IncompatibleError, match="leaves no token to train on"):
        train(with_values(config, store=tmp_path / "none.zarr"))
    one = nothing.copy()
    one[3] = True
    make_store(tmp_path / "one.zarr", random_activations(n_tokens=40), keep=one)
    with pytest.raises(IncompatibleError, match="training vectors are all equal"):
        train(with_values(config, store=tmp_path / "one.zarr", validation_fraction=0.0))


def test_without_held_out_documents_there_is_no_validation(config: TrainConfig) -> None:
    result = train(with_values(config, validation_fraction=0.0))
    assert result.validation is None
    assert not [line for line in metrics_lines(config.out) if "split" in line]


def test_auxk_brings_planted_dead_latents_back(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the encoder starts pointing away from the data: without AuxK those latents never fire."""
    initialize = MLSAE.initialize

    def plant(sae: MLSAE, seed: int, b_pre: torch.Tensor | None = None, **scale: float) -> None:
        initialize(sae, seed, b_pre, **scale)
        sae.W_enc.data[20:] *= 0.02  # never among the four largest

    monkeypatch.setattr(MLSAE, "initialize", plant)
    dead = {}
    for coefficient in (0.0, 1 / 32):
        run = with_values(config, aux_coef=coefficient, aux_k=20, epochs=8, lr=3e-3, encoder_lr=1.0, overwrite=True)
        dead[coefficient] = train(run).metrics["dead_fraction"]
    assert dead[0.0] > 0.4
    assert dead[1 / 32] < 0.2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named_before_the_training(
    config: TrainConfig, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardReader, "require_own", lambda *args: None)  # as if they had been harvested so
    path = tmp_path / "bad.zarr"
    make_store(path, random_activations(n_tokens=400), stored_dtype="float32")
    zarr.open_group(str(path))["resid_post"][40:360, 1, 3] = value  # type: ignore[index]
    with pytest.raises(ResidscopeError, match="layer 1: the store contains NaN or infinite values"):
        train(with_values(config, store=path))
    assert not config.out.exists()


@pytest.mark.parametrize("nth", [1, 3, 4])
def test_a_validation_that_was_cut_short_is_made_up_for(
    config: TrainConfig, tmp_path: Path, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(with_values(config, out=tmp_path / "whole.pt"))
    evaluate, calls = ValidationData.evaluate, iter(range(1, 9))

    def fail(self: ValidationData, *arguments: Any, **options: Any) -> Any:
        if next(calls) == nth:
            raise IncompatibleError("damaged")
        return evaluate(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ValidationData, "evaluate", fail)
        with pytest.raises(IncompatibleError, match=r"damaged\. Training stopped after step"):
            train(config)
    train(with_values(config, resume=True))
    assert config.out.with_suffix(".safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert timeless(metrics_lines(config.out)) == timeless(metrics_lines(tmp_path / "whole.pt"))


@pytest.mark.parametrize("steps", [1, 20])
def test_a_store_that_is_exchanged_while_it_is_trained_on(
    config: TrainConfig, tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the other store is used: the run is saved, and continues once the right store is back."""
    here, away, other = (tmp_path / f"{name}.zarr" for name in ("here", "away", "other"))
    shutil.copytree(config.store, here)
    make_store(other, random_activations(n_tokens=400, seed=1), chunk_tokens=32)
    expected = train(with_values(config, store=here, out=tmp_path / "whole.pt"))
    config = with_values(config, store=here)
    take = Trainer.take

    def exchange(self: Trainer, vectors: Vectors) -> None:
        if self.step == steps:
            here.rename(away)
            other.rename(here)
        take(self, vectors)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take", exchange)
        found = "replaced while it was in use|the shard is missing"  # which it is between the two renames
        with pytest.raises(IncompatibleError, match=rf"({found}).*stopped after step \d+ of 34; .* is"):
            train(config)
    assert load_checkpoint(config.out).trainer["step"] > steps
    with pytest.raises(IncompatibleError, match="was trained on another store"):
        train(with_values(config, resume=True))
    here.rename(other)
    away.rename(here)
    assert train(with_values(config, resume=True)).metrics == expected.metrics
    assert config.out.with_suffix(".safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_nothing_is_made_from_a_checkpoint_that_another_run_put_there(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_values(config, out=config.out.with_name("other.pt"), seed=1)
    train(other)
    save = Trainer.save

    def overwritten(self: Trainer, *, finished: bool) -> dict[str, Any]:
        record = save(self, finished=finished)
        other.out.replace(self.path)
        return record

    monkeypatch.setattr(Trainer, "save", overwritten)
    with pytest.raises(IncompatibleError, match=r"ckpt\.pt is not what this run saved"):
        train(config)
    assert not config.out.with_suffix(".safetensors").exists()


@pytest.mark.parametrize(("name", "message"), [("ckpt.pt", "exists now"), ("ckpt", r"belong to .*ckpt: choose")])
def test_a_run_that_began_beside_another_does_not_replace_it(
    name: str, message: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, plan = with_values(config, out=config.out.with_name(name)), loop.make_plan

    def meanwhile(*arguments: Any) -> RunPlan:
        monkeypatch.setattr(loop, "make_plan", plan)
        train(other)
        return plan(*arguments)

    monkeypatch.setattr(loop, "make_plan", meanwhile)
    with pytest.raises(UsageError, match=message):
        train(config)
    assert load_checkpoint(other.out).trainer["finished"]
    assert metrics_lines(other.out)[-1]["step"] == 34
    assert name == "ckpt.pt" or not config.out.exists()
