"""What a resume refuses by name, what it warns of, and plans of checkpoints that are older than an option."""

from pathlib import Path
from typing import Any

import pytest
import torch

from residscope.errors import IncompatibleError, Interrupted, UsageError
from residscope.options import with_values
from store.activations import ActivationStore
from tests.support.stores import make_store, random_activations
from tests.support.training import StopAt, plan_of
from train import run
from train.checkpoint import load_checkpoint
from train.config import ONLY_FOR, TrainConfig
from train.model import sae_hash
from train.resolve import ADDED_LATER, RECORDED, RunPlan
from train.resume import compare_plans
from train.run import train
from train.trainer import Trainer
from train.validation import Validation


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return with_values(config, epochs=2)


@pytest.fixture
def plan(store: Path) -> RunPlan:
    return plan_of(ActivationStore.open(store), k=2)


@pytest.mark.parametrize("name", RECORDED)
def test_every_difference_between_plans_is_named(store: Path, name: str) -> None:
    """Only flags that the activation function uses count; earlier versions accepted and recorded others."""
    activation = ONLY_FOR.get(name, ("topk",))[0]
    plan = plan_of(ActivationStore.open(store), k=2, activation=activation)
    if name in ONLY_FOR:
        unused_by = next(kind for kind in ("matryoshka", "relu") if kind not in ONLY_FOR[name])
        unlike = plan_of(ActivationStore.open(store), k=2, activation=unused_by)
        assert compare_plans(unlike.to_dict() | {name: "other"}, unlike) == []
    other = plan.to_dict() | {name: "other"}
    if name in ("device", "kernels", "tile_mb"):
        assert compare_plans(other, plan)[0].startswith(f"{name} was other when")
    else:
        with pytest.raises(IncompatibleError, match=f"{name} was other"):
            compare_plans(other, plan)


def test_equal_plans_and_products_that_the_machine_chooses(plan: RunPlan) -> None:
    assert compare_plans(plan.to_dict(), plan) == []
    with pytest.raises(IncompatibleError, match=r"product_dtype was .* give --dtype other to resume"):
        compare_plans(plan.to_dict() | {"product_dtype": "other"}, plan)
    with pytest.raises(IncompatibleError, match=r"product_dtype was float16 .* no longer supported: use --overwrite"):
        compare_plans(plan.to_dict() | {"product_dtype": "float16"}, plan)


def test_a_plan_from_before_an_option_was_there_is_that_of_its_default(store: Path) -> None:
    plan = plan_of(ActivationStore.open(store), k=2, recipe="gao")
    old = {name: value for name, value in plan.to_dict().items() if name not in ADDED_LATER}
    assert len(old) == len(RECORDED) - len(ADDED_LATER)
    assert compare_plans(old, plan) == []
    for name in old.keys() - {"device", "kernels", "validation_seed"}:
        with pytest.raises(IncompatibleError, match=f"{name} was None"):
            compare_plans({key: value for key, value in old.items() if key != name}, plan)


def test_an_existing_checkpoint_is_not_touched_unasked(config: TrainConfig) -> None:
    config.out.write_text("precious")
    with pytest.raises(UsageError, match="use --resume to continue it or --overwrite to replace it"):
        train(config)
    assert config.out.read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": 5}, "k was 4 .* and is 5 now"),
        ({"n_latents": 50}, "n_latents was 40"),
        ({"lr": 0.5}, "lr was"),
        ({"batch_size": 32}, "batch_size was 64"),
        ({"steps": 20}, "steps was 33"),
        ({"layers": (0, 1)}, "layers was"),
        ({"seed": 9}, "seed was 0"),
        ({"loss_space": "raw"}, "loss_space was standardized"),
        ({"window_gb": 1e-4}, "window_bytes was"),
    ],
)
def test_a_resume_with_other_flags_is_refused_by_name(config: TrainConfig, changes: dict, named: str) -> None:
    train(with_values(config, steps=33, epochs=None))
    steps = {} if "epochs" in changes else {"steps": 33, "epochs": None}
    with pytest.raises(IncompatibleError, match=named):
        train(with_values(config, resume=True, **{**steps, **changes}))


def test_a_resume_on_other_data_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    make_store(tmp_path / "other.zarr", random_activations(n_tokens=400, seed=1), chunk_tokens=32)
    with pytest.raises(IncompatibleError, match="trained on another store"):
        train(with_values(config, resume=True, store=tmp_path / "other.zarr"))
    make_store(tmp_path / "wide.zarr", random_activations(n_tokens=400, d_model=16), chunk_tokens=32)
    with pytest.raises(IncompatibleError, match=r"has d_model 12, .* has 16; name the store that"):
        train(with_values(config, resume=True, store=tmp_path / "wide.zarr"))


