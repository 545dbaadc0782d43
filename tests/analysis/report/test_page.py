"""The report: one file, no requests, nothing unescaped, nothing undefined shown as a number, all latents in it."""

import base64
import hashlib
import json
import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from analysis.latents.table import KINDS
from analysis.report.data import Results, load_results
from analysis.report.markup import EN_DASH, pack_arrays, page_file, show
from analysis.report.page import SECTIONS, render_report, write_report
from analysis.report.sections import latents, nulls, persistence, reconstruction
from analysis.report.sections.latents import unsigned
from tests.support import chromium
from tests.support.page import Page, unpack
from tests.support.results import write_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return load_results(write_results(tmp_path_factory.mktemp("results"), n_layers=6, n_latents=300))


@pytest.fixture(scope="module")
def html(results: Results) -> str:
    return render_report(results)


def test_write_report_writes_the_page_and_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_report(write_results(tmp_path, n_layers=3, n_latents=40))
    assert path == tmp_path / "report.html"
    assert {"layer_profile.png", "variance.png", "reconstruction.png"} <= {file.name for file in tmp_path.iterdir()}
    assert render_report(load_results(tmp_path)) == path.read_text(encoding="utf-8")


def test_the_report_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(write_report(write_results(tmp_path, n_layers=3, n_latents=40)).read_text(encoding="utf-8"))
    assert not list(tmp_path.glob("*.png"))
    assert sum(attributes.get("class") == "plot" for _, attributes in page.attributes) >= 10  # drawn without it


def test_the_page_asks_for_nothing_and_runs_only_its_own_script(html: str) -> None:
    page = Page(html)
    policy = next(a["content"] for tag, a in page.attributes if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert f"'sha256-{digest}'" in policy
    for tag, attributes in page.attributes:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "srcset", "action"):
            assert re.match(r"#|data:image/png", attributes.get(name) or "#"), (tag, attributes)
    assert "url(" not in html
    assert "@import" not in html
    assert "http://" not in html
    assert "https://" not in html


def test_every_section_is_there_and_linked(html: str) -> None:
    page = Page(html)
    anchors = [a["id"] for tag, a in page.attributes if tag == "section"]
    assert tuple(anchors) == SECTIONS
    modules = [item.name for item in files("analysis.report.sections").iterdir() if item.name.endswith(".py")]
    assert sorted(modules) == sorted(["__init__.py", *(f"{name}.py" for name in SECTIONS)])
    assert SECTIONS.index("latents") == 1
    links = {a["href"] for tag, a in page.attributes if tag == "a"}
    assert links == {f"#{anchor}" for anchor in anchors}
    assert not re.search(r"\$[a-z]", page.text)


def test_headline_tokens_and_warnings_come_first(html: str, results: Results) -> None:
    text = Page(html).text
    top = text[: text.index("Where latents are active")]
    assert show(results.summary["variance"]["mass"]["aggregate_over_token"]) in top
    assert show(results.reference_ratio) in top
    assert results.summary["split"]["text"] in top
    assert results.summary["warnings"][0] in top


def test_all_numbers_of_the_variance_are_shown(html: str, results: Results) -> None:
    text = Page(html).text
    for weighting in ("mass", "equal", "latent"):
        for name, value in results.summary["variance"][weighting].items():
            if name != "ci95":
                assert show(value) in text
                low, high = results.summary["variance"][weighting]["ci95"][name]
                assert f"{show(low)} to {show(high)}" in text
    for value in results.summary["variance"]["mlsae_compat"].values():
        assert show(value) in text


def test_all_numbers_of_persistence_nulls_kinds_and_redundancy_are_shown(html: str, results: Results) -> None:
    text, summary = Page(html).text, results.summary
    for weighting in ("mass", "equal"):
        found = summary["persistence"][weighting]
        for name, words, _ in persistence.MEANS:
            low, high = found["ci95"][name]
            assert words in text
            assert f"{show(found[name])}{show(low)} to {show(high)}" in text
    for null in ("layers_permuted", "tokens_permuted"):
        for part, name, words in nulls.ROWS:
            ratio = summary["nulls"][null]["ratio"][part]["mass"]
            low, high = ratio["ci95"][name]
            assert words in text
            assert show(summary["nulls"][null][part]["mass"][name]) in text
            assert f"{show(ratio[name])}{show(low)} to {show(high)}" in text
    for kind, part in summary["profiles"].items():
        assert f"{kind}{part['latents']}" in text
    for name in ("mmcs", "parallel_pairs", "redundant_pairs", "redundant_latents"):
        value = summary["redundancy"][name]
        assert (show(value) if name == "mmcs" else str(value)) in text
    assert len(results.pairs) == 20
    assert show(results.pairs[7]["cosine"]) in text
    for layer in results.summary["layers"]:
        assert f"{show(layer['fvu_low'])} to {show(layer['fvu_high'])}" in text


