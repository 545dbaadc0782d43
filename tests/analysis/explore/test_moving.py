"""A feature that a model is built to move up by a layer from token to token is seen to move, and is found: from
`harvest` over `analyze` to the API of `residscope explore` and its page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import residscope
from tests.support.browser import Tab
from tests.support.chromium import Page, find_chromium
from tests.support.explored import Served, serving
from tests.support.moving import MOVING, N_LAYERS, Moving, U, make_moving

BINARY = find_chromium()
TEXT = "uuauuu"
WHERE = [(t, t % N_LAYERS) for t, letter in enumerate(TEXT, 1) if letter == "u"]
"""Position and layer; what separates documents stands at position 0."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Moving:
    return make_moving(tmp_path_factory.mktemp("moving"))


@pytest.fixture(scope="module")
def served(made: Moving) -> Iterator[Served]:
    with serving(residscope.open(made.folder, model=made.model)) as served:
        yield served


def found(served: Served, name: str, **given: Any) -> Any:
    answer = served.ask(f"/api/{name}", given)
    assert answer.status == 200, answer.body
    return answer.body["found"]


def test_it_is_on_at_each_u_a_layer_further_up(served: Served) -> None:
    data = found(served, "prompt", text=TEXT)
    (latent,) = [one for one in data["latents"] if one["latent"] == MOVING]
    assert [(position, layer) for position, layer, _ in latent["cells"]] == WHERE
    card = found(served, "card", latent=MOVING)
    assert card["fires_on"] == ["u"]
    assert card["n_layers_active"] == N_LAYERS


@pytest.mark.parametrize("query", [{"tokens": "u"}, {"on": TEXT, "off": "an apple and no egg"}])
def test_search_finds_it(served: Served, query: dict[str, str]) -> None:
    hits = [hit["latent"] for hit in found(served, "search", **query)]
    assert set(hits[:2]) == {MOVING, U}  # that of the letter itself is on at every layer


def test_taken_out_where_it_is_not_on_the_answer_says_why_nothing_changes(served: Served) -> None:
    def ablated(*layers: int) -> Any:
        change = {"kind": "ablate", "latent": MOVING, "layers": layers}
        return found(served, "intervene", text=TEXT, changes=[change])

    assert {layer for _, layer in WHERE} == {0, 1, 2, 4}
    there, elsewhere = ablated(1, 3), ablated(3)
    assert there["kl_last"] > 0
    assert there["notes"] == []
    assert elsewhere["kl_last"] == 0
    assert elsewhere["notes"] == [f"Latent {MOVING} is not on at any of these layers in this text."]


@pytest.mark.skipif(BINARY is None, reason="no chromium or google-chrome on PATH")
def test_the_page_shows_it_move(served: Served, tmp_path: Path) -> None:
    assert BINARY is not None
    with Page(BINARY, 1200, 900) as page:
        tab = Tab(page, served, tmp_path)
        tab.open(f"#text={TEXT}&latent={MOVING}")
        cells = tab.run(
            """const map = await until(() => all("#maps .heat").find((at) =>
              at.getAttribute("aria-label").startsWith("Latent 30,")), "map"), found = [];
            map.focus(); for (let r = 0; r < 9; r++) key(map, "ArrowDown");
            for (let c = 0; c < 9; c++) key(map, "ArrowLeft");
            for (let t = 0; t < 7; t++) { for (let r = 0; r < 5; r++) { const said = text("#maps .readout");
              const at = said.match(/token (\\d).*layer (\\d)/).slice(1).map(Number);
              if (!said.endsWith("activation 0.")) found.push(at);
              key(map, "ArrowUp"); }
              for (let r = 0; r < 5; r++) key(map, "ArrowDown");
              key(map, "ArrowRight"); }
            return found;"""
        )
        assert [tuple(cell) for cell in cells] == WHERE
        tab.open(f"#text={TEXT}&continued=0&changes=ablate:{MOVING}:3")
        note = tab.run("""await until(() => find(".heat")); find("#run").click();
          return (await until(() => find("#outcome .note"))).textContent;""")
        assert note == f"Latent {MOVING} is not on at any of these layers in this text."
        tab.open("#view=search&tokens=u")
        rows = tab.run("""await until(() => text("#search-status").includes("latents"));
          return all("#search-found tbody tr").slice(0, 2).map((at) => at.textContent.trim());""")
        assert [row[:2] for row in sorted(rows)] == [str(U), str(MOVING)]
        assert page.console == []
