"""The page of `residscope explore` in a real browser: every control is used, and nothing is said on the console."""

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from residscope.errors import ResidscopeError
from tests.support.browser import Tab
from tests.support.chromium import Page, find_chromium
from tests.support.explored import Planted, Served, serving

BINARY = find_chromium()
pytestmark = pytest.mark.skipif(BINARY is None, reason="no chromium or google-chrome on PATH")


class Explored(Tab):
    """A tab over the planted analysis."""

    def __init__(self, page: Page, served: Served, folder: Path, planted: Planted) -> None:
        super().__init__(page, served, folder)
        self.planted = planted


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explored]:
    assert BINARY is not None
    planted = Planted()
    with serving(planted) as served, Page(BINARY, 1200, 900) as page:
        yield Explored(page, served, tmp_path_factory.mktemp("saved"), planted)


@pytest.fixture
def tab(browser: Explored) -> Iterator[Explored]:
    browser.page.console.clear()
    browser.planted.asked.clear()
    yield browser
    assert [line for line in browser.page.console if "status of 40" not in line] == []  # the browser's own words
    assert all(
        at.startswith((f"http://127.0.0.1:{browser.served.port}/", "data:", "blob:", "about:"))
        for at in browser.page.requests
    )
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth;")


SENTENCE = "#text=all+is+going+up"


def test_a_latent_that_moves_up_a_layer_per_token_is_seen_to_move(tab: Explored) -> None:
    tab.open()
    tab.run("""change("#text", "all is going up", "input"); await until(() => all(".heat").length === 3);""")
    cells = tab.run("""const map = all(".heat").find((at) => at.getAttribute("aria-label").startsWith("Latent 7,")),
      found = [];
      map.focus(); for (let r = 0; r < 9; r++) key(map, "ArrowDown");
      for (let c = 0; c < 9; c++) key(map, "ArrowLeft");
      for (let t = 0; t < 5; t++) { for (let r = 0; r < 5; r++) { const said = text("#maps .readout");
        if (!said.endsWith("activation 0."))
          found.push(said.match(/token (\\d).*layer (\\d): activation (.*)\\.$/).slice(1));
        key(map, "ArrowUp"); }
        for (let r = 0; r < 5; r++) key(map, "ArrowDown"); key(map, "ArrowRight"); }
      return found;""")
    assert cells == [["1", "3", "2.00"], ["2", "4", "3.00"], ["3", "5", "4.00"], ["4", "6", "5.00"]]


def test_a_cell_opens_the_card_of_its_latent_and_what_it_holds_is_text(tab: Explored) -> None:
    tab.open(SENTENCE)
    tab.run("""const map = await until(() => all(".heat")[0]); const at = map.getBoundingClientRect();
      map.dispatchEvent(new PointerEvent("pointermove", { clientX: at.right - 5, clientY: at.top + 22,
        bubbles: true }));
      map.dispatchEvent(new MouseEvent("click", { clientX: at.right - 5, clientY: at.top + 22, bubbles: true }));
      await until(() => text("#card").includes("Mean layer"));""")
    assert tab.state == "text=all is going up&latent=8&layer=6&token=4"
    card = tab.run('return text("#card");')
    for words in (
        "Latent 8",
        "stays",
        "Profileearly",
        "Mean layer3.14",
        "Firings15",
        "1.50 at layer 3, also 4",
        "fore\u23ce",
    ):
        assert words in card
    assert "no higher than those of random directions" in card
    assert "Promotes" not in card
    assert "Tokens it fires at5, 12.5 %Layers it is on at, per such token3.0" in card
    assert "Dense: it fires at 12.5 %" in card
    assert tab.run('return text("#card mark");') == "fore\u23ce"
    tab.run("""named("Close").click(); await until(() => find("#card").hidden);""")
    tab.open("#latent=8")
    tab.run("""await until(() => text("#card").includes("Fires on")); key(find("#card"), "Escape");
      await until(() => find("#card").hidden);""")
    tab.open("#latent=9")
    tab.run("""await until(() => text("#card").includes("Fires on"));""")
    assert tab.run('return [all("#card code")[0].textContent, all("main img, aside img").length];') == [
        "<img src=x onerror=alert(1)>",
        0,
    ]
    tab.open("#latent=7")
    tab.run("""await until(() => text("#card").includes("Fires on")); key(find("#card .heat"), "ArrowRight");""")
    card = tab.run('return text("#card");')
    assert "no higher" not in card
    assert "Promotes  up \u23ce\u00b7\u00b7" in card  # spaces are seen where there is nothing else
    assert tab.run('return text("#card .readout");') == "Layer 2, activation 0.500 to 1.00: 0 tokens."
    tab.run("""key(find("#card .heat"), "ArrowUp");""")
    assert tab.run('return text("#card .readout");') == "Layer 3, activation 0.500 to 1.00: 4 tokens."