def test_an_analysis_without_them_says_so(tmp_path: Path) -> None:
    def without(summary: dict[str, Any]) -> None:
        summary["convergence"] = summary["nulls"] = summary["redundancy"] = None

    folder = write_results(tmp_path, n_layers=3, n_latents=20, change=without)
    (folder / "redundancy.parquet").unlink()
    text = Page(render_report(load_results(folder))).text
    assert text.count("Not shown: ") == 4


def test_every_column_has_its_method(html: str) -> None:
    method = html[html.index('id="method"') :].lower()
    for _, heading, _ in reconstruction.COLUMNS:
        assert heading.replace(", held-out", "").replace("FVU of ", "").lower() in method
    script = page_file("report.js")
    for name in re.findall(r'key: "\w+", name: "([^"]+)"', script):
        assert name.split(",")[0].lower() in method
    for _, words, _ in persistence.MEANS:
        assert words.split(":")[0].split(",")[0].lower() in method, words
    for name in ("layers permuted", "tokens permuted", "persistent", "bimodal", "mmcs", "redundant"):
        assert name in method
    for name in ("within a token", "between tokens", "between latents", "aggregate / token-level", "rel_var_t"):
        assert name in method


def test_the_data_block_holds_every_live_latent(html: str, results: Results) -> None:
    data = unpack(Page(html), "latent-data")
    for name in ("latent", "count", "n_tokens", "n_layers_active"):
        np.testing.assert_array_equal(data[name], results.latents[name])
    for name in ("mean", "layer_mean", "layer_std", "within_token", "between_tokens", "entropy"):
        np.testing.assert_allclose(data[name], results.latents[name], rtol=1e-6, atol=1e-6)
    total = results.latents["total"]
    np.testing.assert_allclose(data["mass_share"], total / total.sum(), rtol=1e-6)
    assert [KINDS[kind] for kind in data["kind"]] == results.kinds.tolist()
    np.testing.assert_array_equal(data["counts"].reshape(results.counts.shape), results.counts)
    np.testing.assert_allclose(data["probs"].reshape(results.probs.shape), results.probs, rtol=5e-4, atol=5e-8)


def test_whole_numbers_stay_exact_beyond_32_bits() -> None:
    for top, kind in ((65_535, "u2"), (65_536, "u4"), (2**32 - 1, "u4"), (2**32, "f8"), (2**52 + 1, "f8")):
        values = np.array([0, top], np.int64)
        page = Page(pack_arrays("numbers", {"n": unsigned(values)}))
        assert json.loads(str(page.blocks["numbers"][0]["data-index"]))[0][1] == kind
        assert unpack(page, "numbers")["n"].tolist() == values.tolist()


def test_agreement_of_contexts_is_shown_by_distance(tmp_path: Path) -> None:
    agreement = {"n": 5, "latents": 321, "overlap": 0.25, "chance": 0.0125, "overlap_over_chance": 20.0}
    agreement |= {"overlap_by_distance": [0.625, 0.375, None], "chance_by_distance": [0.0125, 0.015, None]}
    folder = write_results(
        tmp_path, n_layers=4, n_latents=20, change=lambda summary: summary.update(examples={"agreement": agreement})
    )
    text = Page(render_report(load_results(folder))).text
    assert "Two layers share 0.250 of a latent's top contexts, 20.0 times as many as by chance (0.0125)" in text
    assert f"10.6250.012550.020.3750.015025.03{EN_DASH}{EN_DASH}{EN_DASH}" in text
    assert "321 latents" in text


def test_the_script_reads_every_type_that_is_packed() -> None:
    script = page_file("report.js")
    types = re.search(r"const types = \{([^}]*)\}", script)
    assert types is not None
    assert set(re.findall(r"(\w\d):", types.group(1))) == {"u1", "u2", "u4", "f4", "f8", "f2"}


def test_nothing_that_comes_from_the_files_is_markup(tmp_path: Path) -> None:
    attack = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'"

    def inject(summary: dict[str, Any]) -> None:
        for part in ("store", "sae", "analysis"):
            facts = summary["provenance"][part]
            for name in facts:
                facts[name] = attack
            facts[attack] = {attack: [attack]}
        summary["provenance"]["analysis"]["versions"] = {"residscope": attack}
        summary["split"]["text"] = attack
        summary["warnings"] = [attack]
        summary["uncertainty"] = {"method": attack, "n_groups": attack}
        summary["n_tokens"] = attack

    text = render_report(load_results(write_results(tmp_path, n_layers=3, n_latents=30, change=inject)))
    page = Page(text)
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "alert(1)" in page.text
    assert "alert" not in page.script
    assert not any("onerror" in name for _, attributes in page.attributes for name in attributes)


