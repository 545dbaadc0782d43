"""What a run leaves beside its checkpoint, on the hub and with trackers; hub and trackers are played by fakes."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from residscope.errors import ResidscopeError, UsageError
from residscope.options import with_values
from tests.support.saes import assert_equal
from tests.support.stores import make_store, random_activations
from tests.support.training import train_config
from train.checkpoint import load_checkpoint
from train.cli import main
from train.config import TrainConfig
from train.formats.files import read_sae, read_safetensors
from train.reporting.report import describe, summary
from train.reporting.trackers import numbers_of
from train.run import train, train_all


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "acts.zarr"
    make_store(path, random_activations(n_tokens=200), provenance={"model": "a/b", "dataset": "some text"})
    return path


@pytest.fixture
def config(store: Path, tmp_path: Path) -> TrainConfig:
    return train_config(
        store=store,
        out=tmp_path / "run" / "ckpt.pt",
        n_latents=40,
        k=4,
        batch_size=64,
        window_gb=1e-4,
        log_every=2,
        threads=1,
        kernels="torch",
    )


def test_a_run_leaves_its_weights_for_others_and_a_picture(config: TrainConfig) -> None:
    train(config)
    names = {path.name for path in config.out.parent.iterdir()}
    expected = {"ckpt.pt", "ckpt.safetensors", "ckpt.metrics.jsonl", "ckpt.config.toml", "ckpt.loss.png"}
    assert names == expected
    export, saved = read_safetensors(config.out.with_name("ckpt.safetensors")), load_checkpoint(config.out)
    assert_equal(export.sae, saved.sae)
    assert export.store == saved.store
    assert export.store["dataset"] == "some text"
    assert config.out.with_name("ckpt.loss.png").read_bytes()[:4] == b"\x89PNG"
    assert_equal(read_sae(config.out.parent)[0], saved.sae)  # the folder is one autoencoder, not two
    # As after a kill between the last checkpoint and the rest.
    for name in expected - {"ckpt.pt", "ckpt.metrics.jsonl"}:
        config.out.with_name(name).unlink()
    train(with_values(config, resume=True))
    assert {path.name for path in config.out.parent.iterdir()} == expected - {"ckpt.config.toml"}


def test_an_fvu_above_one_comes_with_a_way_out(config: TrainConfig) -> None:
    result = train(with_values(config, steps=1, lr=1e-6))
    assert result.validation is not None
    good, bad = (describe(replace(result, validation=result.validation._replace(fvu=fvu))) for fvu in (0.9, 1.1))
    assert "after 1 step (64 vectors of 3 layers)" in good
    assert "above 1" not in good
    assert "an FVU above 1 after 1 step mostly means too few steps: train longer (--steps), or" in bad
    assert re.search(r"or with a higher --lr than 1e-06, which is \S+ times the default rate$", bad)
    assert "--batch-size" not in bad  # 64 is small
    usual = train(with_values(config, batch_size=256, overwrite=True))
    assert usual.validation is not None
    equal = replace(usual, validation=usual.validation._replace(fvu=math.inf, fvu_per_layer=[math.inf, 0.5, 0.5]))
    assert "tokens of held-out documents: no FVU, their vectors are equal" in describe(equal)
    assert "above 1" not in describe(equal)
    assert json.loads(json.dumps(summary(equal), allow_nan=False))["validation"]["fvu_per_layer"] == [None, 0.5, 0.5]
    bad = describe(replace(usual, validation=usual.validation._replace(fvu=1.1)))
    assert bad.endswith("(--epochs, or a larger store), or with smaller batches than --batch-size 256")


def test_few_held_out_documents_are_said_to_be_few(config: TrainConfig) -> None:
    result = train(config)
    held_out = result.validation
    assert held_out is not None
    few, enough, older = (describe(replace(result, validation=held_out._replace(documents=n))) for n in (1, 5, None))
    assert "tokens of 1 held-out document (too few to be reliable: raise --validation-fraction, or harvest" in few
    assert "tokens of 5 held-out documents: FVU" in enough
    assert "tokens of held-out documents: FVU" in older


def test_many_dead_latents_come_with_a_way_out(config: TrainConfig) -> None:
    for lr, lower in ((1e-6, ""), (None, ""), (0.1, "lower --lr 0.1, ")):
        result = train(with_values(config, steps=1, lr=lr, overwrite=True))
        few, many = (
            describe(replace(result, metrics={**result.metrics, "dead_fraction": dead})) for dead in (0.1, 0.5)
        )
        assert f"50% of the latents are dead: train longer, {lower}or ask for fewer latents than --n-latents" in many
        assert "are dead" not in few


def test_other_weights_replace_the_export(config: TrainConfig) -> None:
    train(config)
    train(with_values(config, seed=1, overwrite=True))
    assert_equal(read_safetensors(config.out.with_name("ckpt.safetensors")).sae, load_checkpoint(config.out).sae)


class FakeHub:
    """Stands in for `huggingface_hub.HfApi`; keeps what is uploaded, as {path: bytes}."""

    repositories: dict[str, Any]
    error: Exception | None = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if FakeHub.error:
            raise FakeHub.error
        FakeHub.repositories[repo_id] = {"private": private}

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> None:
        root = Path(folder_path)
        files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        FakeHub.repositories[repo_id]["files"] = files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    FakeHub.repositories, FakeHub.error = {}, None
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return FakeHub


def test_a_run_goes_to_the_hub_with_a_card_that_says_what_it_is(config: TrainConfig, hub: type[FakeHub]) -> None:
    config.out.parent.mkdir()
    (config.out.parent / "private-notes.md").write_text("not for the hub")
    result = train(with_values(config, push_to_hub="me/saes", hub_private=True, hub_license="apache-2.0"))
    assert hub.repositories["me/saes"]["private"] is True
    files = hub.repositories["me/saes"]["files"]
    assert set(files) == {"README.md", "ckpt.safetensors", "ckpt.metrics.jsonl", "ckpt.loss.png"}
    assert files["ckpt.safetensors"] == config.out.with_name("ckpt.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert result.validation is not None
    for text in (
        'license: "apache-2.0"',
        'base_model: "a/b"',
        "| data set | some text |",
        f"| store content hash | {load_checkpoint(config.out).store['content_hash']} |",
        f"| FVU, mean over layers (lower is better), validation | {result.validation.fvu:.4g} |",
        "read_sae('me/saes')",
    ):
        assert text in card


def test_a_sweep_goes_to_one_repository_in_folders(config: TrainConfig, hub: type[FakeHub]) -> None:
    train_all(with_values(config, sweep=("k=2,4",), push_to_hub="me/saes"))
    files = hub.repositories["me/saes"]["files"]
    assert {name.split("/")[0] for name in files} == {"k=2", "k=4"}
    assert "subfolder='k=2'" in files["k=2/README.md"].decode()


def test_an_upload_that_fails_loses_nothing_and_is_tried_again(config: TrainConfig, hub: type[FakeHub]) -> None:
    hub.error = OSError("no route to host")
    with pytest.raises(ResidscopeError, match=r"me/saes: the upload failed: no route to host .*--resume") as caught:
        train(with_values(config, push_to_hub="me/saes"))
    assert "\n" not in str(caught.value)
    assert load_checkpoint(config.out).trainer["finished"] is True
    hub.error = None
    train(with_values(config, push_to_hub="me/saes", resume=True))
    assert "ckpt.safetensors" in hub.repositories["me/saes"]["files"]


def test_an_upload_that_cannot_work_is_refused_before_training(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResidscopeError, match="HF_HUB_OFFLINE is set"):
        train(with_values(config, push_to_hub="me/saes"))
    with pytest.raises(UsageError, match="should be OWNER/NAME, found 'saes'"):
        train(with_values(config, push_to_hub="saes"))
    assert not config.out.parent.exists()


def test_lines_become_flat_numbers() -> None:
    line = {"step": 4, "fvu": 0.5, "fvu_per_layer": [None, 0.25], "loss": 1.0}
    expected = {"train/step": 4, "train/fvu": 0.5, "train/fvu_per_layer/7": 0.25, "train/loss": 1.0}
    assert numbers_of(line, (3, 7)) == expected
    assert numbers_of({"split": "validation", "fvu": 1.0}, (3, 7)) == {"validation/fvu": 1.0}


@pytest.mark.parametrize(("flags", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb": "p"}, "wandb")])
def test_a_missing_tracker_is_named_before_anything_is_read(
    config: TrainConfig, flags: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ResidscopeError, match=rf"package {package} is not installed: `pip install 'residscope\[{package}"
    ):
        train(with_values(config, **flags))
    assert not config.out.parent.exists()


def test_trackers_get_every_line_of_the_metrics(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of a sweep, each with a writer and a W&B run of its own."""
    written: dict[str, list[tuple[str, float, int]]] = {}
    purged: list[int] = []
    started: list[dict[str, Any]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.name = Path(folder).name
            purged.append(purge_step)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.setdefault(self.name, []).append((name, value, step))

        def close(self) -> None:
            written[self.name].append(("closed", 0, 0))

    def init(**arguments: Any) -> Any:
        started.append(arguments)
        return SimpleNamespace(log=lambda numbers, step: None, finish=lambda: None)

    tensorboard, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    tensorboard.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    wandb.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    results = train_all(with_values(config, sweep=("k=2,4",), tensorboard=True, wandb="project"))
    for result in results:
        lines = map(json.loads, result.checkpoint.with_suffix(".metrics.jsonl").read_text().splitlines())
        expected = [(f"{line.get('split', 'train')}/fvu", line["fvu"], line["step"]) for line in lines]
        found = written[result.checkpoint.with_suffix(".tensorboard").name]
        assert [entry for entry in found if entry[0] in ("train/fvu", "validation/fvu")] == expected
        assert found[-1][0] == "closed"
    assert purged == [1, 1]
    assert [start["name"] for start in started] == ["k=2", "k=4"]
    assert len({start["id"] for start in started}) == 2
    assert started[0]["config"]["k"] == 2


def test_a_dry_run_tells_and_writes_nothing(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--n-latents=40", "--k=4", "--batch-size=64", "--threads=1", "--kernels=torch", "--sweep", "k=2,4"]
    command = ["--store", str(config.store), "--out", str(config.out), *flags, "--dry-run"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["runs"], found["steps"], found["vectors"]) == (2, 9, 172 * 3)
    assert found["bytes_read"] == 172 * 3 * 12 * 2
    assert found["checkpoint_bytes"] == 2 * 2 * (2 * 40 * 12 * 4)
    assert found["interim_bytes"] == 3 * (1 + 1) * (2 * 40 * 12 * 4)
    assert found["measured_steps"] == 7
    assert found["seconds"] == pytest.approx(9 * found["seconds_per_step"])
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "nothing was written" in printed.out
    assert (printed.out + printed.err).count("memory") == 1
    assert not config.out.parent.exists()


def test_the_mode_of_torch_is_as_before_after_a_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.trainer

    seen: list[bool] = []
    step = train.trainer.training_step

    def spy(*arguments: Any, **rest: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(*arguments, **rest)

    monkeypatch.setattr(train.trainer, "training_step", spy)
    train_all(config)
    train_all(with_values(config, deterministic=False, overwrite=True))
    assert set(seen[: len(seen) // 2]) == {True}
    assert set(seen[len(seen) // 2 :]) == {False}
    assert not torch.are_deterministic_algorithms_enabled()


def test_no_compiler_of_torch_is_loaded_for_determinism() -> None:
    code = (
        "import sys, torch; from train.determinism import deterministic\n"
        "with deterministic(torch.device('cpu'), None): print(torch.are_deterministic_algorithms_enabled())\n"
        "print([m for m in ('torch._inductor', 'torch._dynamo', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n[]\n"


def test_names_that_differ_behind_a_dot_share_no_file(config: TrainConfig) -> None:
    for size in ("0.5b", "0.6b"):
        train(with_values(config, out=config.out.with_name(f"llama-{size}"), steps=1))
    endings = ("", ".safetensors", ".metrics.jsonl", ".config.toml", ".loss.png")
    names = {path.name for path in config.out.parent.iterdir()}
    assert names == {f"llama-{size}{ending}" for size in ("0.5b", "0.6b") for ending in endings}