def test_a_latent_that_is_silent_or_not_there(tab: Explored) -> None:
    tab.open("#latent=10")
    tab.run("""await until(() => text("#card").includes("never fired"));""")
    tab.open("#latent=99")
    tab.run("""await until(() => text("#card").includes("found 99"));""")


def test_a_token_shows_what_switches_on_stays_and_switches_off(tab: Explored) -> None:
    tab.open(SENTENCE)
    tab.run("""(await until(() => named("token 4: up"))).click(); await until(() => find(".switch"));""")
    assert tab.run('return all(".switch").map((at) => at.getAttribute("aria-label"));') == [
        "Latent 9: on at layers 2, 6",
        "Latent 8: on at layers 3 to 5",
        "Latent 7: on at layers 6",
    ]
    steps = tab.run("""return [0, 1, 3].map((i) => { change("#switch-step", String(i));
      return [...find("#switch-step").closest("figure").querySelectorAll(".readout span")].map((at) =>
        at.textContent.trim()); });""")
    tab.run("""change("#shown", "12"); change("#sort", "specificity");""")
    n = 4  # tokens; by latent its mass at the last one, in the text, and its specificity to that
    known = {7: (5.0, 14.0, 7.0), 8: (6.0, 24.0, 8.0), 9: (0.373456789, 0.373456789, 9.0)}
    expected = {j: mass / np.exp(specificity / mass) / n for j, (_, mass, specificity) in known.items()}
    there = {j: at * np.log(at / expected[j]) for j, (at, _, _) in known.items()}
    maps = tab.run('return all(".heat").map((at) => Number(at.getAttribute("aria-label").match(/\\d+/)[0]));')
    assert maps == sorted(there, key=lambda j: -there[j]) == [9, 7, 8]
    assert tab.run('return all("#maps h3").at(-1).textContent;').endswith("the most specific there")
    assert tab.run('return [...find(".switch").querySelectorAll("title, text")].map((at) => at.textContent);') == [
        "Latent 9: on at layers 2, 6",
        "9  dense  <img src=x onerror=al",
    ]
    assert steps == [
        ["1 switch on 8", "0 stay", "1 switch off 9"],
        ["0 switch on", "1 stay 8", "0 switch off"],
        ["2 switch on 9 7", "0 stay", "1 switch off 8"],
    ]
    tab.run("""key(named("Latent 8: on"), "Enter"); await until(() => text("#card h2") === "Latent 8");""")
    assert "latent=8&layer=3&token=4" in tab.state
    tab.run("""all("figure .readout a").at(-1).click(); await until(() => text("#card h2") !== "Latent 8");""")
    tab.run("""named("token 4: up").click(); await until(() => !find(".switch"));""")
    assert tab.run('return named("token 0").disabled;')


def test_what_the_model_expects_after_a_token_and_the_text_up_to_it(tab: Explored) -> None:
    tab.open(SENTENCE)
    tab.run("""(await until(() => named("token 4: up"))).click(); await until(() => text("#next").includes("up?"));""")
    assert "After token 4 \u201cup\u201d: up? 25.0 %" in tab.run('return text("#next");')
    assert not tab.run('return find("#next a");')  # these tokens do not make the text
    tab.run("""named("token 1: all").click(); await until(() => text("#next").includes("all?"));
      find("#next a").click(); await until(() => text("#sentence-status").includes("1 token"));""")
    assert tab.state == "text=all"


def test_latents_are_ordered_and_cut(tab: Explored) -> None:
    tab.open(SENTENCE)
    tab.run("""await until(() => all(".heat").length === 3);""")
    orders = tab.run("""return ["layer_mean", "mass", "specificity"].map((order) => { change("#sort", order);
      return all(".heat").map((at) => at.getAttribute("aria-label").match(/\\d+/)[0]).join(" "); });""")
    assert orders == ["8 9 7", "8 7 9", "9 8 7"]
    assert tab.run('return all(".heat").map((at) => at.getAttribute("aria-label").includes("dense"));') == [
        *(True, False, False),
    ]
    tab.run("""change("#shown", "12");""")
    assert tab.state == "text=all is going up&sort=specificity&shown=12"
    assert tab.run('return text("#maps h3");') == "3 of 3 latents on in the sentence: the most specific in it"
    assert "\u23ce" in tab.run('return text("#next");')
    assert "50.0 %" in tab.run('return text("#next");')


