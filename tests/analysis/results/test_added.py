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
    whole = (tmp_path / "out" / "summary.json").read_text()
    changed = whole.replace('"n_tokens": ', '"n_tokens": 1', 1)
    for damaged, said in (
        ("{", "not valid JSON"),
        ("{}", "another analysis was put there"),
        (json.dumps({"schema_version": 1, "provenance": []}), "damaged"),
        (changed, "changed after `analyze` wrote it"),
    ):
        (tmp_path / "out" / "summary.json").write_text(damaged)
        with pytest.raises(IncompatibleError, match=said):
            require_there(config, inputs)
    with pytest.raises(IncompatibleError, match="changed after"):  # and not made again, without what was added
        make_unless_there(config, inputs)