def test_a_training_state_that_is_not_whole_is_refused_by_name(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Trainer.save

    def then_stop(self: Trainer, *, finished: bool) -> None:
        save(self, finished=finished)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(with_values(config, checkpoint_every=5))
    whole = torch.load(config.out, weights_only=True)
    left_out = {
        "updates",
        "vectors",
        "threads",
        "surroundings",
        "curve",
        "begun",
        "started_from",
    }  # which older checkpoints lack
    for name in whole["trainer"]:
        for value in ("missing", None, "x", [], -1, 10**9, torch.zeros(3)):
            trainer = {**whole["trainer"], name: value}
            if (value is None and name in ("validation", "started_from")) or (value == [] and name == "curve"):
                continue
            if (name, value if isinstance(value, int) else None) == ("vectors", 10**9):
                continue
            if value == "missing":
                if name in left_out | {"validation"}:
                    continue
                del trainer[name]
            torch.save({**whole, "trainer": trainer}, config.out)
            with pytest.raises(IncompatibleError, match=f"{name} is not what|has no training state"):
                train(with_values(config, checkpoint_every=5, resume=True))
    torch.save(whole, config.out)
    train(with_values(config, checkpoint_every=5, resume=True))
    finished = torch.load(config.out, weights_only=True)
    for name in Validation._field_defaults:  # which older checkpoints lack
        del finished["trainer"]["validation"][name]
    torch.save(finished, config.out)
    older = train(with_values(config, checkpoint_every=5, resume=True)).validation
    assert older is not None
    assert older.documents is None
    for metrics in ({}, {**finished["trainer"]["metrics"], "loss": "x"}):
        torch.save({**finished, "trainer": {**finished["trainer"], "metrics": metrics}}, config.out)
        with pytest.raises(IncompatibleError, match="metrics is not what"):
            train(with_values(config, checkpoint_every=5, resume=True))


def test_every_seed_holds_out_the_same_documents_but_in_runs_of_earlier_versions(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(with_values(config, seed=1))
    assert load_checkpoint(config.out).store["validation"]["seed"] == 0
    config = with_values(config, seed=1, checkpoint_every=5)
    train(with_values(config, validation_seed=1, overwrite=True))
    undisturbed = load_checkpoint(config.out)
    with monkeypatch.context() as patch:
        patch.setattr(run, "stop_on_signals", lambda: StopAt(5))
        with pytest.raises(Interrupted):
            train(with_values(config, validation_seed=1, overwrite=True))
    stopped = torch.load(config.out, weights_only=True)
    del stopped["trainer"]["config"]["validation_seed"]
    torch.save(stopped, config.out)
    with pytest.raises(IncompatibleError, match=r"validation_seed was 1 .* and is 0 now"):
        train(with_values(config, validation_seed=0, resume=True))
    train(with_values(config, resume=True))
    resumed = load_checkpoint(config.out)
    assert sae_hash(resumed.sae) == sae_hash(undisturbed.sae)
    assert resumed.store["validation"] == undisturbed.store["validation"]
    assert resumed.trainer["validation"] == undisturbed.trainer["validation"]


def test_what_another_run_has_written_since_is_not_replaced(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_values(config, epochs=None, steps=3)
    train(config)
    as_begun = run.as_begun

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(run, "as_begun", as_begun)
        train(with_values(config, steps=9, resume=True))
        return as_begun(*arguments)

    monkeypatch.setattr(run, "as_begun", meanwhile)
    with pytest.raises(UsageError, match=r"ckpt\.pt was written since it was read: run the same command again"):
        train(with_values(config, steps=6, resume=True))
    assert load_checkpoint(config.out).trainer["step"] == 9


def test_two_checkpoints_do_not_share_the_files_beside_them(config: TrainConfig) -> None:
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in config.out.parent.glob("ckpt*") if path.is_file()}

    config = with_values(config, steps=2, epochs=None)
    train(config)
    before = files()
    assert {"ckpt.pt", "ckpt.metrics.jsonl", "ckpt.config.toml", "ckpt.safetensors"} <= before.keys()
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(
            UsageError, match=r"ckpt: .*ckpt.config.toml and the files next to it belong to .*ckpt.pt: choose"
        ):
            train(with_values(config, out=config.out.with_suffix(""), **flags))
    assert files() == before
    train(with_values(config, resume=True))
    assert files() == before


def test_weights_that_no_run_made_are_not_replaced(config: TrainConfig) -> None:
    of_another = config.out.with_suffix(".safetensors")
    of_another.write_text("precious")
    with pytest.raises(UsageError, match=r"ckpt.safetensors, which would be replaced, already exists and is not"):
        train(config)
    assert of_another.read_text() == "precious"
    assert not config.out.with_suffix(".metrics.jsonl").exists()