def test_latents_are_changed_and_the_model_goes_on(tab: Explored) -> None:
    tab.open(f"{SENTENCE}&latent=7&layer=4")
    tab.run(
        """(await until(() => named("Ablate at all layers"))).click(); named("Ablate at layer 4").click();
          named("Steer at layer 4").click(); find("#add").click(); await until(() =>
          text("#outcome").includes("Goes on") && !find("#outcome.outdated"));"""
    )
    assert tab.state.endswith("changes=ablate:7:all ablate:7:4 steer:7:4:0.250 ablate:7:all")
    tab.run("""named("Remove change 4").click(); const input = (i, k) =>
      all("#changes fieldset")[i].querySelectorAll("input, select")[k];
      const edit = async (i, k, value) => { const before = input(i, k); before.value = value;
        before.dispatchEvent(new Event("change", { bubbles: true })); await new Promise((r) => setTimeout(r, 5)); };
      await edit(0, 0, "steer"); await edit(0, 3, "-2.5"); await edit(0, 1, "8"); await edit(1, 2, "3, 5");
      await edit(2, 2, "allx");
      if (!text("#change-status").includes("found \u201callx\u201d")) throw new Error(text("#change-status"));
      await edit(2, 2, "all");
      change("#continued", "5"); find("#run").click();
      await until(() => !find("#outcome.outdated") && text("#outcome").includes("Goes on"));""")
    asked = [one for one in tab.planted.asked if "changes" in one]
    assert len(asked) > 1  # the first by the card's own button
    assert asked[-1] == {
        "text": "all is going up",
        "continue_tokens": 5,
        "changes": [
            {"kind": "steer", "latent": 8, "layers": "all", "coefficient": -2.5},
            {"kind": "ablate", "latent": 7, "layers": [3, 5], "coefficient": None},
            {"kind": "steer", "latent": 7, "layers": "all", "coefficient": 0.25},
        ],
    }
    assert tab.run("""const edit = (at, value) => { at.value = value;
      at.dispatchEvent(new Event("change", { bubbles: true })); }, field = () => all("#changes input")[1];
      const other = async (than) => { await until(() => text("#outcome h3") !== than && !find("#outcome.outdated"));
        return text("#outcome h3"); };
      const before = text("#outcome h3");
      edit(field(), "3 4"); find("#run").click(); const first = await other(before); // with no time between
      field().addEventListener("blur", ({ target }) => edit(target, "all")); field().focus(); // as a key's own change
      key(field(), "Enter"); await other(first);
      return [first, document.activeElement.id];""") == [
        "steer 8 at layer 3 4 by -2.5, ablate 7 at layer 3 5, steer 7 at all layers by 0.25",
        "run",
    ]
    outcome = tab.run('return text("#outcome");')
    for words in (
        "steer 8 at all layers by -2.5, ablate 7 at layer 3 5",
        "Probability rose most",
        "and on",
        "and off",
        "75.0 %",
        "12.5 % \u2192 75.0 %",
    ):
        assert words in outcome
    assert "0.123 nats, mean over tokens 0" in tab.run('return text("#change-status");')
    tab.run("""if (find("#outcome.outdated")) throw new Error("marked too early"); named("Remove change 1").click();""")
    assert tab.run('return find("#outcome.outdated") !== null;')
    assert "of the changes before: press Run" in tab.run('return text("#change-status");')
    tab.run("""for (let i = 0; i < 2; i++) named("Remove change 1").click();""")
    assert tab.run('return find("#run").disabled;')


def test_a_card_s_button_before_there_is_a_text(tab: Explored) -> None:
    tab.open("#view=search&latent=7")
    tab.run("""(await until(() => named("Ablate at all layers"))).click();
      await until(() => text("#sentence-status").startsWith("Type a sentence"));
      change("#text", "all is up", "input"); await until(() => text("#outcome").includes("Goes on"));""")
    assert [one["text"] for one in tab.planted.asked if "changes" in one] == ["all is up"]


