"""The report's section on downstream quality: its numbers and its reasons."""

from pathlib import Path

import pytest

from analysis.report.data import Results, load_results
from analysis.report.markup import show
from analysis.report.sections.downstream import COLUMNS, downstream_title, section
from tests.support.results import write_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return load_results(write_results(tmp_path_factory.mktemp("results"), n_layers=6, n_latents=50))


def test_every_number_by_layer_and_its_direction_is_shown(results: Results) -> None:
    body = " ".join(section(results).body.split())
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

    body = section(load_results(write_results(tmp_path, n_layers=3, n_latents=20, change=change))).body
    assert body == "<p>Not shown: &lt;gone&gt;.</p>"
