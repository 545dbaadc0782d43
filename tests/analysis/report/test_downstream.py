"""The report's section on downstream quality: its numbers, its reasons, and lines that go below zero."""

import re
from pathlib import Path

import numpy as np
import pytest

from analysis.report.charts import lines_chart
from analysis.report.data import Results, load_results, show
from analysis.report.downstream import COLUMNS, downstream_section, downstream_title
from tests.support.results import write_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return load_results(write_results(tmp_path_factory.mktemp("results"), n_layers=6, n_latents=50))


def test_every_number_by_layer_and_its_direction_is_shown(results: Results) -> None:
    body = downstream_section(results).body
    for name, words in COLUMNS:
        assert f"<th>{words}</th>" in body
        for value in results.layers[name]:
            assert f"<td>{show(value)}" in body
    low, high = (show(results.layers[f"kl_{end}"][2]) for end in ("low", "high"))
    assert f"<small>{low} to {high}</small>" in body
    assert "nats per token (lower is better)" in body
    assert "higher is better" in body
    assert downstream_title(results) in body
    assert "512 held-out tokens of 9 documents" in body
    assert "0.270 to a token's embedding (random directions: 0.190)" in body


def test_without_the_model_the_section_says_why(tmp_path: Path) -> None:
    def change(summary: dict) -> None:
        summary.update(downstream=None, latent_logits=None, transformer={"reason": "<gone>.", "seconds": 0})

    body = downstream_section(load_results(write_results(tmp_path, n_layers=3, n_latents=20, change=change))).body
    assert body == "<p>Not shown: &lt;gone&gt;.</p>"


def test_lines_below_zero_stay_in_the_frame() -> None:
    html = lines_chart([(np.array([-0.5, 0.0, 1.0]), "a", "ours")], "x", [(0, "0")], "layer", 5)
    path = next(d for d in re.findall(r'class="curve ours" d="([^"]*)"', html) if d.count("L") == 2)
    heights = [float(y) for _, y in re.findall(r"[ML]([\d.]+) ([-\d.]+)", path)]
    assert all(0 <= y <= 1000 for y in heights)
    assert np.interp(0, [-0.5, 1.0], [heights[0], heights[2]]) == pytest.approx(heights[1], abs=0.2)
    assert [float(label) for label in re.findall(r'class="yt"[^>]*>([^<]*)<', html)] == [-0.5, 0, 0.5, 1, 1.5]