def test_the_changes_of_a_shared_address_are_run_at_once(tab: Explored) -> None:
    tab.open(f"{SENTENCE}&changes=steer:7:3.4:2.5&continued=3")
    tab.run("""await until(() => text("#outcome").includes("Goes on"));""")
    assert [one["continue_tokens"] for one in tab.planted.asked if "changes" in one] == [3]


def test_a_field_that_is_left_by_tab_leaves_the_focus_in_the_next(tab: Explored) -> None:
    tab.open(f"{SENTENCE}&changes=ablate:7:all")
    tab.run("""const fields = () => all("#changes input"); await until(() => find(".heat")); fields()[0].focus();
      fields()[0].value = "8"; fields()[0].dispatchEvent(new Event("change", { bubbles: true })); fields()[1].focus();
      await until(() => location.hash.includes("ablate%3A8")); if (document.activeElement !== fields()[1])
        throw new Error(document.activeElement.outerHTML);""")


def test_pinned_latents_are_compared(tab: Explored) -> None:
    tab.open("#latent=7")
    tab.run("""(await until(() => named("Pin latent 7"))).click(); (await until(() => named("8",
      find("#card")))).click(); await until(() => named("Pin latent 8"));
      named("Pin latent 8").click(); find("#to-compare").click(); await until(() =>
        all("#compared article").length === 2);""")
    assert tab.run('return text("#to-compare");') == "Compare (2)"
    assert tab.run('return find("#card").hidden;')
    for measure, name, rows in (
        ("probs", "Share of activation mass", ["2,0.375,0", "3,0.25,0.3333333333333333"]),
        ("counts", "Tokens at which it fired", ["2,3,0", "3,2,5"]),
        ("means", "Mean activation where it fired", ["2,0.75,0", "3,0.5,1.25"]),
    ):
        tab.run(
            f"""change("#measure", "{measure}"); await until(() => text("#compared h3") === "{name}");
              named("Save {name} as CSV", find("#compared")).click();"""
        )
        assert tab.saved("compare.csv").decode().splitlines()[:3] == ["layer,7,8", *rows]
    assert tab.run('return all("#compared svg.lines .curve").map((at) => at.getAttribute("stroke-dasharray"));') == [
        "",
        "7 4",
    ]
    tab.run("""named("Unpin latent 7").click(); await until(() => all("#compared article").length === 1);
      named("Unpin latent 8").click();
      await until(() => text("#compared").includes("Nothing is pinned"));""")


def test_search_asks_for_all_that_is_filled_in_and_finds_the_planted_latent(tab: Explored) -> None:
    tab.open()
    tab.run("""find("#to-search").click(); const fields = { tokens: "up", promotes: " on", on: "a b", off: "c",
      from_layer: "2", to_layer: "4", profile: "early", explained: "ends" };
      for (const [name, value] of Object.entries(fields)) find(`#search-${name}`).value = value;
      find("#search-form button").click(); await until(() => text("#search-status").includes("1 latent."));""")
    assert tab.planted.asked == [
        {
            "tokens": "up",
            "promotes": " on",
            "on": "a b",
            "off": "c",
            "from_layer": 2,
            "to_layer": 4,
            "profile": "early",
            "explained": "ends",
        }
    ]
    tab.run(
        """named("Save Latents found").click(); named("7", find("#search-found")).click(); await until(() =>
          text("#card h2") === "Latent 7");"""
    )
    assert (
        tab.saved("search.csv").decode() == "latent,fires_on,profile,layer_mean,share_of_tokens,count,score,why\n"
        '7,"up,\n",,3.5,0.25,8,0.75,fires on up\n'
    )
    shared = tab.page.run("location.hash")
    tab.open(shared)
    tab.run("""await until(() => text("#search-status").includes("1 latent.") && text("#card h2") === "Latent 7");""")
    assert tab.run('return [find("#search-on").value, find("#search-profile").value];') == ["a b", "early"]
    tab.run(
        """change("#search-tokens", "zebra"); find("#search-form button").click(); await until(() =>
          text("#search-status").includes("No live latent"));"""
    )
    tab.run("""for (const at of all("#search-form input, #search-form select")) at.value = "";
      find("#search-form button").click(); await until(() => text("#search-status") === "");""")
    tab.run(r"""change("#search-tokens", "\\n"); find("#search-form button").click();
      await until(() => text("#search-status").includes("1 latent."));""")
    assert tab.planted.asked[-1]["tokens"] == "\n"


