"""delphi's files read back: numbers by hand, and where they are shown."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.delphi.scores import modules_of, read_explanations, read_results
from residscope.errors import IncompatibleError, UsageError
from tests.support.chromium import Page, find_chromium
from tests.support.live import Live, make_live

BINARY = find_chromium()
TEXT = "ends of <clauses>"


def example(activating: bool, prediction: bool | None, probability: float | None = None) -> dict[str, Any]:
    right = None if prediction is None else prediction == activating
    asked = {"str_tokens": ["a"], "activations": [0.5], "distance": 1, "activating": activating}
    return {**asked, "prediction": prediction, "probability": probability, "correct": right}


DETECTION = [
    *(example(True, told, p) for told, p in ((True, 0.9), (True, 0.5), (False, 0.2), (None, None))),
    *(example(False, told, p) for told, p in ((False, 0.5), (True, 0.7))),
]
"""Of three active ones with an answer two are told, of two silent ones one. Of the six pairs the active one is likelier
in 2, and as likely in 1."""

SIMULATION = [
    {"distance": n, "ev_correlation_score": value, "scored_sequence_simulations": [{}] * (4 - n)}
    for n, value in ((0, 0.25), (1, "nan"))
]


def put(folder: Path, name: str, content: Any) -> None:
    path = folder / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if name.endswith("damaged") else json.dumps(content), encoding="utf-8")


def make_results(folder: Path) -> Path:
    put(folder, "explanations/layers.1_latent17", TEXT)
    put(folder, "scores/detection/layers.1_latent17", DETECTION)
    put(folder, "scores/simulation/layers.1_latent17", SIMULATION)
    put(folder, "explanations/all_layers_latent17", "of all")
    put(folder, "scores/fuzz/all_layers_latent3", [example(True, True)])
    put(folder, "scores/embedding/layers.1_latent17", [{"text": "a", "similarity": 0.5}])
    return folder


def test_numbers_are_those_by_hand(tmp_path: Path) -> None:
    found = read_results(make_results(tmp_path), [0, 1, 2], 96, "hash")
    assert [(row["latent"], row["layer"], row["explanation"]) for row in found] == [
        (3, None, None),
        (17, None, "of all"),
        (17, 1, TEXT),
    ]
    assert found[0]["scores"] == [{"scorer": "fuzz", "examples": 1, "balanced_accuracy": None, "auc": None}]
    detection, embedding, simulation = found[2]["scores"]
    assert (detection["scorer"], detection["examples"]) == ("detection", 5)
    assert detection["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert detection["auc"] == pytest.approx(2.5 / 6)
    assert simulation == {"scorer": "simulation", "examples": 4, "correlation": 0.25}
    assert embedding == {"scorer": "embedding"}


def test_modules_of_many_layers_are_no_parts_of_each_other() -> None:
    names = [*modules_of(range(12))]
    assert (names[1], names[11], names[-1]) == ("layers.01", "layers.11", "all_layers")
    assert not [(a, b) for a in names for b in names if a != b and a in b]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("explanations/layers.7_latent1", "a", "MODULE one of layers.0, layers.1, layers.2, all_layers"),
        ("explanations/layers.1_latent96", "a", "N below 96"),
        ("scores/fuzz/layers.1_latent1", 3, "not as delphi writes it"),
        ("scores/fuzz/layers.1_latent1", [{"ev_correlation_score": 1}], "not as delphi writes it"),
        ("explanations/all_layers_latent1.damaged", "{", "should be MODULE_latentN.txt"),
    ],
)
def test_what_is_damaged_or_of_something_else_is_named(tmp_path: Path, name: str, content: Any, said: str) -> None:
    put(tmp_path, name, content)
    with pytest.raises(IncompatibleError, match=said) as raised:
        read_results(tmp_path, [0, 1, 2], 96, "hash")
    assert str(tmp_path / name.partition("/")[0]) in str(raised.value)


def test_results_of_another_autoencoder_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to read there"):
        read_results(tmp_path, [0, 1], 96, "hash")
    config = tmp_path / "latents" / "layers.0" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text('{"residscope": {"sae_hash": "other"}}')
    with pytest.raises(IncompatibleError, match="should be of the autoencoder hash, found other"):
        read_results(make_results(tmp_path), [0, 1, 2], 96, "hash")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    return make_live(tmp_path_factory.mktemp("live"))


def test_they_are_added_to_the_analysis_and_shown(live: Live, tmp_path: Path, capsys: Any) -> None:
    results = str(make_results(tmp_path))
    read = live.analyze("--report", "--delphi-scores", results)["read"]
    assert read == {"rows": 3, "scores": 4}
    said = capsys.readouterr().err
    assert "Read delphi's results for 3 latents and layers, with 4 scores." in said
    assert "Means of detection: balanced accuracy 0.58, AUC 0.42" in said
    assert "Means of embedding: not defined, or in an unknown format" in said
    table = pd.read_parquet(live.folder / "explanations.parquet")
    assert table["latent"].tolist() == [3, 17, 17]
    outputs = (Path(__file__).parents[3] / "docs" / "outputs.md").read_text(encoding="utf-8")
    assert all(name in outputs for name in (*table.columns, *table["scores"][2][0]))
    card = live.open().latent(17)
    first, second = card.data["explanations"]
    assert (first["where"], second["where"], second["explanation"]) == ("all layers", "layer 1", TEXT)
    told = "detection: balanced accuracy 0.58, AUC 0.42; embedding: not defined, or in an unknown format; simulation: "
    assert second["said"].startswith(told)
    shown = card._repr_html_()
    assert "Explained, layer 1: ends of &lt;clauses&gt; <small>detection: balanced accuracy 0.58" in shown
    assert live.open().card(18)["explanations"] == []
    latents: Any = pd.read_parquet(live.folder / "latents.parquet", filters=[("count", ">", 0)])
    report = (live.folder / "report.html").read_text(encoding="utf-8")
    packed = re.findall(r'id="latent-block-\d+">([^<]*)<', report)
    contents = [one for block in packed for one in json.loads(zlib.decompress(base64.b64decode(block)))]
    row = contents[latents["latent"].tolist().index(17)]["explained"]
    assert row == [["all layers", "of all", ""], ["layer 1", TEXT, second["said"]]]
    if BINARY is not None:
        with Page(BINARY, 1200, 900) as page:
            page.open(f"file://{live.folder / 'report.html'}#latent-17")
            words = page.run("""(async () => { for (;;) { const all = [...document.querySelectorAll(".looks p")];
              const at = all.find((one) => one.textContent.startsWith("Explained, layer 1"));
              if (at) return at.textContent; await new Promise((next) => setTimeout(next, 5)); } })()""")
            assert words == f"Explained, layer 1 {TEXT} {second['said']}"
    live.analyze()  # a new analysis: what belonged to the last one goes
    assert read_explanations(live.folder / "explanations.parquet") == {}
