"""Many runs from one stream: the same bits as alone, the data read once, and what a sweep refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from residscope.errors import IncompatibleError, Interrupted, UsageError
from residscope.options import with_values
from store.activations import ActivationStore
from tests.support.training import StopAt
from train import run as loop
from train.checkpoint import load_checkpoint
from train.cli import main
from train.config import TrainConfig
from train.grid import expand, run_path
from train.run import train, train_all


@pytest.fixture
def count_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many bytes of activations were read from stores since the last call."""
    read = [0]

    def counting(name: str, size: Callable[..., int]) -> None:
        original = getattr(ActivationStore, name)

        def wrapped(self: ActivationStore, *args: Any, **rest: Any) -> Any:
            result = original(self, *args, **rest)
            read[0] += size(result, *args)
            return result

        monkeypatch.setattr(ActivationStore, name, wrapped)

    counting("read_blocks", lambda result, chunk, layer, out, threads: out.nbytes)
    counting("read", lambda result, *args: result.nbytes)

    def since() -> int:
        found, read[0] = read[0], 0
        return found

    return since


def test_each_run_of_a_sweep_is_the_single_run_and_the_data_are_read_once(
    config: TrainConfig, tmp_path: Path, count_reads: Callable[[], int]
) -> None:
    grid = with_values(config, sweep=("k=2,4", "lr=0.001,0.01", "aux-coef=0,0.5"), n_latents=40)
    results = train_all(grid)
    swept = count_reads()
    assert len(results) == 8
    assert results[1].checkpoint.name == "ckpt.k=2.lr=0.001.aux_coef=0.5.pt"
    for result in results:
        alone = with_values(config, out=tmp_path / "alone.pt", overwrite=True, **result.spec.settings)
        single = train(alone)
        assert count_reads() == swept
        assert result.checkpoint.read_bytes() == alone.out.read_bytes()
        assert result.metrics == single.metrics
        assert result.validation == single.validation