def test_the_layer_that_costs_most_is_one_click_away(tab: Explored) -> None:
    tab.open()
    tab.run('find("#to-layers").click();')
    assert tab.run('return text("#layers-found p");') == (
        "Replacing layer 4 by its reconstruction costs the model most: its cross-entropy rises by 1.25 nats a token, "
        "over 254 tokens of 1 document. "
        "FVU is highest at layer 6: 0.104."
    )
    said = tab.run('return text("#layers-found");')
    assert "89 % of the variance of layer 4 is in 3 tokens" in said
    assert "of 254 validation tokens of 1 document, with this layer alone replaced" in said
    assert tab.run('return all("#layers-found tbody tr")[0].textContent;') == "20.1000.500"  # 0.09996 to three digits
    tab.run("""named("Save All layers as CSV").click();""")
    assert tab.saved("layers.csv").decode().splitlines()[:2] == ["layer,fvu,delta_ce", "2,0.09996,0.5"]


def test_what_delphi_said_is_on_the_card(tab: Explored) -> None:
    tab.open("#latent=7")
    assert (
        tab.run('return (await until(() => find("#card .explained"))).textContent;')
        == "Explained, layer 3 of <ends> fuzz: AUC 0.75 (8 examples)"
    )


PICTURES = {
    "Switching on and off": "switches",
    "3 of 3 latents": "latents",
    "Share of its activation": "latent-7-probs",
    "Activations by layer": "latent-7-histogram",
}


def test_pictures_are_saved_as_they_are_seen(tab: Explored) -> None:
    for title, name in PICTURES.items():
        tab.open(f"{SENTENCE}&token=4&latent=7")  # a page may save ten files
        tab.run(f"""await until(() => find(".switch") && find("#card .bars"));
          all(".exports button").filter((at) =>
            at.getAttribute("aria-label").startsWith("Save {title}")).forEach((at) => at.click());""")
        drawing = tab.saved(f"{name}.svg").decode()
        root = ElementTree.fromstring(drawing)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert " style=" not in drawing
        assert "var(" not in drawing
        words = [part.text or "" for part in root.findall("{http://www.w3.org/2000/svg}text")]
        assert words[0].startswith(title)
        legends = {
            "switches": "Dot: a run of layers begins",
            "latents": "Rows: layers",
            "latent-7-histogram": "Rows: layers",
        }
        assert len(words) == 1 + (name in legends)
        assert words[-1].startswith(legends.get(name, title))
        assert tab.saved(f"{name}.png")[:8] == b"\x89PNG\r\n\x1a\n"
        rows = list(csv.reader(tab.saved(f"{name}.csv").decode().splitlines()))
        assert len(rows) > 2
        if name == "latents":
            assert ["9", "4", "up", "2", "0.123456789"] in rows


def test_every_view_is_in_the_address_and_back_goes_back(tab: Explored) -> None:
    tab.open(f"{SENTENCE}&token=4&sort=mass&shown=48&latent=7&layer=6&pins=7,8&changes=steer:7:3.4:2.5&continued=3")
    before = tab.run("""await until(() => find(".switch") && text("#card").includes("Fires on"));
      return [find("#sort").value, find("#shown").value, find("#continued").value, text("#to-compare"),
        find("#changes input").value, find("#text").value];""")
    assert before == ["mass", "48", "3", "Compare (2)", "7", "all is going up"]
    tab.run(
        """find("#to-layers").click(); await until(() => !find("#layers").hidden); history.back(); await until(() =>
          find("#layers").hidden && find(".switch"));"""
    )
    assert tab.run('return find("#to-sentence").hasAttribute("aria-current");')
    assert tab.run("""const link = all("figure .readout a")[0], left = (event) => {
      if (event.defaultPrevented) throw new Error("taken"); event.preventDefault(); };
      addEventListener("click", left, { once: true }); link.dispatchEvent(new MouseEvent("click", { ctrlKey: true,
        cancelable: true, bubbles: true }));
      return link.href;""").startswith(tab.served.address)


def test_an_address_that_makes_no_sense_breaks_nothing(tab: Explored) -> None:
    tab.open(f"{SENTENCE}&token=99&sort=x&shown=-1&latent=a&layer=z&pins=b,7&measure=y&changes=a:b&nothing=1&view=evil")
    tab.run("""await until(() => all(".heat").length === 3 && text("#card").includes("latent"));
      find("#to-compare").click(); await until(() => all("#compared article").length === 1);""")


