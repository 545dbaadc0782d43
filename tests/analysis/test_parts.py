"""Optional parts: they see the codes of any token, write a file and a key of summary.json, and leave nothing behind."""

import json

import numpy as np
import pytest

from analysis import run as run_module
from analysis.config import AnalyzeConfig
from analysis.parts import Part
from analysis.run import analyze
from residscope.errors import ResidscopeError
from tests.analysis.small import make_small


def total_mass(context):
    mass = sum(float(tile.values.sum()) for tile in context.codes(context.selection.analysed))
    (context.folder / "mass.txt").write_text(str(mass))
    return {"mass": mass, "by_table": float(context.table.total.sum())}


def test_a_part_sees_all_codes_and_its_value_and_file_come_and_go_with_it(tmp_path, monkeypatch):
    small = make_small(tmp_path)
    part = Part(
        name="total_mass", files=("mass.txt",), wanted=lambda config: config.split != "validation", make=total_mass
    )
    monkeypatch.setattr(run_module, "PARTS", (part,))
    options = {"store": small.store, "sae": small.sae, "out": tmp_path / "out", "report": False, "intervals": False}
    found = analyze(AnalyzeConfig(**options))["total_mass"]
    np.testing.assert_allclose(found["mass"], found["by_table"], rtol=1e-5)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["total_mass"] == found
    assert float((tmp_path / "out" / "mass.txt").read_text()) == found["mass"]
    assert analyze(AnalyzeConfig(**options, split="validation"))["total_mass"] is None
    assert not (tmp_path / "out" / "mass.txt").exists()


def test_codes_kept_for_parts_go_where_one_fails(tmp_path, monkeypatch):
    def fail(context):
        assert list((out / ".partial" / "codes").glob("*.npz"))
        raise ResidscopeError("no")

    small, out = make_small(tmp_path), tmp_path / "out"
    part = Part(name="failing", files=(), wanted=lambda config: True, make=fail)
    monkeypatch.setattr(run_module, "PARTS", (part,))
    with pytest.raises(ResidscopeError, match="no"):
        analyze(AnalyzeConfig(store=small.store, sae=small.sae, out=out, report=False))
    assert not (out / ".partial" / "codes").exists()
    assert not (out / "summary.json").exists()
