"""What the report packs of a latent: windows and levels as written, the strongest layers stay, and a note on cuts."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.latents.examples import COLUMNS
from analysis.latents.views import EDGES, N_BINS, write_histograms
from analysis.report import examples as report_examples
from analysis.report.examples import Plan, example_blocks, strengths
from analysis.report.markup import page_file


def row(latent: int, layer: int, rank: int, activation: float, texts: list[str], marked: int, **more: Any):
    levels = [0.0] * len(texts)
    levels[marked] = activation
    values = {"latent": latent, "layer": layer, "rank": rank, "activation": activation, "document": 0, "token": 0}
    values |= {"text_before": "", "text_token": texts[marked], "text_after": "", "marked": marked, "texts": texts}
    return values | {"activations": levels} | more


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=COLUMNS), folder / "examples.parquet")
    latents = {"latent": [3, 5, 9], "neighbours": [[5, 9], [3], []], "neighbour_cosines": [[0.5, 0.25], [0.5], []]}
    pq.write_table(pa.table(latents), folder / "latents.parquet")
    return folder


def unpacked(html: str) -> tuple[str, list[dict[str, Any]]]:
    """The note, and what report.js makes of the blocks."""
    note, *blocks = re.findall(r'<script[^>]*id="latent-(?:note|block-)[^>]*>([^<]*)</script>', html)
    return note, [latent for block in blocks for latent in json.loads(_inflated(block))]


def _inflated(packed: str) -> bytes:
    return zlib.decompress(base64.b64decode(packed))


def shown(latent: dict[str, Any], i: int) -> list[tuple[str, str]]:
    """Token and level, as latent.js' `tokensOf`."""
    examples = latent["examples"]
    text, lengths, _ = latent["texts"][examples["text"][i]]
    at = np.cumsum([0, *(ord(sign) - 48 for sign in lengths)])
    levels = examples["levels"][i]
    return [(text[at[j] : at[j + 1]], levels[j]) for j in range(len(lengths))]


LATENTS = np.array([3, 5, 9])


def test_windows_levels_and_neighbours_come_back(tmp_path: Path) -> None:
    rows = [
        row(3, 0, 0, 1.0, ["One", " two", "\n", "three"], 1, activations=[None, 1.0, 0.0, 0.5]),
        row(3, 4, 0, 2.0, ["One", " two", "\n", "three"], 1),
        row(9, 4, 0, 3.14159, ["caf", "é", "", " \U0001f600"], 2, text_token="é"),
        row(9, 5, 0, 1.5, ["", "x"], 0, text_token="ü"),
    ]
    note, (first, second, third) = unpacked(example_blocks(write(tmp_path, rows), LATENTS))
    assert note == ""
    assert first["texts"] == [["One two\nthree", "3415", 1]]  # once, though two layers have it
    assert first["examples"]["layer"] == [0, 4]
    assert shown(first, 0) == [("One", "0"), (" two", "i"), ("\n", "0"), ("three", "9")]  # of 35: 17.5 and 8.75, up
    assert shown(first, 1)[1] == (" two", "z")
    assert second == {"near": [[3, 0.5]]}
    assert first["near"] == [[5, 0.5], [9, 0.25]]
    assert third["examples"]["activation"] == [3.14, 1.5]
    # A token that only continues a character: the one that begins it is marked; cut off from it, itself.
    assert [token for token, _ in shown(third, 0)] == ["caf", "é", "", " \U0001f600"]
    assert third["texts"][0][2] == 1
    assert [token for token, _ in shown(third, 1)] == ["ü", "x"]