def test_of_ten_sentences_typed_in_a_row_the_last_is_shown(tab: Explored) -> None:
    tab.open()
    tab.planted._work = lambda name, given: time.sleep(0.02)
    shown = tab.run("""const seen = []; new MutationObserver(() =>
      seen.push(all("#tokens button").length)).observe(find("#tokens"), { childList: true });
      for (let n = 1; n <= 10; n++) { change("#text", Array.from({ length: n }, (_, i) => `w${i}`).join(" "),
        "input"); await new Promise((r) => setTimeout(r, 10)); }
      await until(() => all("#tokens button").length === 11 && text("#sentence-status").startsWith("10 tokens"));
        return seen;""")
    tab.planted._work = lambda name, given: None
    assert shown == sorted(shown)  # no older answer over a newer one
    tab.run("""change("#text", "too long", "input"); await until(() => text("#sentence-status").includes("900 tokens"));
      key(find("#text"), "Enter"); await until(() => find("#sentence-status.warning"));""")
    tab.run("""change("#text", "", "input"); await until(() => find("#sentence-found").hidden);""")


def test_what_takes_long_is_stopped_by_hand_and_by_a_newer_text(tab: Explored) -> None:
    stopped: list[str] = []

    def work(name: str, given: dict[str, Any]) -> None:
        if given.get("text", "").startswith("slow"):
            assert tab.planted.stop.wait(60)
            stopped.append(given["text"])
            raise ResidscopeError("stopped")

    tab.planted._work = work
    tab.open("#text=slow+one")
    tab.run("""await until(() => named("Stop")); named("Stop").click();
      await until(() => text("#sentence-status") === "Stopped.");
      change("#text", "slow two", "input"); await until(() => named("Stop"));
      await new Promise((r) => setTimeout(r, 1100));
      change("#text", "all is up", "input"); await until(() => text("#sentence-status").startsWith("3 tokens"));
      change("#text", "slow three", "input"); await new Promise((r) => setTimeout(r, 100));
      change("#text", "all is up too", "input"); await until(() => text("#sentence-status").startsWith("Waiting")
        && named("Stop")); await until(() => text("#sentence-status").startsWith("4 tokens"));""")
    assert (
        tab.run('return [...document.querySelectorAll("button")].filter((at) => at.textContent === "Stop").length;')
        == 0
    )
    tab.planted._work = lambda name, given: None
    assert stopped == ["slow one", "slow two", "slow three"]


def test_a_page_with_a_wrong_token_says_what_to_do(tab: Explored) -> None:
    tab.page.open(tab.served.address[:-1])
    assert "open the address" in tab.page.run("document.body.textContent")
    tab.page.console.clear()
    tab.open()


VIEWS = (
    f"{SENTENCE}&token=4&latent=7&layer=3&changes=steer:7:3.4:2.5",
    "#view=search&tokens=up&latent=8",
    "#view=compare&pins=7,8,9",
    "#view=layers",
)


@pytest.mark.parametrize("view", VIEWS)
def test_every_control_and_picture_has_a_name_and_a_place_on_a_phone(tab: Explored, view: str) -> None:
    tab.open(view)
    tab.run(
        """await until(() => find("#card .bars, #compared .bars, #layers-found svg")); await until(() =>
          !document.body.textContent.includes("Computing"));"""
    )
    tree = tab.page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "combobox", "spinbutton", "link", "image", "img", "searchbox")
    named = {True: 0, False: 0}
    for node in tree:
        if node.get("role", {}).get("value") in roles and not node.get("ignored"):
            named[bool(node.get("name", {}).get("value", "").strip())] += 1
    assert named[False] == 0
    assert named[True] > 4
    ids = tab.run('return all("[id]").map((at) => at.id);')
    assert len(ids) == len(set(ids))
    size = {"height": 740, "deviceScaleFactor": 2, "mobile": True}
    try:
        tab.page.call("Emulation.setDeviceMetricsOverride", width=360, **size)
        tab.page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        tab.open(view)
        tab.run("""await until(() => find("#card .bars, #compared .bars, #layers-found svg"));""")
        assert tab.run("return document.documentElement.scrollWidth;") <= 360
        assert tab.run("return getComputedStyle(document.body).backgroundColor;") == "rgb(20, 23, 28)"
    finally:
        tab.page.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
        tab.page.call("Emulation.setEmulatedMedia", features=[])
