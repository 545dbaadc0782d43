"""The numbers on the page of `residscope explore` are those of summary.json and `analyze --prompt`, to the last digit
that is printed."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import residscope
from analysis.prompt.run import analyze_prompts
from tests.support.browser import Tab
from tests.support.chromium import Page, find_chromium
from tests.support.explored import serving
from tests.support.harvested import make_checkpoint, make_harvested
from tests.support.small import analyze_config

BINARY = find_chromium()
pytestmark = pytest.mark.skipif(BINARY is None, reason="no chromium or google-chrome on PATH")

TEXT = "mary and john"


def printed(words: str, value: Any, times: int = 1) -> bool:
    """Whether the words are the value (times so much), rounded to as many decimals as they have."""
    if value is None:
        return words == "\u2013"
    number = words.removesuffix(" %").replace(",", "").replace("\u2212", "-")
    if "\u00d710^" in number:
        mantissa, _, exponent = number.partition("\u00d710^")
        number, value = mantissa, value / 10 ** int(exponent)
    return f"{times * value:.{len(number.partition('.')[2])}f}" == number


class Explored:
    """A tab over an analysis of a tiny model, and the folder that `analyze --prompt` wrote."""

    def __init__(self, folder: Path, tab: Tab) -> None:
        self.tab = tab
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        self.prompt: dict[str, Any] = json.loads((folder / "prompt.json").read_text())["prompts"][0]
        self.latents = pd.read_parquet(folder / "latents.parquet")
        self.activations = pd.read_parquet(folder / "prompt.parquet")


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explored]:
    assert BINARY is not None
    root = tmp_path_factory.mktemp("numbers")
    made = make_harvested(root, "gpt2")
    make_checkpoint(root / "ckpt.pt", made.store)
    where: dict[str, Any] = {"store": made.store.path, "sae": root / "ckpt.pt", "model": str(made.model_folder)}
    options = {"report": False, "downstream_tokens": 40}
    analyze_prompts(
        analyze_config(**where, **options, out=root / "out", prompt=(TEXT,), ablate=("5:1", "7:0", "5:all"))
    )
    with serving(residscope.open(root / "out", **where)) as served, Page(BINARY, 1200, 900) as page:
        yield Explored(root / "out", Tab(page, served, tmp_path_factory.mktemp("saved")))
        assert page.console == []


def test_every_activation_and_the_next_tokens_are_those_of_the_prompt(explored: Explored) -> None:
    tab = explored.tab
    tab.open(f"#text={TEXT}&shown=96")
    tab.run("""(await until(() => named("Save", find("#maps")))).click();""")
    rows = list(csv.DictReader(tab.saved("latents.csv").decode().splitlines()))
    found = {(int(r["position"]), int(r["layer"]), int(r["latent"])): float(r["activation"]) for r in rows}
    table = explored.activations
    keys = zip(table["position"], table["layer"], table["latent"], strict=True)
    assert found == dict(zip(keys, map(float, table["activation"]), strict=True))
    n = len(explored.prompt["latents"])
    assert tab.run('return text("#maps h3");') == f"{n} of {n} latents on in the sentence: the most specific to it"
    assert explored.prompt["n_active_latents"] == n
    shown = tab.run(
        'return [...find("#next").querySelectorAll("code")].map((at) => at.nextSibling.textContent.trim());'
    )
    assert len(shown) == len(explored.prompt["next"])
    for words, token in zip(shown, explored.prompt["next"], strict=True):
        assert printed(words, token["p_true"], 100)


def test_what_a_change_does_is_what_analyze_says(explored: Explored) -> None:
    tab = explored.tab
    for one in explored.prompt["interventions"]:
        tab.open(f"#text={TEXT}&continued=0&changes=ablate:{one['latent']}:{'.'.join(map(str, one['layers']))}")
        said = tab.run("""await until(() => find(".heat")); find("#run").click();
          await until(() => text("#change-status").startsWith("KL")); return text("#change-status");""")
        last, mean = said.removeprefix("KL(before \u2016 after) at the last token ").split(" nats, mean over tokens ")
        assert printed(last, one["kl_last"])
        assert printed(mean.split(". ")[0], one["kl_mean"])
        shown = tab.run('return [...find("#outcome").querySelectorAll("p")].map((at) => at.textContent);')
        for sign, line, tokens in (("\u25b2", shown[0], one["increased"]), ("\u25bc", shown[1], one["decreased"])):
            parts = [part.rsplit("\u2192", 1) for part in line.split(sign)[1:]]
            assert len(parts) == len(tokens)
            for (before, after), token in zip(parts, tokens, strict=True):
                assert printed(" ".join(before.split()[-2:]), token["p_true"], 100)
                assert printed(after.strip(), token["p_changed"], 100)


def test_the_table_of_layers_is_that_of_the_summary(explored: Explored) -> None:
    explored.tab.open("#view=layers")
    lines = explored.tab.run(
        """return all("#layers-found tbody tr").map((row) => [...row.children].map((cell) => cell.textContent));"""
    )
    names = ["fvu", "validation_fvu", "delta_ce", "kl", "l0", "mean_norm", "active_latents"]
    for line, row in zip(lines, explored.summary["layers"], strict=True):
        there = [name for name in names if any(one.get(name) is not None for one in explored.summary["layers"])]
        assert line[0] == str(row["layer"])
        for words, name in zip(line[1:], there, strict=True):
            assert printed(words, row[name])


def test_a_card_has_the_numbers_of_the_table_of_latents(explored: Explored) -> None:
    live = explored.latents[explored.latents["count"] > 0].head(3)
    for latent, row in live.set_index("latent").iterrows():
        explored.tab.open(f"#latent={latent}")
        facts = explored.tab.run(
            """await until(() => find("#card dl")); return Object.fromEntries(all("#card dl div").map((at) =>
              [...at.children].map((one) => one.textContent)));"""
        )
        for name, column in (
            ("Mean layer", "layer_mean"),
            ("Spread (standard deviation), layers", "layer_std"),
            ("Firings", "count"),
            ("Tokens it fires at", "n_tokens"),
        ):
            assert printed(facts[name].split(", ")[0] if column == "n_tokens" else facts[name], row[column])
        explored.tab.run("""named("Save Share of its").click();""")
        rows = list(csv.reader(explored.tab.saved(f"latent-{latent}-probs.csv").decode().splitlines()))[1:]
        assert [float(value) for _, value in rows] == list(row["probs"])
