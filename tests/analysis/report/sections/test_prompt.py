"""The report's section on prompts: what a user wrote is escaped, and the packed numbers are those of the table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.prompt.run import COLUMNS
from analysis.report.data import Results, load_results
from analysis.report.page import render_report
from analysis.report.sections.prompt import _token, section
from tests.support.page import Page, unpack
from tests.support.results import write_results

ROWS = [
    {"prompt": 0, "position": 1, "token_id": 5, "token": "<b>", "layer": 0, "latent": 9, "activation": 2.5},
    {"prompt": 0, "position": 2, "token_id": 6, "token": "&", "layer": 2, "latent": 4, "activation": 1.25},
    {"prompt": 0, "position": 2, "token_id": 6, "token": "&", "layer": 2, "latent": 9, "activation": 0.5},
    {"prompt": 1, "position": 1, "token_id": 5, "token": "x", "layer": 1, "latent": 7, "activation": 3.0},
]


def _latent(latent: int, mass: float, layer_mean: float) -> dict[str, Any]:
    return {"latent": latent, "mass": mass, "layer_mean": layer_mean} | {"peak_layer": 2, "peak": 1, "peak_position": 1}


def _prompt(text: str, tokens: list[str], latents: list[dict[str, Any]]) -> dict[str, Any]:
    change = {"token": "<i>", "token_id": 1, "p_true": 0.25, "p_changed": 0.5, "logit_change": 1.5}
    effect = {"kind": "steer", "latent": 9, "layer": 2, "coefficient": -3.0, "kl_last": 0.125, "kl_mean": 0.0625}
    return {
        "text": text,
        "tokens": [{"token": token, "token_id": 5, "kept": i > 0} for i, token in enumerate(tokens)],
        "next": [{"token": "</script>", "token_id": 3, "p_true": 0.5}],
        "n_active_latents": len(latents),
        "latents": latents,
        "interventions": [effect | {"increased": [change], "decreased": []}],
        "silent": [11],
    }


@pytest.fixture
def results(tmp_path: Path) -> Results:
    write_results(tmp_path, n_layers=3, n_latents=20)
    pq.write_table(pa.Table.from_pylist(ROWS, schema=COLUMNS), tmp_path / "prompt.parquet")
    first = _prompt("<script>$x & y", ["", "<b>", "&"], [_latent(9, 3.0, 0.3), _latent(4, 1.25, 2.0)])
    prompts = [first, _prompt("two", ["", "x"], [_latent(7, 3.0, 1.0)])]
    content = {"schema_version": 1, "layers": [0, 1, 2], "prompts": prompts}
    (tmp_path / "prompt.json").write_text(json.dumps(content))
    return load_results(tmp_path)


def test_texts_and_tokens_are_escaped_and_effects_are_shown(results: Results) -> None:
    page = Page(render_report(results))
    assert "\u201c<script>$x & y\u201d" in page.text
    assert "steer latent 9 at layer 2 by -3" in page.text
    assert "0.125" in page.text
    assert "25\u00a0% \u2192 50\u00a0%" in page.text
    assert "logit +1.5" in page.text
    assert "not ablated: latent 11" in page.text
    assert "</script>" in page.text


def test_pieces_of_characters_are_told_apart_and_control_characters_written() -> None:
    assert _token("\N{REPLACEMENT CHARACTER}", 122) == "<code>&quot;\N{REPLACEMENT CHARACTER}&quot;</code> (122)"
    assert _token("a\x07\u202e\r\n", 5) == r"<code>&quot;a\x07\u202e\r\n&quot;</code>"


def test_packed_numbers_are_those_of_the_table(results: Results) -> None:
    page = Page(render_report(results))
    for i in (0, 1):
        attributes, _ = page.blocks[f"prompt-data-{i}"]
        latents = json.loads(str(attributes["data-latents"]))
        layers = json.loads(str(attributes["data-layers"]))
        found = unpack(page, f"prompt-data-{i}")
        rows = [row for row in ROWS if row["prompt"] == i]
        assert [latents[rank][0] for rank in found["latent"]] == [row["latent"] for row in rows]
        assert [layers[place] for place in found["layer"]] == [row["layer"] for row in rows]
        assert found["position"].tolist() == [row["position"] for row in rows]
        np.testing.assert_array_equal(found["activation"], [row["activation"] for row in rows])
    assert json.loads(str(page.blocks["prompt-data-0"][0]["data-tokens"])) == ["", "<b>", "&"]


def test_without_prompts_the_section_says_how_to_add_one(tmp_path: Path) -> None:
    body = section(load_results(write_results(tmp_path, n_layers=3, n_latents=20))).body
    assert "analyze --prompt" in body
