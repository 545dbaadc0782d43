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

from analysis.latents import windows
from analysis.latents.examples import COLUMNS
from analysis.latents.views import EDGES, N_BINS, write_histograms
from analysis.report import examples as report_examples
from analysis.report.examples import Plan, example_blocks
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
    text, lengths, _ = latent["texts"][i]
    at = np.cumsum([0, *(ord(sign) - 48 for sign in lengths)])
    levels = latent["contexts"]["levels"][i]
    return [(text[at[j] : at[j + 1]], levels[j]) for j in range(len(lengths))]


LATENTS, FIRED = np.array([3, 5, 9]), np.array([10, 30, 20])


def test_contexts_come_once_with_their_layers_and_levels_and_neighbours(tmp_path: Path) -> None:
    texts = ["One", " two", "\n", "three"]
    rows = [
        row(3, 0, 0, 1.0, texts, 1, activations=[None, 1.0, 0.0, 0.5], token=7),
        row(3, 3, 1, 2.5, ["other"], 0, token=8),
        row(3, 4, 0, 2.0, texts, 1, activations=[0.5, 2.0, 0.0, 0.5], token=7),
        row(3, 5, 0, 1.5, texts, 1, token=7),
        row(9, 4, 0, 3.14159, ["caf", "é", "", " \U0001f600"], 2, text_token="é"),
        row(9, 5, 0, 1.5, ["", "x"], 0, text_token="ü", token=1),
    ]
    note, (first, second, third) = unpacked(example_blocks(write(tmp_path, rows), LATENTS, FIRED))
    assert note == ""
    assert first["texts"] == [["One two\nthree", "3415", 1], ["other", "5", 0]]  # the strongest of a layer comes first
    contexts = first["contexts"]
    assert (contexts["layer"], contexts["layers"]) == ([4, 3], ["0, 4-5", "3"])
    assert (contexts["activation"], contexts["foremost"]) == ([2.0, 2.5], 1)
    # of 35, rounded up: 0.5 and 2 of 2.5; as where the context is strongest
    assert shown(first, 0) == [("One", "7"), (" two", "s"), ("\n", "0"), ("three", "7")]
    assert second == {"near": [[3, 0.5]]}
    assert first["near"] == [[5, 0.5], [9, 0.25]]
    assert third["contexts"]["activation"] == [3.14, 1.5]
    # A token that only continues a character: the one that begins it is marked; cut off from it, itself.
    assert [token for token, _ in shown(third, 0)] == ["caf", "é", "", " \U0001f600"]
    assert shown(third, 0)[1][1] == "z"  # with the activation of its last piece
    assert third["texts"][0][2] == 1
    assert [token for token, _ in shown(third, 1)] == ["ü", "x"]


def test_tokens_are_told_above_chance_only_and_words_have_a_block(tmp_path: Path) -> None:
    write(tmp_path, [])
    table = pq.read_table(tmp_path / "latents.parquet").append_column("fires_on", pa.array([["One", "<b>"], [], None]))
    pq.write_table(table, tmp_path / "latents.parquet")
    tokens = {"latent": [3, 5, 9], "promoted": [["one"], [" two", "z"], ["y"]], "suppressed": [["none"]] * 3}
    pq.write_table(pa.table(tokens | {"unembedding_cosine": [0.1, 0.3, 0.2]}), tmp_path / "latent_logits.parquet")
    html = example_blocks(tmp_path, LATENTS, FIRED, chance=0.2)
    _, latents = unpacked(html)
    assert [latent.get("promoted") for latent in latents] == [None, [" two", "z"], None]
    assert [latent.get("suppressed") for latent in latents] == [None, ["none"], None]
    assert 'data-chance="0.2"' in html
    (packed,) = re.findall(r'id="latent-words">([^<]*)<', html)
    assert json.loads(_inflated(packed)) == [["One", "<b>"], [], []]
    everything, latents = (
        example_blocks(tmp_path, LATENTS, FIRED),
        unpacked(example_blocks(tmp_path, LATENTS, FIRED))[1],
    )
    assert "data-chance" not in everything
    assert all("promoted" in latent for latent in latents)


def test_windows_are_cut_between_tokens(tmp_path: Path) -> None:
    words = [f" w{i:02}" for i in range(60)]  # four characters each
    _, (latent, *_) = unpacked(example_blocks(write(tmp_path, [row(3, 0, 0, 1.0, words, 30)]), LATENTS, FIRED))
    before, after = windows.BEFORE // 4, windows.AFTER // 4
    assert [token for token, _ in shown(latent, 0)] == words[30 - before : 31 + after]
    assert latent["texts"][0][2] == before


def test_where_it_does_not_fit_the_foremost_contexts_stay_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        row(3, layer, rank, float(10 - abs(layer - 4)) - 0.1 * rank, [f"{layer}-{rank}"], 0, token=2 * layer + rank)
        for layer in range(9)
        for rank in range(2)
    ] + [row(9, 0, 0, 1.0, ["nine"], 0)]
    write(tmp_path, rows)
    plans = (Plan(16, True, 5), Plan(3, True, 1), Plan(1, False, 0, 0.7), Plan(0, False, 0, 0.0))
    monkeypatch.setattr(report_examples, "PLANS", plans)
    counts = np.zeros((10, 9, N_BINS), np.uint32)
    counts[3, 4, 7:10] = [2, 0, 5]
    write_histograms(tmp_path / "histograms.parquet", counts, range(9))
    html = example_blocks(tmp_path, LATENTS, FIRED)
    assert f'data-edges="{json.dumps([float(f"{edge:.4g}") for edge in EDGES])}"' in html
    note, (latent, *_) = unpacked(html)
    contexts = latent["contexts"]
    assert contexts["layer"] == [4, 3, 5, 2, 6, 1, 7, 0, 8, 4, 3, 5, 2, 6, 1, 7]  # 16 are read
    assert contexts["foremost"] == 9
    assert note == ""
    assert latent["histogram"] == [[4, 7, 2, 0, 5]]
    assert N_BINS == 24

    room = sum(map(len, html.split("\n")[1:])) - 1
    note, (latent, *_) = unpacked(example_blocks(tmp_path, LATENTS, FIRED, budget=room))
    assert latent["contexts"]["layer"] == [4, 3, 5]
    assert len(latent["near"]) == 1
    assert "3 contexts per latent, 1 neighbour; the parquet files" in note

    monkeypatch.setattr(report_examples, "PLANS", plans[2:3])  # latent 3 fires least
    note, (latent, _, ninth) = unpacked(example_blocks(tmp_path, LATENTS, FIRED, budget=10))
    assert latent == {}
    assert ninth["texts"] == [["nine", "4", 0]]
    assert "1 context per latent, only for the 2 latents that fire most, no histogram, no neighbours" in note


def test_nothing_to_show_no_block(tmp_path: Path) -> None:
    pq.write_table(pa.table({"latent": [3, 5, 9]}), tmp_path / "latents.parquet")
    assert example_blocks(tmp_path, LATENTS, FIRED) == ""


def test_the_script_unpacks_as_it_was_packed() -> None:
    script = page_file("latent.js")
    assert f"const PER_BLOCK = {report_examples.PER_BLOCK};" in script
    assert f", 36) / {windows.LEVELS - 1}" in script
    assert "codePointAt(0) - 48" in script
