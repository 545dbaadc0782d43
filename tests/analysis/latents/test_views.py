"""The codes that an analysis keeps while it looks at latents: whole, and gone where it fails."""

import pandas as pd
import pytest

from analysis.latents import views
from analysis.results.folder import EXAMPLES, HISTOGRAMS
from analysis.task import codes_again
from residscope.errors import ResidscopeError
from tests.support.small import make_small, run_small


def test_all_codes_are_seen_again_and_the_files_come_and_go_with_the_flag(tmp_path, monkeypatch):
    seen = []

    def watched(spec, needed):
        for tile in codes_again(spec, needed):
            seen.append(float(tile.values.sum()))
            yield tile

    def rows_of_the_table(path, found, *rest):
        totals.append(sum(seen))
        return original(path, found, *rest)

    totals, original = [], views.write_found
    monkeypatch.setattr(views, "codes_again", watched)
    monkeypatch.setattr(views, "write_found", rows_of_the_table)
    small, out = make_small(tmp_path), tmp_path / "out"
    run_small(small, out)
    assert totals == [pytest.approx(pd.read_parquet(out / "latents.parquet")["total"].sum())]
    assert (out / EXAMPLES).exists()
    assert run_small(small, out, examples=False)["examples"] is None
    assert not (out / EXAMPLES).exists()
    assert not (out / HISTOGRAMS).exists()


def test_codes_of_an_analysis_go_where_it_fails(tmp_path, monkeypatch):
    def fail(*_):
        assert list((out / ".partial" / "codes").glob("*.npz"))
        raise ResidscopeError("no")

    small, out = make_small(tmp_path), tmp_path / "out"
    monkeypatch.setattr(views, "write_found", fail)
    with pytest.raises(ResidscopeError, match="no"):
        run_small(small, out)
    assert not (out / ".partial" / "codes").exists()
    assert not (out / "summary.json").exists()