def _nothing_defined(summary: dict[str, Any]) -> None:
    """Every number that may be missing is."""
    for name in ("uncertainty", "validation_fvu", "validation", "baseline", "seconds"):
        summary[name] = None
    for weighting in ("mass", "equal", "latent"):
        summary["variance"][weighting] = dict.fromkeys(summary["variance"][weighting], None) | {"ci95": {}}
    summary["variance"]["mlsae_compat"] = dict.fromkeys(summary["variance"]["mlsae_compat"], float("nan"))
    summary["reconstruction"] = dict.fromkeys(summary["reconstruction"], float("nan"))


@pytest.mark.parametrize(("n_layers", "dead"), [(1, 0.2), (5, 1.0), (5, 0.2)])
def test_missing_numbers_are_dashes_with_a_reason(tmp_path: Path, n_layers: int, dead: float) -> None:
    folder = write_results(tmp_path, n_layers=n_layers, n_latents=12, dead_fraction=dead, change=_nothing_defined)
    page = Page(render_report(load_results(folder)))
    assert not re.search(r"\b(nan|none|null|undefined|inf)\b", page.text.split("Method")[0], re.IGNORECASE)
    assert EN_DASH in page.text
    reason = "only one layer" if n_layers == 1 else "no latent fired" if dead == 1 else "has no value"
    assert reason in page.text
    assert "No intervals were computed" in page.text
    assert ("latent-data" in page.blocks) == (dead < 1)


def test_layers_carry_the_numbers_of_the_model(tmp_path: Path) -> None:
    folder = write_results(
        tmp_path, n_layers=3, n_latents=20, change=lambda summary: summary.update(layer_numbers=[3, 7, 11])
    )
    page = Page(render_report(load_results(folder)))
    assert page.blocks["latent-data"][0]["data-layers"] == "[3,7,11]"
    assert "37" in re.sub(r"\s", "", page.text)


def test_a_large_dictionary_stays_small(tmp_path: Path) -> None:
    path = write_results(tmp_path, n_layers=30, n_latents=9216)
    assert len(render_report(load_results(path))) < 3_000_000


def test_with_very_many_latents_numbers_are_rounded_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "MOST_NUMBERS", 1000)
    results = load_results(write_results(tmp_path, n_layers=6, n_latents=300))
    page = Page(render_report(results))
    assert "the numbers are rounded here" in page.text
    data = unpack(page, "latent-data")
    assert "counts" not in data
    np.testing.assert_array_equal(data["latent"], results.latents["latent"])
    np.testing.assert_array_equal(data["count"], results.latents["count"])
    np.testing.assert_allclose(data["layer_mean"], results.latents["layer_mean"], rtol=1e-3)
    shares = data["probs"].reshape(results.probs.shape).astype(np.float64)
    np.testing.assert_array_equal(shares > 0, results.probs > 0)
    np.testing.assert_allclose(shares / shares.sum(axis=1, keepdims=True), results.probs, atol=6 / 255)


def test_numbers_and_contexts_share_the_room_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def blocks(folder: Path, numbers: np.ndarray, fired: np.ndarray, **options: Any) -> str:
        given.update(options)
        return "<b></b>"

    monkeypatch.setattr(latents, "example_blocks", blocks)
    results = load_results(write_results(tmp_path, n_layers=3, n_latents=40))
    section = latents.section(results)
    assert given == {"chance": 0.25, "budget": latents.ROOM - len(section.data) + len("<b></b>")}
    del results.summary["latent_logits"]["unembedding_chance_99"]  # of an earlier version
    latents.section(results)
    assert given["chance"] == results.summary["latent_logits"]["unembedding_chance"]


def test_few_tokens_are_named_beside_fvu(tmp_path: Path) -> None:
    def few(summary: dict[str, Any]) -> None:
        summary["reconstruction"] |= {"few_tokens": "89 % of it is in 3 tokens: ' <loop>'", "fvu_without_few": 0.4375}

    folder = write_results(tmp_path, n_layers=3, n_latents=40, change=few)
    table = pq.read_table(folder / "layers.parquet")
    pq.write_table(table.append_column("fvu_without_few", table["fvu"]), folder / "layers.parquet")
    text = Page(render_report(load_results(folder))).text
    assert "89 % of it is in 3 tokens: ' <loop>'. FVU is a ratio" in text
    assert "without outlier tokens 0.438" in text
    assert text.count("without outlier tokens") > 2


