"""Analyses side by side: numbers taken over as they are, depth divided out, and files one can read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.cli import main
from analysis.compare.measure import in_order, run_names
from analysis.results.summary import HASH, content_hash
from analysis.run import analyze
from tests.support.results import write_results
from tests.support.small import analyze_config, make_small


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A real analysis with nulls, and made-up ones of other depths, one without intervals, one of one layer."""
    root = tmp_path_factory.mktemp("runs")
    small = make_small(root)
    analyze(analyze_config(store=small.store, sae=small.sae, out=root / "real", report=False, dtype="float64"))
    made: list[Path] = []

    def old(summary: dict[str, Any]) -> None:
        for name in ("nulls", "persistence"):
            del summary[name]

    shapes: dict[str, dict[str, Any]] = {
        "deep": {"n_layers": 12, "change": old},
        "shallow": {"n_layers": 4, "ci": False},
        "one": {"n_layers": 1},
    }
    for name, options in shapes.items():
        (root / name).mkdir()
        made.append(write_results(root / name, n_latents=60, **options))
    return [root / "real", *made]


def test_numbers_are_those_of_the_summaries_and_depth_is_divided_out(folders, tmp_path, capsys):
    assert main(["--compare", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [r["run"] for r in result["runs"]] == ["real", "deep", "shallow", "one"]
    for folder, found in zip(folders, result["runs"], strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        uniform = np.var(summary["layer_numbers"])
        if folder.name in ("deep", "shallow"):
            assert uniform == pytest.approx((summary["n_layers"] ** 2 - 1) / 12)
        for weighting in ("mass", "equal", "latent"):
            assert found["variance"][weighting] == summary["variance"][weighting]
            for name, value in found["normalised"][weighting].items():
                if name == "ci95":
                    for part, bounds in value.items():
                        expected = np.array(summary["variance"][weighting]["ci95"][part]) / uniform
                        np.testing.assert_allclose(bounds, expected)
                elif uniform:
                    assert value == pytest.approx(summary["variance"][weighting][name] / uniform)
                else:
                    assert value is None
        for name, part in {"fvu": "reconstruction", "l0": "reconstruction", "delta_ce": "downstream"}.items():
            numbers = summary.get(part) or {"ci95": {}}
            assert found[name] == numbers.get(name)
            assert [found[f"{name}_low"], found[f"{name}_high"]] == (numbers["ci95"].get(name) or [None, None])
        assert folder.name in printed
        assert f"{summary['reconstruction']['fvu']:.3g}" in printed
    assert result["runs"][0]["null_ratio"]["layers_permuted"]["variance"]["mass"]["within_token"] > 0
    assert result["runs"][1]["null_ratio"] is None


def test_the_table_has_a_row_for_each_run_and_weighting(folders, tmp_path, capsys):
    assert main(["--compare", *map(str, folders), "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    table = pd.read_parquet(tmp_path / "compare.parquet").set_index(["run", "weighting"])
    assert len(table) == 3 * len(folders)
    for found in result["runs"]:
        for weighting in ("mass", "equal", "latent"):
            row, variance = table.loc[(found["run"], weighting)], found["variance"][weighting]
            assert row["within_token"] == pytest.approx(variance["within_token"])
            if variance["ci95"] and variance["ci95"].get("total"):
                assert [row["total_low"], row["total_high"]] == pytest.approx(variance["ci95"]["total"])
            else:
                assert np.isnan(row["total_low"])
    assert table.loc[("real", "mass"), "run_length"] == pytest.approx(
        result["runs"][0]["persistence"]["mass"]["run_length"]
    )
    assert np.isnan(table.loc[("real", "latent"), "run_length"])


def test_one_figure_the_same_each_time(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        assert main(["--compare", *map(str, folders), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a" / "compare.png").read_bytes() == (tmp_path / "b" / "compare.png").read_bytes()
    svg = (tmp_path / "a" / "compare.svg").read_text()
    for words in ("real", "shallow", "uniformly drawn layer", "aggregate over token-level", "not defined", "one layer"):
        assert words in svg


def test_a_sweep_reads_as_one_table_and_kinds_stand_together():
    def made(model: str, r: float, k: int | None, **more: Any) -> dict[str, Any]:
        shape = {"model": model, "random_init": False, "lens": None, "layers": [0, 1], "expansion_factor": r, "k": k}
        return shape | more

    given = [
        made("b", 16, 64),
        made("a", 4, 32),
        made("b", 16, 32),
        made("b", 16, 32, random_init=True),
        made("b", 4, 128),
        made("b", 16, 32, lens="affine"),
        made("b", 4, None, random_init=True),
        made("b", 2, 32, layers=[1]),
        made("b", 4, 32),
    ]
    assert [given.index(run) for run in in_order(given)] == [8, 4, 2, 0, 1, 6, 3, 5, 7]


def test_rows_say_what_a_run_is(tmp_path, capsys):
    def of(**store: Any) -> Any:
        return lambda summary: summary["provenance"]["store"].update(store)

    for name, layers, change in (
        ("plain", 4, of()),
        ("lens", 4, of(lens={"id": "some/lens"})),
        ("twin", 4, of(random_init=True)),
        ("one", 1, of()),
    ):
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, n_layers=layers, n_latents=20, change=change)
    folders = [str(tmp_path / name) for name in ("plain", "lens", "twin", "one")]
    assert main(["--compare", *folders, "--out", str(tmp_path / "out")]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.split("\n\n")[0].splitlines()[2:]}
    for name, words in {
        "plain": "SmolLM2-135M",
        "lens": "SmolLM2-135M, tuned lens",
        "twin": "SmolLM2-135M, untrained",
        "one": "SmolLM2-135M",
    }.items():
        assert rows[name].endswith(words)
    assert "layer 0 only" in rows["one"]
    table = pd.read_parquet(tmp_path / "out" / "compare.parquet")
    assert {"expansion_factor", "k", "fvu", "fvu_low", "delta_ce", "delta_ce_high", "reference_ratio"} <= set(table)
    assert [list(layers) for layers in table["layers"][::3]] == [[0, 1, 2, 3]] * 3 + [[0]]


def test_names_take_as_many_parts_as_tell_runs_apart():
    assert run_names([Path("a/x"), Path("b/y/summary.json")]) == ["x", "y"]
    assert run_names([Path("a/x"), Path("b/x/summary.json")]) == ["a/x", "b/x"]
    assert run_names([Path("x"), Path("x")]) == ["1: x", "2: x"]


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 3, "no summary.json"),
        ('{"schema_version": 1}', 3, "is damaged or was not written by `analyze` (provenance is None)"),
        ("{", 3, "not valid JSON"),
        ('{"schema_version": 0}', 3, "schema_version is 0"),
    ],
)
def test_what_is_no_analysis_is_one_clear_line(tmp_path, capsys, content, code, words):
    (tmp_path / "x").mkdir()
    if content is not None:
        (tmp_path / "x" / "summary.json").write_text(content)
    assert main(["--compare", str(tmp_path / "x"), "--out", str(tmp_path / "out")]) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_what_train_compare_wrote_is_left_alone(folders, tmp_path, capsys):
    (tmp_path / "compare.json").write_text('{"store": {}}')
    assert main(["--compare", *map(str, folders), "--out", str(tmp_path)]) == 2
    assert "already contains a comparison by `train compare`" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]


def test_help_of_the_comparison(capsys):
    with pytest.raises(SystemExit):
        main(["--compare", "--help"])
    assert "models of different depth" in capsys.readouterr().out


def test_a_summary_that_was_changed_is_refused(folders, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    text = (folders[0] / "summary.json").read_text()
    summary = json.loads(text)
    timed = summary | {"seconds": 5, "transformer": {**summary["transformer"], "seconds": 7}}
    assert content_hash(timed) == summary[HASH]  # the same findings, whatever the time
    rng, changed = np.random.default_rng(0), 0
    for place in rng.integers(len(text), size=200):
        damaged = bytearray(text.encode())
        damaged[place] ^= 1 << int(rng.integers(7))
        try:
            found = json.loads(damaged)
        except ValueError:
            continue
        if isinstance(found.get("transformer"), dict):
            found["transformer"] |= {"seconds": 7}
        assert (content_hash(found) == found.get(HASH)) == ({**found, "seconds": 5} == timed), place
        changed += 1
    assert changed > 30
    for damaged, said in (
        (text.replace('"n_tokens": ', '"n_tokens": 1', 1), "damaged (changed after `analyze` wrote it)"),
        (text.replace('"n_tokens": ', '"n_tokens": NaN, "n": ', 1), "damaged (Out of range float"),
        ("[" * 100_000, "not valid JSON (nested too deeply)"),
    ):
        (tmp_path / "summary.json").write_text(damaged)
        assert main(["--compare", str(tmp_path), *out]) == 3
        assert f"{tmp_path / 'summary.json'}: {said}" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k != "content_hash"}))
    assert main(["--compare", str(tmp_path), *out]) == 0
    assert "written by an earlier version, without a content_hash" in capsys.readouterr().err


def test_a_summary_that_lacks_anything_or_has_it_wrong_is_refused(folders, tmp_path, capsys):
    summary = json.loads((folders[0] / "summary.json").read_text())
    del summary["content_hash"]  # as an earlier version wrote it
    optional = {"reconstruction", "persistence", "nulls", "downstream"}
    for name in (
        "provenance",
        "split",
        "n_tokens",
        "layer_numbers",
        "latents",
        "variance",
        "validation_fvu",
        *optional,
    ):
        for value in (5, "x", []):
            if name in ("n_tokens", "validation_fvu") and value == 5:
                continue
            (tmp_path / "summary.json").write_text(json.dumps(summary | {name: value}))
            assert main(["--compare", str(tmp_path), "--out", str(tmp_path / "out")]) == 3, (name, value)
            assert f"--compare {tmp_path}: its summary.json is damaged" in capsys.readouterr().err
    whole = summary["persistence"]["mass"]
    summary["persistence"]["mass"] = {"contiguitx" if key == "contiguity" else key: whole[key] for key in whole}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert main(["--compare", str(tmp_path), "--out", str(tmp_path / "out")]) == 3
    assert "(no 'contiguity')" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    del summary["variance"]["mass"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert main(["--compare", str(tmp_path), "--out", str(tmp_path / "out")]) == 3
    assert "(no 'mass')" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), "x", [[]]])
def test_a_damaged_number_is_one_line_and_leaves_no_comparison(value, folders, tmp_path, capsys):
    summary = json.loads((folders[0] / "summary.json").read_text())
    del summary["content_hash"]  # as an earlier version wrote it
    summary["variance"]["mass"]["ci95"]["within_token"] = [value, value]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert main(["--compare", str(tmp_path), str(folders[1]), "--out", str(tmp_path / "out")]) == 3
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "out" / "compare.json").exists()
