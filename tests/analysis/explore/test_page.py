"""The page of `residscope explore` in a real browser: every control is used, and nothing is said on the console."""

import csv
from xml.etree import ElementTree

import pytest

from tests.support.browser import SENTENCE, PlantedTab


def test_a_cell_opens_the_card_of_its_latent_and_what_it_holds_is_text(tab: PlantedTab) -> None:
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
        "Active at, drawn at random",
        "fore\u23ce",
    ):
        assert words in card
    assert "no higher than those of random directions" in card
    assert "Promotes" not in card
    assert "Tokens it fires at5, 12.5 %Mean number of layers it is on at, per such token3.0" in card
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


def test_a_latent_that_is_silent_or_not_there(tab: PlantedTab) -> None:
    tab.open("#latent=10")
    tab.run("""await until(() => text("#card").includes("never fired"));""")
    tab.open("#latent=99")
    tab.run("""await until(() => text("#card").includes("found 99"));""")


def test_pinned_latents_are_compared(tab: PlantedTab) -> None:
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


def test_search_asks_for_all_that_is_filled_in_and_finds_the_planted_latent(tab: PlantedTab) -> None:
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
    assert tab.run('return [text("#search-found .dense"), find("#search-found.outdated")];') == ["dense", None]
    shared = tab.page.run("location.hash")
    tab.run("""find("#search-promotes").value = "typed"; find("#to-layers").click(); find("#to-search").click();
      await until(() => !find("#search").hidden); await new Promise((r) => setTimeout(r, 50));""")
    assert len(tab.planted.asked) == 1  # what is there is not asked for again
    assert tab.run('return find("#search-promotes").value;') == "typed"
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


def test_the_layer_that_costs_most_is_one_click_away(tab: PlantedTab) -> None:
    tab.open()
    tab.run('find("#to-layers").click();')
    assert tab.run('return text("#layers-found p");') == (
        "Replacing layer 4 by its reconstruction costs the model most: its cross-entropy rises by 1.25 nats a token, "
        "over 254 tokens of 1 document. "
        "FVU is highest at layer 6: 0.104."
    )
    said = tab.run('return text("#layers-found");')
    assert (
        "On those tokens the model's own cross-entropy is 2.50 nats. Replacing all 5 layers at once by their " in said
    )
    assert "reconstructions costs 3.00 nats a token, by their mean vectors 4.00 (over 64 tokens)." in said
    assert "89 % of the variance of layer 4 is in 3 tokens" in said
    assert "over 254 validation tokens of 1 document, with this layer alone replaced" in said
    assert tab.run('return all("#layers-found tbody tr")[0].textContent;') == "20.1000.500"  # 0.09996 to three digits
    tab.run("""named("Save All layers as CSV").click();""")
    assert tab.saved("layers.csv").decode().splitlines()[:2] == ["layer,fvu,delta_ce", "2,0.09996,0.5"]


def test_what_delphi_said_is_on_the_card(tab: PlantedTab) -> None:
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


def test_pictures_are_saved_as_they_are_seen(tab: PlantedTab) -> None:
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
            "switches": "\u201call is going up\u201d Dot: first layer of a run",
            "latents": "\u201call is going up\u201d Rows: layers",
            "latent-7-histogram": "Rows: layers",
        }
        assert len(words) == 1 + (name in legends)
        assert words[-1].startswith(legends.get(name, title))
        assert tab.saved(f"{name}.png")[:8] == b"\x89PNG\r\n\x1a\n"
        rows = list(csv.reader(tab.saved(f"{name}.csv").decode().splitlines()))
        assert len(rows) > 2
        if name == "latents":
            assert ["9", "4", "up", "2", "0.123456789"] in rows


def test_what_is_no_number_is_not_run_and_a_picture_of_control_characters_is_one(tab: PlantedTab) -> None:
    tab.open(f"{SENTENCE}&changes=steer:7:3:2.5&pins=7,7,8")
    tab.run("""await until(() => find("#changes input[type=number]") && text("#to-compare") === "Compare (2)");""")
    for field, text, wanted in (
        (0, "", "latent should be a whole number"),
        (0, "1.5", "latent should be a whole number, found \u201c1.5"),
        (1, "", "the activation to add should be a number"),
    ):
        tab.run(f"""const field = all("#changes input[type=number]")[{field}]; field.value = "{text}";
          field.dispatchEvent(new Event("change", {{ bubbles: true }}));
          await until(() => text("#change-status").includes("{wanted}"));""")
        assert tab.run("return new URLSearchParams(location.hash.slice(1)).get('changes');") == "steer:7:3:2.5"
    found = tab.run(r"""const { visible } = await import("/assets/core.js"); return visible("a\x07\u202eb\uffff");""")
    assert found == r"a␇\u202eb\uffff"


def test_every_view_is_in_the_address_and_back_goes_back(tab: PlantedTab) -> None:
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


def test_an_address_that_makes_no_sense_breaks_nothing(tab: PlantedTab) -> None:
    tab.open(f"{SENTENCE}&token=99&sort=x&shown=-1&latent=a&layer=z&pins=b,7&measure=y&changes=a:b&nothing=1&view=evil")
    tab.run("""await until(() => all(".heat").length === 3 && text("#card").includes("latent"));
      find("#to-compare").click(); await until(() => all("#compared article").length === 1);""")


def test_a_page_with_a_wrong_token_says_what_to_do(tab: PlantedTab) -> None:
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
def test_every_control_and_picture_has_a_name_and_a_place_on_a_phone(tab: PlantedTab, view: str) -> None:
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
