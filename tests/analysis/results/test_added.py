"""Whether a folder holds the analysis that something is to be added to."""

import json
from pathlib import Path

import pytest

from analysis.inputs import open_inputs
from analysis.results.added import has_analysis, make_unless_there, require_there
from residscope.errors import IncompatibleError
from tests.support.small import analyze_config, make_small, run_small


def test_an_analysis_is_made_once_and_another_one_is_told_from_it(tmp_path: Path) -> None:
    small = make_small(tmp_path, n_tokens=100)
    inputs = open_inputs(small.store, small.sae)
    config = analyze_config(store=small.store, sae=small.sae, out=tmp_path / "out", report=False, examples=False)
    assert not has_analysis(config.out_dir, inputs)
    make_unless_there(config, inputs)
    made = (tmp_path / "out" / "summary.json").stat().st_ino
    make_unless_there(config, inputs)
    require_there(config, inputs)
    assert (tmp_path / "out" / "summary.json").stat().st_ino == made
    (tmp_path / "b").mkdir()
    other = make_small(tmp_path / "b", n_tokens=110)
    run_small(other, tmp_path / "b" / "out", examples=False)
    assert not has_analysis(tmp_path / "b" / "out", inputs)
    for damaged in ("{", "{}", json.dumps({"schema_version": 1, "provenance": []})):
        (tmp_path / "out" / "summary.json").write_text(damaged)
        with pytest.raises(IncompatibleError, match="another analysis was put there"):
            require_there(config, inputs)
