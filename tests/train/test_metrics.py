"""The metrics file is cut on resume, and sums are those of the window."""

import json
import os
from pathlib import Path

import pytest
import torch

from residscope.errors import IncompatibleError, ResidscopeError
from train.metrics import MetricsFile, MetricsWindow, read_metrics
from train.model import Standardized
from train.objective.step import StepResult, Weights
from train.parallel.ranks import ALONE, Ranks


def write_lines(path: Path, steps: list[int], tail: str = "") -> None:
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in steps) + tail)


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("tail", ["", '{"step": 50, "lo', "\0\0\0"])
def test_lines_after_the_checkpoint_are_cut(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "ckpt.metrics.jsonl"
    write_lines(path, [10, 20, 20, 30, 40], tail)
    file = MetricsFile(path, resume_step=20)
    file.write({"step": 30})
    file.close()
    assert steps_in(path) == [10, 20, 20, 30]


@pytest.mark.parametrize(
    "line", ['{"step": 2', '{"stop": 20}', '{"step": 15, "fvu": "x"}', "[" * 100_000, "9" * 5000, ""]
)
def test_a_damaged_line_takes_no_later_one_with_it(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.jsonl"
    write_lines(path, [10])
    whole = path.read_text() + line + "\n" + '{"step": 20}\n{"step": 30}\n'
    path.write_text(whole + '{"step": 40}\n')
    MetricsFile(path, resume_step=30).close()
    assert path.read_text() == whole
    assert f"{path}: 1 line damaged" in capsys.readouterr().err
    assert [found["step"] for found in read_metrics(path)] == [10, 20, 30]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_lines(path, [1, 2])
    MetricsFile(path, resume_step=0).close()
    assert path.read_text() == ""


def test_two_runs_cannot_write_one_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = MetricsFile(path, resume_step=0)
    first.write({"step": 1})
    with pytest.raises(ResidscopeError, match="is in use: another run writes this checkpoint"):
        MetricsFile(path, resume_step=0)
    assert steps_in(path) == [1]
    first.close()
    MetricsFile(path, resume_step=1).close()
    assert steps_in(path) == [1]


def test_window_by_hand() -> None:
    """Two layers of raw denominators 4 and 100; a standardised error counts times the row's own variance."""
    denominators = torch.tensor([4.0, 100.0], dtype=torch.float64)
    window, plain = MetricsWindow(denominators, sparsity=True), MetricsWindow(denominators)
    nothing = Weights(*(torch.zeros(1),) * 3)
    sparsity = torch.tensor(0.7)
    for loss in (0.5, 1.5):
        standardized = Standardized(torch.zeros(2, 3), torch.zeros(2, 1), torch.tensor([[1.0], [10.0]]))
        result = StepResult(
            nothing, torch.tensor([2.0, 0.25]), torch.tensor(loss), torch.tensor(0.1), torch.tensor(3), sparsity
        )
        for each in (window, plain):
            each.add(torch.tensor([0, 1]), standardized, result)
    assert window.vectors == 4
    line = window.line()
    assert line["fvu_per_layer"] == pytest.approx([2 / 4, 25 / 100])
    assert line["fvu"] == pytest.approx(0.375)
    assert line["loss"] == pytest.approx(1.0)
    assert line["auxk"] == pytest.approx(0.1)
    assert line["l0"] == pytest.approx(1.5)
    assert line.pop("sparsity") == pytest.approx(0.7)
    assert line == plain.line()  # where there is no such term, none is told of
    resumed = MetricsWindow(denominators, sparsity=True)
    resumed.load_state_dict(plain.state_dict())  # from before it was counted: half of the window is no mean
    again = MetricsWindow(denominators, sparsity=True)
    again.load_state_dict(resumed.state_dict())
    assert resumed.line() == again.line() == {**line, "sparsity": None}
    again.clear()
    again.load_state_dict(window.state_dict())
    assert again.line()["sparsity"] == pytest.approx(0.7)


def test_a_layer_without_rows_is_null() -> None:
    window = MetricsWindow(torch.ones(2, dtype=torch.float64))
    one, nought = torch.tensor(1), torch.tensor(0.0)
    result = StepResult(Weights(*(torch.zeros(1),) * 3), torch.ones(1), torch.tensor(1.0), nought, one, nought)
    window.add(torch.tensor([1]), Standardized(torch.zeros(1, 2), torch.zeros(1, 1), torch.ones(1, 1)), result)
    assert window.line()["fvu_per_layer"] == [None, 1.0]
    assert window.line()["fvu"] == 1.0


def test_what_is_no_file_or_without_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.metrics.jsonl"
    path.touch()
    os.truncate(path, 1 << 40)  # a sparse file: no bytes on the disk
    with pytest.raises(IncompatibleError, match=r"cannot be read .* at most 1\.07 GB, found 1\.1 TB"):
        read_metrics(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(IncompatibleError, match="found a folder, pipe or device"):
        read_metrics(path)


def test_a_step_that_is_no_number_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": "2", "loss": 1.0}\n')
    assert [line["step"] for line in read_metrics(path)] == [1]


def test_of_ranks_that_have_other_latents_one_goes_on_with_what_is_a_sum_over_all() -> None:
    state = {name: torch.ones(()).double() * 6 for name in ("steps", "loss", "auxk", "active")}
    state |= {name: torch.ones(2).double() for name in ("vectors", "error")}
    for rank, active in ((0, 6), (1, 0)):
        ranks = Ranks(rank, 2)
        ranks.rows, ranks.latents = ALONE, ranks  # each has all rows, and half of the latents
        window = MetricsWindow(torch.ones(2).double(), ranks=ranks)
        window.load_state_dict(state)
        assert window._sums["active"] == active
        assert window._sums["loss"] == 6