def test_the_words_that_can_be_searched_for_are_the_marked_and_the_promoted(tmp_path: Path) -> None:
    rows = [
        row(3, 0, 0, 1.0, ["One", " Two"], 1),
        row(3, 4, 0, 2.0, ["One", " Two"], 0),
        row(9, 4, 0, 3.0, ["x", " two", "\U0001f600y"], 1),
        row(9, 5, 0, 3.0, ["\U0001f600", "É"], 1),
    ]
    write(tmp_path, rows)
    tokens = {"latent": [3, 5, 9], "promoted": [["one"], [" two", "z"], []], "suppressed": [["none"]] * 3}
    pq.write_table(pa.table(tokens), tmp_path / "latent_logits.parquet")
    (packed,) = re.findall(r'id="latent-words">([^<]*)<', example_blocks(tmp_path, LATENTS))
    words = {word: np.cumsum(steps).tolist() for word, steps in json.loads(_inflated(packed)).items()}
    assert words == {"one": [0], " two": [0, 1, 2], "z": [1], "é": [2]}


def test_windows_are_cut_between_tokens(tmp_path: Path) -> None:
    words = [f" w{i:02}" for i in range(60)]  # four characters each
    _, (latent, *_) = unpacked(example_blocks(write(tmp_path, [row(3, 0, 0, 1.0, words, 30)]), LATENTS))
    before, after = report_examples.BEFORE // 4, report_examples.AFTER // 4
    assert [token for token, _ in shown(latent, 0)] == words[30 - before : 31 + after]
    assert latent["texts"][0][2] == before


def test_layers_are_ordered_by_their_strongest_example() -> None:
    latent, rank = np.array([1, 1, 1, 1, 4, 4]), np.array([0, 1, 0, 0, 0, 0])
    activation = np.array([2.0, 1.9, 3.0, 2.0, 0.5, 0.75])
    assert strengths(latent, rank, activation).tolist() == [1, 1, 0, 2, 1, 0]


def test_where_it_does_not_fit_the_strongest_layers_stay_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        row(3, layer, rank, float(10 - abs(layer - 4)) - 0.1 * rank, [f"{layer}-{rank}"], 0)
        for layer in range(9)
        for rank in range(2)
    ]
    write(tmp_path, rows)
    monkeypatch.setattr(report_examples, "PLANS", (Plan(10**6, 2, True), Plan(3, 1, True), Plan(1, 0, False)))
    counts = np.zeros((10, 9, N_BINS), np.uint32)
    counts[3, 4, 7:10] = [2, 0, 5]
    write_histograms(tmp_path / "histograms.parquet", counts, range(9))
    html = example_blocks(tmp_path, LATENTS)
    assert f'data-edges="{json.dumps([float(f"{edge:.4g}") for edge in EDGES])}"' in html
    note, (latent, *_) = unpacked(html)
    examples = latent["examples"]
    assert (examples["layer"].count(4), examples["layer"].count(3), len(examples["layer"])) == (2, 2, 11)
    assert "further examples of 2 layers" in note
    assert latent["histogram"] == [[4, 7, 2, 0, 5]]
    assert N_BINS == 24

    monkeypatch.setattr(report_examples, "BUDGET", sum(map(len, html.split("\n")[1:])) - 1)
    note, (latent, *_) = unpacked(example_blocks(tmp_path, LATENTS))
    assert latent["examples"]["layer"] == [3, 4, 4, 5]
    assert latent["examples"]["rank"] == [0, 0, 1, 0]
    assert "the 3 layers at which a latent is most active" in note

    monkeypatch.setattr(report_examples, "BUDGET", 10)  # nothing fits: the last plan, in any case
    note, (latent, *_) = unpacked(example_blocks(tmp_path, LATENTS))
    assert latent["examples"]["layer"] == [4]
    assert "histogram" not in latent
    assert "no histogram" in note


def test_nothing_to_show_no_block(tmp_path: Path) -> None:
    pq.write_table(pa.table({"latent": [3, 5, 9]}), tmp_path / "latents.parquet")
    assert example_blocks(tmp_path, LATENTS) == ""


def test_the_script_unpacks_as_it_was_packed() -> None:
    script = page_file("latent.js")
    assert f"const PER_BLOCK = {report_examples.PER_BLOCK};" in script
    assert f", 36) / {report_examples.LEVELS - 1}" in script
    assert "codePointAt(0) - 48" in script
