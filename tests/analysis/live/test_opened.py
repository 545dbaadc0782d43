"""An analysis opened again: its numbers are those of the files, its search's those of a search written out."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.delphi.scores import COLUMNS
from analysis.live.opened import Analysis
from analysis.prompt.attribution import attribute
from analysis.prompt.intervene import Intervention
from residscope.errors import IncompatibleError, UsageError
from tests.support.harvested import make_checkpoint
from tests.support.live import TEXT, Live, make_live


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    return make_live(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def opened(live: Live) -> Analysis:
    return live.open()


def test_a_card_has_the_numbers_of_the_files(live: Live, opened: Analysis) -> None:
    table: Any = pd.read_parquet(live.folder / "latents.parquet")
    examples = pd.read_parquet(live.folder / "examples.parquet")
    logits = {row["latent"]: row for row in pq.read_table(live.folder / "latent_logits.parquet").to_pylist()}
    histograms = pd.read_parquet(live.folder / "histograms.parquet")
    for latent in table["latent"][table["count"] > 0].tolist()[:20]:
        card, row = opened.card(latent), table.iloc[latent]
        json.dumps(card, allow_nan=False)
        for name in ("latent", "count", "layer_mean", "n_layers_active"):
            assert card[name] == row[name]
        for name in ("counts", "means", "probs"):
            expected = [None if np.isnan(value) else value for value in row[name].tolist()]
            assert card[name] == expected
        own = examples[examples["latent"] == latent]
        assert {(one["document"], tuple(one["layers"])) for one in card["examples"]} == {
            (next(iter(rows["document"])), tuple(sorted(rows["layer"]))) for _, rows in own.groupby("token")
        }
        assert max(one["activation"] for one in card["examples"]) == own["activation"].max()
        for one in card["examples"]:
            assert one["tokens"][one["position"]]["activation"] == pytest.approx(one["activation"])
        assert [one["token"] for one in card["promotes"]] == logits[latent]["promoted"]
        assert [one["logit"] for one in card["suppresses"]] == logits[latent]["suppressed_logits"]
        counts = histograms[histograms["latent"] == latent]["counts"]
        assert sum(sum(row[2:]) for row in card["histogram"]["rows"]) == sum(map(sum, counts)) == row["count"]
    dead = int(table["latent"][table["count"] == 0].iloc[0]) if (table["count"] == 0).any() else None
    if dead is not None:
        card = opened.card(dead)
        assert (card["layer_mean"], card["histogram"], card["examples"]) == (None, None, [])
    assert repr(opened).endswith(f"{opened.summary['n_layers']} layers, 96 latents)")
    with pytest.raises(UsageError, match="there are latents 0 to 95, found 96"):
        opened.card(96)
    with pytest.raises(UsageError, match="found '5'"):
        opened.card("5")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"profile should be one of .*, found 'x'"):
        opened.search(profile="x")


def test_tables_are_the_files(live: Live, opened: Analysis) -> None:
    pd.testing.assert_frame_equal(opened.latents, pd.read_parquet(live.folder / "latents.parquet"))
    pd.testing.assert_frame_equal(opened.layers, pd.read_parquet(live.folder / "layers.parquet"))
    assert opened.summary == json.loads((live.folder / "summary.json").read_text())


def test_a_prompt_has_the_numbers_of_the_command(live: Live, opened: Analysis) -> None:
    first = opened.prompt(TEXT, 300).data
    latent = first["latents"][0]["latent"]
    words = ["--ablate", f"{latent}:all", "--steer", f"{latent}:0,2:3.5", "--json"]
    written = live.analyze("--prompt", TEXT, *words)["prompts"][0]
    for name in ("text", "tokens", "next", "n_active_latents"):
        assert first[name] == written[name]
    mine = {one["latent"]: one for one in first["latents"]}
    for one in written["latents"]:
        assert {name: mine[one["latent"]][name] for name in one} == one
    rows = pd.read_parquet(live.folder / "prompt.parquet")
    for one in first["latents"]:
        own = rows[rows["latent"] == one["latent"]]
        assert one["cells"] == [list(cell) for cell in zip(own.position, own.layer, own.activation, strict=True)]
    changes: list[dict[str, Any]] = [
        {"kind": "ablate", "latent": latent, "layers": "all"},
        {"kind": "steer", "latent": latent, "layers": [0, 2], "coefficient": 3.5},
    ]
    for change, expected in zip(changes, written["interventions"], strict=True):
        effect = opened.intervene(TEXT, [change])
        for name in ("kl_last", "kl_mean", "increased", "decreased"):
            assert effect[name] == expected[name]
        assert [one["p"] for one in effect["next_changed"]] == [one["p_changed"] for one in expected["next_changed"]]
        assert [one["p"] for one in effect["next_true"]] == [one["p_true"] for one in written["next"]]
    assert opened.prompt(TEXT, 2).data["latents"] == first["latents"][:2]


def test_effects_on_a_prediction(opened: Analysis) -> None:
    live, tokens = opened.live, opened.live.tokens(TEXT)
    (n,), (m,) = live.tokenizer.encode(["n", "m"])
    found = opened.live.activations(TEXT)
    table: Any = opened.attribute(TEXT, "n", against="m", position=6)
    expected, missed = attribute(live.prompted, tokens, live.layers, found, 6, n, m)
    assert table.attrs == {"text": TEXT, "token": "n", "against": "m", "position": 6, "missed": missed}
    assert table["effect"].tolist() == expected[np.argsort(-np.abs(expected), kind="stable")].tolist()
    one = table.iloc[0]
    same = (found.position == one.position) & (found.layer == one.layer) & (found.latent == one.latent)
    assert expected[same].tolist() == [one.effect]
    assert one.token == tokens.texts[one.position]
    attrs, likeliest = opened.attribute(TEXT).attrs, opened.prompt(TEXT).data["next"][0]["token"]
    assert (attrs["token"], attrs["against"], attrs["position"]) == (likeliest, None, len(tokens.ids) - 1)
    shown = opened.prompt(TEXT, 300, effects_after=6)
    assert "<svg" in shown._repr_html_()
    data = shown.data
    rows: Any = opened.attribute(TEXT, position=6)
    assert data["effects"] == {"after": 6, "token": rows.attrs["token"], "against": None}
    other = opened.prompt(TEXT, 1, effects_after=6, effects_against="m").data
    assert other["effects"]["against"] == "m"
    rows_against: Any = opened.attribute(TEXT, against="m", position=6)
    sums = rows_against.groupby(["latent", "layer"])["effect"].sum()
    assert abs(other["latents"][0]["effect"]) == pytest.approx(sums.abs().max(), rel=1e-9)
    assert opened.prompt(TEXT, 2, effects_after=6).data["latents"] == data["latents"][:2]
    assert len(data["latents"]) == data["n_active_latents"]
    for latent in data["latents"]:
        by_layer = rows[rows["latent"] == latent["latent"]].groupby("layer")["effect"].sum()
        assert latent["effect"] == pytest.approx(by_layer[latent["effect_layer"]], rel=1e-9, abs=1e-15)
        assert abs(latent["effect"]) == pytest.approx(by_layer.abs().max(), rel=1e-9, abs=1e-15)
    with pytest.raises(
        UsageError, match="'mary' should be one token of the model, such as ' the', found 'm', 'a', 'r', 'y'"
    ):
        opened.attribute(TEXT, "mary")
    with pytest.raises(UsageError, match="against should be another token than the predicted one, found 'n' for both"):
        opened.attribute(TEXT, "n", against="n")
    with pytest.raises(UsageError, match=r"position should be 0 to 13, found 9\.0"):
        opened.attribute(TEXT, position=9.0)  # type: ignore[arg-type]
    change = {"kind": "ablate", "latent": table["latent"][0], "layers": [table["layer"][0]]}  # numpy's integers
    plain = {"kind": "ablate", "latent": int(table["latent"][0]), "layers": [int(table["layer"][0])]}
    assert opened.intervene(TEXT, [change]) == opened.intervene(TEXT, [plain])
    here, (other,) = int(table["position"][0]), live.tokenizer.encode(["m"])[0]
    asked = opened.intervene(TEXT, [{**plain, "positions": [here]}], tokens=["n", "m"])
    run = live._read(TEXT).run
    (placed,) = [Intervention(**{**plain, "layers": tuple(plain["layers"]), "positions": (here,)})]
    assert [one["token"] for one in asked["watched"]] == ["n", "m"]
    assert asked["watched"][1].items() >= run.effect([placed], [other]).watched[0]._asdict().items()
    assert asked["notes"] == []
    off = next(p for p in range(1, 14) if not ((found.position == p) & (found.latent == plain["latent"])).any())
    nothing = opened.intervene(TEXT, [{**plain, "positions": [off]}])
    assert nothing["kl_mean"] == 0
    assert nothing["notes"] == [
        f"Latent {plain['latent']} is not on at any of these layers and positions in this text."
    ]
    with pytest.raises(UsageError, match="'mary' should be one token"):
        opened.intervene(TEXT, [plain], tokens=["mary"])
    with pytest.raises(UsageError, match="position should be 0 to 13, found 14"):
        opened.attribute(TEXT, position=14)


def test_search_by_text_layers_and_profile(live: Live, opened: Analysis) -> None:
    table: Any = opened.latents
    found = opened.search(tokens="a", limit=200)
    assert len(found) > 0
    assert found["score"].is_monotonic_decreasing
    n_tokens = table["n_tokens"][found["latent"]].to_numpy()
    assert found["share_of_tokens"].tolist() == (n_tokens / opened.summary["n_tokens"]).tolist()
    late = opened.search(from_layer=1, to_layer=2, limit=200)
    assert set(late["latent"]) == {i for i in table["latent"][table["count"] > 0] if sum(table["probs"][i][1:3]) >= 0.5}
    kind = table["profile"][table["count"] > 0].iloc[0]
    same = set(opened.search(profile=kind, limit=200)["latent"])
    assert same == set(table["latent"][(table["profile"] == kind) & (table["count"] > 0)])
    both = set(opened.search(tokens="a", profile=kind, limit=200)["latent"])
    assert both == same & set(found["latent"])
    assert opened.search().empty
    on, off = (set(opened.live.activations(text).latent.tolist()) for text in (TEXT, "zzz"))
    assert set(opened.search(on=TEXT, off="zzz", limit=200)["latent"]) == on - off


def test_search_by_what_is_promoted(live: Live, opened: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(opened.summary, "latent_logits", {"unembedding_chance": -1.0})
    rows = pq.read_table(live.folder / "latent_logits.parquet").to_pylist()
    token = rows[3]["promoted"][0].strip().lower()
    expected = {row["latent"] for row in rows if token in [one.strip().lower() for one in row["promoted"]]}
    assert set(opened.search(promotes=token, limit=200)["latent"]) == expected
    monkeypatch.setitem(opened.summary, "latent_logits", {"unembedding_chance_99": 2.0})
    assert opened.search(promotes=token).empty


def test_search_by_the_words_of_an_explanation(tmp_path: Path) -> None:
    opened = make_live(tmp_path).open()
    with pytest.raises(UsageError, match="--delphi-scores"):
        opened.search(explained="line")
    said = [(3, None, "Ends of lines"), (3, 1, "lines that end"), (5, None, "ends of words"), (7, 2, None)]
    rows = [{"latent": j, "layer": layer, "explanation": text, "scores": []} for j, layer, text in said]
    pq.write_table(pa.Table.from_pylist(rows, schema=COLUMNS), opened.folder / "explanations.parquet")
    found = opened.search(explained="LINES end")
    assert list(found["latent"]) == [3]
    assert list(found["why"]) == ["explained, all layers: Ends of lines"]
    assert set(opened.search(explained="ends")["latent"]) == {3, 5}
    assert opened.search(explained="ends zebra").empty
    assert opened.search(explained="  ").empty


@pytest.mark.parametrize("inside", [True, False])
def test_what_was_moved_along_is_found(tmp_path: Path, inside: bool) -> None:
    live, place = make_live(tmp_path), tmp_path / "moved"
    place.mkdir()
    folder = live.folder.rename(place / "ckpt.analysis")
    for one in (live.checkpoint, live.made.store.path):
        one.rename((folder if inside else place) / one.name)
    opened = Analysis.open(folder, model=str(live.made.model_folder))
    assert opened.live.layers == opened.layer_numbers


def test_what_is_missing_is_named(live: Live, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no analysis there"):
        Analysis.open(tmp_path)
    with pytest.raises(UsageError, match=r"its store was not found at .*nowhere; say where it is: store="):
        _ = Analysis.open(live.folder, store=tmp_path / "nowhere").live
    make_checkpoint(tmp_path / "other.pt", live.made.store, k=4)
    with pytest.raises(IncompatibleError, match="give its own store and sae"):
        _ = Analysis.open(live.folder, sae=tmp_path / "other.pt").live
    with pytest.raises(UsageError, match="give its path with --model"):
        _ = Analysis.open(live.folder).live


def test_damaged_files_are_refused(live: Live, tmp_path: Path) -> None:
    folder = tmp_path / "an"
    shutil.copytree(live.folder, folder)
    rows = pq.read_table(folder / "random_examples.parquet")
    pq.write_table(rows.drop_columns("texts"), folder / "random_examples.parquet")
    with pytest.raises(IncompatibleError, match=r"a table is damaged, or of another version .*: run `analyze` again"):
        Analysis.open(folder).latent(int(rows["latent"][0].as_py()))
    summary = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text(summary.replace('"n_tokens": ', '"n_tokens": 1', 1))
    with pytest.raises(IncompatibleError, match=r"summary\.json: damaged \(changed after `analyze` wrote it\)"):
        Analysis.open(folder)
    with pytest.raises(UsageError, match="tokens should be a text or a list of texts"):
        live.open().search(tokens=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kind": "push", "latent": 3, "layers": [1]},
        {"kind": "ablate", "latent": True, "layers": [1]},
        {"kind": "ablate", "latent": 3, "layers": []},
        {"kind": "ablate", "latent": 3, "layers": ["1"]},
        {"kind": "steer", "latent": 3, "layers": [1]},
        {"kind": "steer", "latent": 3, "layers": [1], "coefficient": float("nan")},
        {"kind": "ablate", "latent": 96, "layers": [1]},
        {"kind": "ablate", "latent": 3, "layers": [7]},
        {"kind": "ablate", "latent": 3, "layers": [1], "positions": []},
        {"kind": "ablate", "latent": 3, "layers": [1], "positions": 3},
        {"kind": "ablate", "latent": 3, "layers": [1], "positions": [0]},
        {"kind": "ablate", "latent": 3, "layers": [1], "positions": [3, 14]},
        {"kind": "ablate", "latent": 3, "layers": [1], "position": [3]},
    ],
)
def test_a_change_that_makes_no_sense_is_refused(opened: Analysis, change: dict[str, Any]) -> None:
    with pytest.raises(
        UsageError,
        match=r"a change should be|has latents 0 to 95|trained on layers|should be 1 to 13, and not of special",
    ):
        opened.intervene(TEXT, [change])
    with pytest.raises(UsageError, match="0 to 64, found 65"):
        opened.intervene(TEXT, [], 65)
