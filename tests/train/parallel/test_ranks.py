"""Two processes against one: the same numbers to rounding, the same bits when they are stopped and resumed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from residscope.errors import UsageError
from residscope.options import with_values
from tests.support.ranks import VARIANTS
from tests.support.training import metrics_lines, timeless
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.parallel.ranks import ALONE, Ranks
from train.run import train, train_all


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than the training."""
    monkeypatch.setattr("train.run.write_outputs", lambda result, anew: None)


def close(path: Path, other: Path) -> None:
    """Whether two checkpoints have the same weights and metrics, to rounding: Adam divides a gradient by its size, so
    the rounding of one that is nearly nothing moves a weight by a few per cent of a step of 0.002."""
    a, b = load_checkpoint(path), load_checkpoint(other)
    for (name, ours), theirs in zip(a.sae.state_dict().items(), b.sae.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert torch.equal(a.trainer["silent"], b.trainer["silent"])
    for name in ("loss", "fvu", "auxk", "l0", "dead_fraction", "vectors"):
        assert a.trainer["metrics"][name] == pytest.approx(b.trainer["metrics"][name], rel=1e-4)
    assert a.trainer["validation"]["fvu"] == pytest.approx(b.trainer["validation"]["fvu"], rel=1e-4)
    assert a.trainer["validation"]["fired"] == b.trainer["validation"]["fired"]
    assert a.trainer["validation"]["ratio"] == pytest.approx(b.trainer["validation"]["ratio"], rel=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_train_what_one_trains(base: TrainConfig, two: tuple[Path, Any], name: str) -> None:
    one = with_values(base, out=base.out.with_name(f"{name}.pt"), **({"steps": 17} | VARIANTS[name]))
    result = train(one)
    assert name in ("relu", "jumprelu") or result.metrics["auxk"] > 0  # so that there are dead latents
    close(one.out, two[0] / f"{name}.pt")
    assert load_checkpoint(two[0] / f"{name}.pt").trainer["surroundings"]["processes"] == "2"


def test_two_train_single_layers_and_shares_of_the_latents(base: TrainConfig, two: tuple[Path, Any]) -> None:
    train_all(with_values(base, out=base.out.with_name("layers"), per_layer="total", steps=17))
    for layer in range(3):
        a, b = (load_checkpoint(f / f"layers/ckpt.layer={layer}.pt") for f in (base.out.parent, two[0]))
        torch.testing.assert_close(a.sae.W_enc, b.sae.W_enc, rtol=1e-4, atol=2e-4)
    one = with_values(base, out=base.out.with_name("sharded.pt"), n_latents=40, decoder_norm="free", steps=17)
    train(one)
    close(one.out, two[0] / "sharded.pt")
    assert load_checkpoint(two[0] / "sharded.pt").trainer["surroundings"]["processes"] == "2, latents over 2"


def test_a_signal_to_one_stops_both_and_a_resume_ends_with_the_same_bits(two: tuple[Path, Any]) -> None:
    folder, found = two
    assert {each["stopped"].split(";")[0] for each in found} == {"stopped after step 8 of 17"}
    assert (folder / "stopped.pt").read_bytes() == (folder / "topk.pt").read_bytes()
    lines = [timeless(metrics_lines(folder / name)) for name in ("stopped.pt", "topk.pt")]
    assert lines[0] == lines[1]


def test_one_resumes_two_and_two_resume_one(
    base: TrainConfig, two: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = two[0]
    close(folder / "to-two.pt", folder / "topk.pt")
    copy = base.out.with_name("from-two.pt")
    shutil.copy(folder / "one.pt", copy)
    train(with_values(base, out=copy, resume=True, steps=17))
    assert "processes 2 -> none: the result will not be bit for bit" in capsys.readouterr().err
    close(copy, folder / "topk.pt")


def test_what_ranks_tell_each_other(two: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (each["told"] for each in two[1])
    for each in (first, second):
        assert each["sum"] == [3.0, 3.0]
        assert each["mask"] == [True, True, False]
        assert each["any"] == [True, False]
        assert each["shared"] == [1, 1, 2, 2, 2]
    assert (first["own"], second["own"]) == ([0, 2], [4, 6, 8])
    assert first["gathered"] == [(5,), [[0], [2], [4], [6], [8]]]
    assert second["gathered"] == [(5,), []]


def test_why_another_ended_is_said_by_the_first(two: tuple[Path, list[dict[str, Any]]]) -> None:
    assert two[1][0]["lost"] == ("the store is damaged", 3)


def test_one_process_is_everything() -> None:
    tensor = torch.arange(3.0)
    ALONE.sum_(tensor)
    ALONE.share_rows_(tensor)
    assert ALONE.sum_rows_(tensor).data_ptr() == tensor.data_ptr()
    assert tensor.tolist() == [0, 1, 2]
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.rows is ALONE.latents is ALONE
    assert ALONE.share_of_cores() is None


def test_shares_cover_all_latents_once() -> None:
    for size in (2, 3, 7):
        shares = [range(50)[Ranks(rank, size).own(50)] for rank in range(size)]
        assert [latent for share in shares for latent in share] == list(range(50))


def test_latents_that_cannot_be_shared_are_refused(base: TrainConfig) -> None:
    with pytest.raises(
        UsageError, match="--shard-latents 2 does not divide the number of processes, 1: start a multiple"
    ):
        ALONE.split(2, "cpu")
    with pytest.raises(UsageError, match="--n-procs and --shard-latents are for the command `train`"):
        train(with_values(base, n_procs=2))
    with pytest.raises(UsageError, match="--shard-latents is for --activation topk"):
        with_values(base, shard_latents=2, activation="jumprelu")