@pytest.mark.parametrize(
    "flags",
    [{"sweep": ("k=2,4", "n_latents=30,50")}, {"sweep": ("decoder-norm=fixed,free",)}, {"per_layer": "total"}],
)
def test_runs_that_were_saved_at_different_steps_end_with_the_same_bytes(
    config: TrainConfig, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill -9 between two checkpoints: one run is further than the rest, one not begun, one finished."""
    config = with_values(config, **flags)
    paths = [result.checkpoint for result in train_all(config)]
    whole = [path.read_bytes() for path in paths]
    stages: list[list[bytes]] = []
    for steps in (5, 6):
        for path in paths if not stages else []:
            path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(loop, "stop_on_signals", lambda steps=steps: StopAt(steps))
            with pytest.raises(Interrupted, match=r"saved\. Continue with the same command and --resume"):
                train_all(with_values(config, resume=True))
        stages.append([path.read_bytes() for path in paths])
    assert [load_checkpoint(path).trainer["step"] for path in paths] == [11] * len(paths)
    paths[0].write_bytes(stages[0][0])
    paths[1].unlink()
    paths[-1].write_bytes(whole[-1])
    train_all(with_values(config, resume=True))
    assert [path.read_bytes() for path in paths] == whole


def test_per_layer_runs_see_the_vectors_that_the_multi_layer_run_sees(config: TrainConfig) -> None:
    results = train_all(with_values(config, per_layer="total"))
    shared = train(config)
    assert [result.checkpoint.name for result in results] == [f"ckpt.layer={i}.pt" for i in range(3)]
    assert [result.plan.model.n_latents for result in results] == [13, 13, 13]  # 40 latents over three layers
    assert sum(result.metrics["vectors"] for result in results) == shared.metrics["vectors"] == 1080
    for layer, result in enumerate(results):
        saved = load_checkpoint(result.checkpoint)
        assert saved.store["layers"] == list(result.plan.layers) == [layer]
        assert saved.trainer["updates"] == saved.trainer["step"] == shared.plan.steps
        assert result.metrics["tokens"] == result.metrics["vectors"]
        # The statistics are those of this layer alone.
        multi = load_checkpoint(shared.checkpoint).trainer["statistics"]
        torch.testing.assert_close(saved.trainer["statistics"]["raw"], multi["raw"][layer : layer + 1])
        assert result.validation is not None
        assert len(result.validation.fvu_per_layer) == 1
    each = train_all(with_values(config, per_layer="each", overwrite=True))
    assert [result.plan.model.n_latents for result in each] == [40, 40, 40]
    assert each[0].plan.dead_vectors == 20  # tokens: a token gives one vector here


def test_a_batch_without_a_vector_of_the_layer_is_no_update(config: TrainConfig) -> None:
    """With two vectors a batch, most layers get none of most batches; the runs still end, and count their updates."""
    config = with_values(config, per_layer="each", batch_size=2, steps=30, log_every=1, validation_fraction=0.0)
    results = train_all(config)
    updates = [load_checkpoint(result.checkpoint).trainer["updates"] for result in results]
    assert all(5 < n < 30 for n in updates)
    assert sum(result.metrics["vectors"] for result in results) == 60


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("batch_size=64,128", "batch_size changes the stream of batches"),
        ("seed=0,1", "seed changes the stream"),
        ("out=a,b", "out cannot be swept; a sweep takes activation|out cannot be swept; a sweep takes aux_coef"),
        ("width=3", "width cannot be swept"),
        ("k", "expected a field and its values"),
        ("k=", "expected a field and its values"),
        ("k=4,four", "--sweep k should be int, found 'four'"),
        ("loss_space=raw,cooked", "--sweep loss_space should be standardized or raw, found 'cooked'"),
        ("k=4,4", "a value is given twice"),
        ("k=0,4", "--k should be above 0"),
        ("expansion_factor=1,2", "n_latents and expansion_factor both set"),
        ("k=4,41", "k is 41, but there are only 40 latents"),
    ],
)
def test_what_cannot_be_swept_is_refused_by_name(config: TrainConfig, sweep: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        train_all(with_values(config, sweep=(sweep,)))
    assert "\n" not in str(caught.value)
    assert not list(config.out.parent.iterdir())


def test_a_sweep_and_a_flag_do_not_both_say_how_many_latents(config: TrainConfig) -> None:
    both = r"--sweep: n_latents and expansion_factor both set the number of latents"
    factor = with_values(config, n_latents=None, expansion_factor=2.0)
    for contradicting in (
        with_values(factor, sweep=("n_latents=20,40",)),
        with_values(config, sweep=("expansion_factor=1,2",)),
        with_values(config, n_latents=None, sweep=("n_latents=20", "expansion_factor=1,2")),
    ):
        with pytest.raises(UsageError, match=both):
            expand(contradicting, [0])
    specs = expand(with_values(config, n_latents=None, sweep=("n_latents=20,40",)), [0])
    assert [(spec.config.model.n_latents, spec.config.model.expansion_factor) for spec in specs] == [
        (20, None),
        (40, None),
    ]
    assert expand(with_values(factor, sweep=("expansion_factor=1,4",)), [0])[1].config.model.expansion_factor == 4


def test_a_field_is_named_once(config: TrainConfig) -> None:
    with pytest.raises(UsageError, match="names k twice"):
        expand(with_values(config, sweep=("k=2", "k=4")), [0])


def test_a_flag_of_some_activation_functions_is_refused_for_the_others_of_a_sweep(config: TrainConfig) -> None:
    expand(with_values(config, sweep=("activation=jumprelu,relu",), sparsity_coef=0.5), [0])
    with pytest.raises(UsageError, match="--sparsity-coef is for --activation jumprelu, relu, not for topk"):
        expand(with_values(config, sweep=("activation=jumprelu,topk",), sparsity_coef=0.5), [0])


def test_checkpoints_are_named_after_what_differs(config: TrainConfig, tmp_path: Path) -> None:
    specs = expand(with_values(config, sweep=("lr=1e-3",), per_layer="each"), [3, 5])
    assert [spec.name for spec in specs] == ["lr=0.001.layer=3", "lr=0.001.layer=5"]
    assert [spec.config.optimizer.lr for spec in specs] == [1e-3, 1e-3]
    axes = ("expansion_factor=8,16.5", "encoder_bias=false", "clip_norm=none,0.001")
    specs = expand(with_values(config, n_latents=None, sweep=axes), [0])
    assert [spec.name for spec in specs] == [
        f"expansion_factor={factor}.encoder_bias=false.clip_norm={norm}"
        for factor in ("8", "16.5")
        for norm in ("none", "0.001")
    ]
    assert [spec.config.optimizer.clip_norm for spec in specs] == [None, 0.001, None, 0.001]
    assert run_path(tmp_path / "a.pt", "k=2") == tmp_path / "a.k=2.pt"
    assert run_path(tmp_path / "runs", "k=2") == tmp_path / "runs" / "ckpt.k=2.pt"
    assert run_path(tmp_path, "k=2") == tmp_path / "ckpt.k=2.pt"


def test_the_table_has_a_row_for_each_run_and_layer(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--n-latents=40", "--batch-size=64", "--threads=1", "--kernels=torch", "--window-gb=1e-5"]
    sweep = ["--sweep", "k=2,4", "clip-norm=none"]
    command = ["--store", str(config.store), "--out", str(tmp_path / "s.pt"), *flags, *sweep, "--json"]
    assert main(command) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["table"] == str(tmp_path / "s.runs.parquet")
    assert [run["name"] for run in found["runs"]] == ["k=2.clip_norm=none", "k=4.clip_norm=none"]
    rows = pd.read_parquet(found["table"])
    assert list(rows["layer"]) == [0, 1, 2, 0, 1, 2]
    assert list(rows["k"]) == [2, 2, 2, 4, 4, 4]
    assert list(rows["clip_norm"]) == [None] * 6
    for index, run in enumerate(found["runs"]):
        mine = rows[rows["run"] == run["name"]]
        assert list(mine["fvu"]) == run["validation"]["fvu_per_layer"]
        assert list(mine["l0"]) == run["validation"]["l0_per_layer"]
        assert set(mine["fvu_mean"]) == {run["validation"]["fvu"]}
        assert set(mine["dead_fraction"]) == {run["training"]["dead_fraction"]}
        assert f"{run['validation']['fvu']:.3f}" in printed.err.splitlines()[-3 + index]


def test_a_damaged_checkpoint_among_several_is_named_with_the_way_out(config: TrainConfig) -> None:
    sweep = with_values(config, sweep=("k=2,4",))
    before = [result.checkpoint.read_bytes() for result in train_all(sweep)]
    damaged = config.out.with_name("ckpt.k=4.pt")
    damaged.write_bytes(before[1][:1000])
    with pytest.raises(
        IncompatibleError, match=r"ckpt\.k=4\.pt: .*delete that file and run the same command to train it"
    ):
        train_all(with_values(sweep, resume=True))
    damaged.unlink()
    again = train_all(with_values(sweep, resume=True))
    assert [result.checkpoint.read_bytes() for result in again] == before


def test_a_run_that_ended_in_a_divergence_does_not_keep_the_others_from_going_on(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = with_values(config, sweep=("lr=0.001,1e30",), warmup_fraction=0.0, loss_space="raw")
    good, bad = train_all(sweep)
    assert not math.isfinite(bad.metrics["loss"])
    before = good.checkpoint.read_bytes(), bad.checkpoint.read_bytes()

    good.checkpoint.unlink()  # as if it had been killed before it was saved
    capsys.readouterr()
    train_all(with_values(sweep, resume=True))
    assert (good.checkpoint.read_bytes(), bad.checkpoint.read_bytes()) == before
    assert f"{bad.checkpoint} is finished (17 steps): nothing to do, but it diverged" in (capsys.readouterr().err)
    with pytest.raises(IncompatibleError, match="the training diverged"):
        train(with_values(bad.spec.config, resume=True))


@pytest.mark.parametrize("kind", ["another table", "a text", "a folder"])
def test_what_is_no_table_of_runs_is_not_replaced(kind: str, config: TrainConfig, tmp_path: Path) -> None:
    table = tmp_path / "s.runs.parquet"
    if kind == "a folder":
        table.mkdir()
    elif kind == "a text":
        table.write_text("a text")
    else:
        pd.DataFrame({"mine": [1]}).to_parquet(table)
    with pytest.raises(UsageError, match=r"s\.runs\.parquet: no table of runs .*: remove it, or choose another --out"):
        train_all(with_values(config, sweep=("k=2,4",), out=tmp_path / "s.pt"))
    assert [path.name for path in tmp_path.glob("s.*")] == [table.name]