def test_several_layers_at_once_stand_beside_the_sum_of_single_ones(tmp_path: Path) -> None:
    numbers = {"delta_ce": 7.125, "kl": 6.5, "loss_recovered_mean": -0.125, "mean_ablation_delta_ce": 6.25}
    numbers |= {"sum_alone_delta_ce": 5.75, "sum_alone_kl": 9.5, "pca_delta_ce": 8.25, "pca_kl": 8.5}
    numbers |= {"ci95": {"delta_ce": [6.5, 8.0], "kl": None}}
    groups = [{"kind": kind, "n": n, **numbers} for kind, n in (("all", 30), ("every", 2), ("last", 7))]
    found = {"n_tokens": 1234, "true_ce": 2.5, "groups": groups}
    folder = write_results(
        tmp_path, n_layers=3, n_latents=40, change=lambda summary: summary["downstream"].update(together=found)
    )
    text = Page(render_report(load_results(folder))).text
    assert "at 1,234 of the tokens" in text
    for name in ("all 30", "every 2nd", "last 7"):
        assert f"{name}7.126.50 to 8.005.758.256.509.508.50\N{MINUS SIGN}0.1256.25" in text


def test_the_page_files_travel_with_the_package() -> None:
    folder = files("analysis.report")
    names = {item.name for part in ("templates", "assets") for item in folder.joinpath(part).iterdir()}
    modules = sorted(Path(str(folder)).rglob("*.py"))
    used = {name for path in modules for name in re.findall(r'"([a-z_]+\.(?:html|css|js))"', path.read_text())}
    assert used - {"report.html"} <= names
    assert names == used | {"report.html"}


def test_half_of_a_pair_of_characters_is_written(tmp_path: Path) -> None:
    def name(summary: dict[str, Any]) -> None:
        summary["provenance"]["store"]["model"] = "a name \ud800"

    folder = write_results(tmp_path, n_layers=2, n_latents=30, change=name)
    assert "a name ?" in write_report(folder).read_text(encoding="utf-8")


@pytest.mark.skipif(chromium.find_chromium() is None, reason="there is no browser here")
@pytest.mark.parametrize("width", [360, 800])
def test_in_a_narrow_window_the_link_of_a_latent_shows_it_whole(tmp_path: Path, width: int) -> None:
    latent = pq.read_table((folder := write_results(tmp_path, n_latents=100)) / "latents.parquet")
    (row,) = latent.filter(pc.field("count") > 0).slice(40, 1).to_pylist()
    address = f"{write_report(folder).as_uri()}#latent-{row['latent']}"
    with chromium.Page(chromium.find_chromium() or "", width, 780) as page:
        page.open(address)
        where = page.run("""(async () => { for (;;) { const row = document.querySelector("tr[data-row]:has(+ .detail)");
          const box = row?.getBoundingClientRect();
          if (box && Math.abs(box.top) < 2 && row.nextSibling.querySelector(".looks")?.textContent !== "") {
            const parts = [...row.nextSibling.querySelectorAll(".head, .looks, .panels, dl")];
            return [row.textContent, ...parts.map((one) => one.getBoundingClientRect().right)]; }
          await new Promise((next) => setTimeout(next, 5)); } })()""")
    assert where[0].startswith(str(row["latent"]))
    assert len(where) > 3
    assert max(where[1:]) <= width


@pytest.mark.skipif(chromium.find_chromium() is None, reason="there is no browser here")
def test_a_link_to_a_section_leads_there_and_what_is_not_seen_is_written(tmp_path: Path) -> None:
    address = f"{write_report(write_results(tmp_path, n_latents=100)).as_uri()}#reconstruction"
    with chromium.Page(chromium.find_chromium() or "", 1000, 780) as page:
        page.open(address)
        away = page.run("""(async () => { await Promise.all(made);
          const section = document.getElementById("reconstruction");
          document.documentElement.style.scrollBehavior = "auto";
          for (let i = 0; i < 400; i++) { const { top } = section.getBoundingClientRect();
            if (Math.abs(top) < 20) return top; await new Promise((next) => setTimeout(next, 5)); }
          return "elsewhere"; })()""")
        assert isinstance(away, int | float), away
        assert page.run(r'signs("a\u0007\r\n\t\u202eb\u200b")') == r"a␇␍⏎→\u202eb\u200b"
        assert page.run(r'wordHtml(" \u00a0")') == "<code>·⍽</code>"
        chosen = page.run("""(() => { const place = document.createElement("div"), chosen = [];
          const choose = { pick: (c) => chosen.push(c), say: (r, c) => chosen.push(c) };
          heatMap(place, new Float32Array(0), [0, 1], [], [[0, 0, 0]], { name: "a", ...choose });
          place.querySelector("canvas").click(); return chosen; })()""")
        assert chosen == []
