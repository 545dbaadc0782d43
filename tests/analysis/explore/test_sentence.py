"""A sentence in the page, in a real browser: maps, what switches at a token, changes, and answers that take long."""

import time
from typing import Any

import numpy as np

from residscope.errors import ResidscopeError
from tests.support.browser import SENTENCE, PlantedTab


def test_a_latent_that_moves_up_a_layer_per_token_is_seen_to_move(tab: PlantedTab) -> None:
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


def test_a_token_shows_what_switches_on_stays_and_switches_off(tab: PlantedTab) -> None:
    tab.open(SENTENCE)
    tab.run("""(await until(() => named("token 4: up"))).click(); await until(() => find(".switch"));""")
    assert tab.run('return all(".switch").map((at) => at.getAttribute("aria-label"));') == [
        "Latent 9: on at layers 2, 6; highest 0.250 at 6",
        "Latent 8: on at layers 3 to 5; highest 2.00 at 3",
        "Latent 7: on at layers 6; highest 5.00 at 6",
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
        "Latent 9: on at layers 2, 6; highest 0.250 at 6",
        "9 (dense): <img src=x onerror=\u2026",
        "0.250 at 6",
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


def test_what_the_model_expects_after_a_token_and_the_text_up_to_it(tab: PlantedTab) -> None:
    tab.open(SENTENCE)
    tab.run("""(await until(() => named("token 4: up"))).click(); await until(() => text("#next").includes("up?"));""")
    assert "After token 4 \u201cup\u201d: up? 25.0 %" in tab.run('return text("#next");')
    assert not tab.run('return find("#next a");')  # these tokens do not make the text
    tab.run("""named("token 1: all").click(); await until(() => text("#next").includes("all?"));
      find("#next a").click(); await until(() => text("#sentence-status").includes("1 token"));""")
    assert tab.state == "text=all&token=1"


def test_latents_are_ordered_and_cut(tab: PlantedTab) -> None:
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
    assert tab.run('return text("#maps h3");') == "3 of 3 latents on in the sentence: the most specific to it"
    assert "\u23ce" in tab.run('return text("#next");')
    assert "50.0 %" in tab.run('return text("#next");')


def test_the_largest_effects_on_a_prediction(tab: PlantedTab) -> None:
    tab.open(SENTENCE)
    tab.run("""await until(() => all(".heat").length === 3); change("#sort", "effect");
      await until(() => text("#maps h3").includes("effects"));""")
    assert tab.run('return text("#maps h3");') == (
        "3 of 3 latents on in the sentence: the largest effects, in nats, "
        "on \u201c on\u201d after token 4 \u201cup\u201d"
    )
    above = """return all(".heat text").map((at) => at.textContent).filter((at) => /: [+-]|layer/.test(at));"""
    assert tab.run(above) == ["8: -8.00", "layer 3", "7: +2.50", "layer 6", "9 (dense): +0.125", "layer 6"]
    tab.run("""named("token 2: is").click(); await until(() => text("#maps h3").includes("after token 2"));""")
    assert not tab.run('return find(".switch");')
    read = """const map = all(".heat")[0]; map.focus(); for (let c = 0; c < 9; c++) key(map, "ArrowLeft");
      for (let r = 0; r < 9; r++) key(map, "ArrowDown"); const found = [text("#maps .readout")];
      key(map, "ArrowRight"); key(map, "ArrowUp"); return [...found, text("#maps .readout")];"""
    empty, first = tab.run(read)
    assert empty.endswith("layer 2: activation 0, effect 0 nats.")
    assert first.endswith("layer 3: activation 2.00, effect -2.00 nats.")
    tab.run("""named("Save 3 of 3").click();""")
    assert tab.saved("latents.csv").decode().splitlines()[:2] == [
        "latent,position,token,layer,activation,effect_nats",
        "8,1,all,3,2,-2",
    ]
    tab.run("""key(all(".heat")[0], "Enter"); await until(() => text("#card h2") === "Latent 8");
      change("#shown", "12"); await until(() => text("#maps h3").includes("after token 2"));""")
    assert "&token=2" in tab.state  # a cell that is opened does not change what is explained
    assert [one["effects_after"] for one in tab.planted.asked] == [4, 2]
    tab.run("""named("token 2: is").click(); change("#against", "\\n");
      await until(() => text("#maps h3").includes("against"));""")
    assert tab.run('return text("#maps h3");').endswith(
        "on \u201c on\u201d against \u201c\u23ce\u201d after token 4 \u201cup\u201d"
    )
    assert tab.planted.asked[-1] == {
        "text": "all is going up",
        "most": 100_000,
        "effects_after": 4,
        "effects_against": "\n",
    }
    tab.run("""change("#sort", "mass"); await until(() => !text("#maps h3").includes("effects"));
      find("#maps .exports button").click();""")
    assert not tab.run('return find("#against-label").checkVisibility();')
    assert tab.saved("latents.csv").decode().splitlines()[0] == "latent,position,token,layer,activation"


def test_latents_are_changed_and_the_model_goes_on(tab: PlantedTab) -> None:
    tab.open(f"{SENTENCE}&latent=7&layer=4")
    tab.run(
        """(await until(() => named("Ablate at all layers"))).click(); named("Ablate at layer 4").click();
          named("Steer at layer 4").click(); find("#add").click(); /* both are to be answered */ await until(() =>
          text("#outcome").includes("Continuation") && text("#change-status").startsWith("KL"));"""
    )
    assert tab.state.endswith("changes=ablate:7:all ablate:7:4 steer:7:4:0.250 ablate:7:all")
    tab.run("""named("Remove change 4").click(); const input = (i, k) =>
      all("#changes fieldset")[i].querySelectorAll("input, select")[k];
      const edit = async (i, k, value) => { const before = input(i, k), said = text("#change-status");
        before.value = value; before.dispatchEvent(new Event("change", { bubbles: true }));
        await until(() => !before.isConnected || text("#change-status") !== said); };
      await edit(0, 0, "steer"); await edit(0, 3, "-2.5"); await edit(0, 1, "8"); await edit(1, 2, "3, 5");
      await edit(2, 2, "allx");
      if (!text("#change-status").includes("found \u201callx\u201d")) throw new Error(text("#change-status"));
      await edit(2, 2, "all");
      change("#continued", "5"); find("#run").click();
      await until(() => !find("#outcome.outdated") && text("#outcome").includes("Continuation"));""")
    assert (
        tab.run('return [...all("#changes fieldset")[1].childNodes].map((at) => at.textContent.trim());')[3]
        == "up \u23ce"
    )
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
        "steer 8 at layers 3, 4 by -2.5, ablate 7 at layers 3, 5, steer 7 at all layers by 0.25",
        "run",
    ]
    said = tab.run("""const edit = (at, value) => { at.value = value;
      at.dispatchEvent(new Event("change", { bubbles: true })); }, field = () => all("#changes input")[1];
      const before = find("#outcome h3"), kept = field().value; find("#run").click(); edit(field(), "x");
      await until(() => find("#outcome h3") !== before); const wrong = text("#change-status"); edit(field(), kept);
      await until(() => text("#change-status") === ""); find("#run").click();
      await until(() => text("#change-status").startsWith("KL")); return wrong;""")
    assert said == "layers should be all, or numbers such as 3 4 5 or 3-5, found \u201cx\u201d"  # the answer came later
    outcome = tab.run('return text("#outcome");')
    for words in (
        "steer 8 at all layers by -2.5, ablate 7 at layers 3, 5",
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
    assert "of earlier changes: press Run" in tab.run('return text("#change-status");')
    tab.run("""for (let i = 0; i < 2; i++) named("Remove change 1").click();""")
    assert tab.run('return find("#run").disabled;')


def test_a_card_s_button_before_there_is_a_text(tab: PlantedTab) -> None:
    tab.open("#view=search&latent=7")
    tab.run("""(await until(() => named("Ablate at all layers"))).click();
      await until(() => text("#sentence-status").startsWith("Type a sentence"));
      change("#text", "all is up", "input"); await until(() => text("#outcome").includes("Continuation"));""")
    assert [one["text"] for one in tab.planted.asked if "changes" in one] == ["all is up"]


def test_the_changes_of_a_shared_address_are_run_at_once(tab: PlantedTab) -> None:
    tab.open(f"{SENTENCE}&changes=steer:7:3.4:2.5&continued=3")
    tab.run("""await until(() => text("#outcome").includes("Continuation"));""")
    assert [one["continue_tokens"] for one in tab.planted.asked if "changes" in one] == [3]


def test_a_field_that_is_left_by_tab_leaves_the_focus_in_the_next(tab: PlantedTab) -> None:
    tab.open(f"{SENTENCE}&changes=ablate:7:all")
    tab.run("""const fields = () => all("#changes input"); await until(() => find(".heat")); fields()[0].focus();
      fields()[0].value = "8"; fields()[0].dispatchEvent(new Event("change", { bubbles: true })); fields()[1].focus();
      await until(() => location.hash.includes("ablate%3A8")); if (document.activeElement !== fields()[1])
        throw new Error(document.activeElement.outerHTML);""")


def test_of_ten_sentences_typed_in_a_row_the_last_is_shown(tab: PlantedTab) -> None:
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


def test_what_takes_long_is_stopped_by_hand_and_by_a_newer_text(tab: PlantedTab) -> None:
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


def test_an_empty_page_offers_a_sentence(tab: PlantedTab) -> None:
    tab.open()
    tab.run("""(await until(() => find("#sentence-status a"))).click();
      await until(() => text("#sentence-status").includes("latents on"));""")
    assert tab.run('return [find("#text").value, find("#sentence-status a")];') == [
        "def area(width, height): return",
        None,
    ]
    tab.run("""change("#text", "all is", "input"); change("#text", "", "input");
      await until(() => find("#sentence-status a")); await new Promise((r) => setTimeout(r, 300));""")
    assert tab.run('return [text("#sentence-status").slice(0, 4), find("#sentence-status.warning")];') == ["Type", None]


def test_what_is_typed_into_a_change_stays_when_an_answer_comes(tab: PlantedTab) -> None:
    tab.open(f"{SENTENCE}&changes=steer:7:3:1")
    tab.run("""await until(() => find("#changes input")); change("#text", "all is up", "input");
      const field = all("#changes input").at(-1); field.focus(); field.value = "12";
      await until(() => text("#sentence-status").includes("3 tokens"));""")
    assert tab.run('return all("#changes input").at(-1).value;') == "12"
