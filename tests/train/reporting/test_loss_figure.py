"""The figure of a run is left out if it cannot be drawn."""

import sys
from pathlib import Path

import pytest

from train.reporting.loss_figure import write_loss_figure


def test_a_matplotlib_that_is_damaged_costs_the_picture_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('another ABI')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    write_loss_figure(tmp_path / "ckpt.metrics.jsonl", tmp_path / "ckpt.loss.png", "ckpt")
    assert not (tmp_path / "ckpt.loss.png").exists()
