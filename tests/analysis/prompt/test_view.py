"""The prompt view: its codes against those of the store's own sequences, and the command."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from analysis.cli import main
from analysis.prompt.intervene import Intervention
from analysis.prompt.view import Activations, Usual, latents_of, read_prompt, run_prompt, view_prompt
from analysis.prompt.words import token_at
from residscope.errors import UsageError
from tests.support.harvested import make_harvested
from tests.support.models import ARCHITECTURES
from tests.support.prompted import TEXT, Make, Setting, read

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("with_lens", [False, True], ids=["bare", "lens"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_codes_are_those_of_the_same_text_in_the_store(make: Make, architecture: str, with_lens: bool) -> None:
    setting = make(architecture, with_lens=with_lens)
    store, table = setting.made.store, setting.made.store.tokens
    n = 20  # of the first sequence, which opens with BOS or with the first document's first token
    ids = table.token_id[:n].astype(np.int64)
    tokens = read(setting)._replace(ids=ids, kept=table.keep[:n].copy())
    found = run_prompt(setting.subject, tokens, setting.layers)[1]
    x = torch.from_numpy(store.read(slice(0, n), None))  # [n, L, D]
    expected = {}
    for i, layer in enumerate(setting.layers):
        values, indices = setting.sae.encode(x[:, i])
        for t in np.flatnonzero(table.keep[:n]):
            for value, latent in zip(values[t].tolist(), indices[t].tolist(), strict=True):
                if value > 0:
                    expected[int(t), layer, latent] = value
    rows = zip(*(column.tolist() for column in found), strict=True)
    assert {(t, layer, latent): a for t, layer, latent, a in rows} == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_piece_of_a_character_is_named_by_its_beginning() -> None:
    prompt = {"tokens": [{"token": token} for token in ("", "a", "\u4f60", "", "")]}
    assert [token_at(prompt, position) for position in range(5)] == ["", "a", "\u4f60", "\u4f60", "\u4f60"]


def test_a_latent_that_is_active_nowhere_is_not_ablated_but_named(make: Make) -> None:
    setting = make("llama")
    tokens = read(setting)
    active = {*run_prompt(setting.subject, tokens, setting.layers)[1].latent.tolist()}
    silent = next(latent for latent in range(96) if latent not in active)
    wanted = [
        Intervention(kind="ablate", latent=silent, layers=(0,)),
        Intervention(kind="steer", latent=silent, layers=(0,), coefficient=2.0),
    ]
    found = view_prompt(setting.subject, TEXT, tokens, setting.layers, wanted, Usual(np.zeros(96), 1))
    assert found.silent == [silent]
    assert [result.intervention.kind for result in found.results] == ["steer"]


def test_a_prompt_is_opened_as_the_stores_sequences_and_documents_are(make: Make) -> None:
    with_bos, without = read(make("llama")), read(make("gpt2"))
    assert with_bos.ids[0] == 257
    assert without.ids[0] == 256
    for tokens in (with_bos, without):
        assert "".join(tokens.texts[1:]) == TEXT
        assert tokens.kept.tolist() == [False, *[True] * len(TEXT)]
    with pytest.raises(UsageError, match="returns no tokens"):
        read(make("llama"), "")
    with pytest.raises(UsageError, match="takes at most 64: give a shorter"):
        read(make("llama"), "a" * 64)


@pytest.mark.parametrize("options", [{"pack": False}, {"document_separator": ""}, {"keep_first_position": True}])
def test_the_first_word_is_kept_whatever_the_stores_sequences_are(tmp_path: Path, options: dict[str, Any]) -> None:
    for architecture, opening in (("gpt2", 256), ("llama", 257)):
        made = make_harvested(tmp_path, architecture, **options)
        tokens = read_prompt(made.store, made.model.tokenizer, made.model.causal_lm.config, TEXT)
        assert tokens.ids[0] == opening
        assert "".join(tokens.texts[1:]) == TEXT
        assert tokens.kept.tolist() == [False, *[True] * len(TEXT)]


def test_an_opening_is_read_from_stores_of_before_and_may_have_any_length(make: Make) -> None:
    made = make("gpt2").made
    config = made.model.causal_lm.config
    for recorded, ids in (({"bos_id": 9}, [9]), ({"bos_id": 7, "opening_ids": [7, 8]}, [7, 8]), ({}, [256])):
        store: Any = SimpleNamespace(meta=SimpleNamespace(provenance=recorded))
        tokens = read_prompt(store, made.model.tokenizer, config, "ab")
        assert tokens.ids[:-2].tolist() == ids
        assert tokens.kept.tolist() == [*[False] * len(ids), True, True]
    small = transformers.GPT2Config(vocab_size=100)
    with pytest.raises(UsageError, match=r"no token 256: its embedding has 100 rows"):
        read_prompt(made.store, made.model.tokenizer, small, "ab")


def test_latents_are_summed_up_as_by_hand() -> None:
    activations = Activations(
        position=np.array([1, 1, 2, 2, 3]),
        layer=np.array([0, 2, 0, 5, 5]),
        latent=np.array([7, 7, 3, 7, 9]),
        activation=np.array([1.0, 3.0, 2.5, 4.0, 2.5], np.float32),
    )
    found = latents_of(activations, Usual(np.zeros(10), 97), 3)  # none of them ever fired
    assert found.latent.tolist() == [7, 3, 9]
    assert found.mass.tolist() == [8, 2.5, 2.5]
    assert found.layer_mean.tolist() == pytest.approx([(0 * 1 + 2 * 3 + 5 * 4) / 8, 0, 5])
    assert found.peak_layer.tolist() == [5, 0, 5]
    assert found.peak.tolist() == [4, 2.5, 2.5]
    assert found.peak_position.tolist() == [2, 2, 3]
    assert found.specificity.tolist() == pytest.approx([mass * np.log(100 / 3) for mass in (8, 2.5, 2.5)])
    total = np.zeros(10)
    total[7], total[3] = 792, 10  # one that is on in any text, and one that is not
    found = latents_of(activations, Usual(total, 97), 3)
    assert found.latent.tolist() == [9, 3, 7]
    expected = [2.5 * np.log(100 / 3), 2.5 * np.log(2.5 / (12.5 * 0.03)), 8 * np.log(8 / (800 * 0.03))]
    assert found.specificity.tolist() == pytest.approx(expected)


def test_a_prompt_of_no_text_is_refused(make: Make) -> None:
    with pytest.raises(UsageError, match="is not valid UTF-8"):
        read(make("gpt2"), "caf\udce9")


def command(setting: Setting, out: Path, *words: str) -> list[str]:
    made = setting.made
    lens = ["--lens", str(made.lens_folder)] if made.lens_folder else []
    options = ["--no-intervals", "--no-nulls", "--no-redundancy", "--no-pca", "--downstream-tokens", "0"]
    store = ["--store", str(made.store.path), "--sae", str(setting.checkpoint), "--model", str(made.model_folder)]
    return [*store, *lens, "--out", str(out), *options, *words]


@pytest.mark.parametrize("with_lens", [False, True], ids=["bare", "lens"])
def test_the_command_adds_prompts_to_an_analysis_and_keeps_it(
    make: Make, with_lens: bool, tmp_path: Path, capsys: Any
) -> None:
    setting = make("llama", with_lens=with_lens)
    assert main(command(setting, tmp_path, "--prompt", TEXT, "second", "--json")) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((tmp_path / "prompt.json").read_text())
    assert content["schema_version"] == 2
    first, second = content["prompts"]
    assert [first["text"], second["text"]] == [TEXT, "second"]
    assert [one["kind"] for one in first["interventions"]] == ["ablate"] * 8
    analysis = json.loads((tmp_path / "summary.json").read_text())
    total, n = pd.read_parquet(tmp_path / "latents.parquet")["total"], len(TEXT)
    for one in first["latents"]:
        usual = (total[one["latent"]] + one["mass"]) * n / (analysis["n_tokens"] + n)
        assert one["specificity"] == pytest.approx(one["mass"] * np.log(one["mass"] / usual))
    order = [one["specificity"] for one in first["latents"]]
    assert order == sorted(order, reverse=True)
    assert [one["latent"] for one in first["interventions"]] == [one["latent"] for one in first["latents"][:8]]
    table = pd.read_parquet(tmp_path / "prompt.parquet")
    expected = run_prompt(setting.subject, read(setting), setting.layers)[1]
    rows = table[table["prompt"] == 0]
    for name in ("position", "layer", "latent"):
        assert rows[name].tolist() == getattr(expected, name).tolist()
    np.testing.assert_allclose(rows["activation"], expected.activation, rtol=1e-5)
    assert set(rows["token"]) == set(TEXT)
    docs = (DOCS / "outputs.md").read_text(encoding="utf-8").split("## `analyze --prompt")[1].split("\n## ")[0]
    effect = first["interventions"][0]
    changes = next(one for found in first["interventions"] for one in (*found["increased"], *found["decreased"]))
    for name in (*table.columns, *content, *first, *first["tokens"][0], *first["latents"][0], *effect, *changes):
        assert name in docs, name
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="prompt"' in report
    summary = (tmp_path / "summary.json").stat()
    latent, layer = first["latents"][3]["latent"], first["latents"][3]["peak_layer"]
    words = ["--prompt", TEXT, "--ablate", str(latent), "--steer", f"{latent}:{layer}:6"]
    assert main(command(setting, tmp_path, *words)) == 0
    said = capsys.readouterr().out
    assert f"ablate latent {latent} at layer {layer}" in said
    assert f"steer latent {latent} at layer {layer} by +6" in said
    after = (tmp_path / "summary.json").stat()
    assert (after.st_mtime_ns, after.st_ino) == (summary.st_mtime_ns, summary.st_ino)  # the analysis was not made again
    again = json.loads((tmp_path / "prompt.json").read_text())["prompts"]
    assert [one["kind"] for one in again[0]["interventions"]] == ["ablate", "steer"]
    assert again[0]["interventions"][0] == first["interventions"][3]
    assert main(command(setting, tmp_path)) == 0  # a new analysis: what belonged to the last one goes
    assert not (tmp_path / "prompt.json").exists()
    assert 'id="prompt-data-0"' not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_makes_no_sense_ends_before_any_work(make: Make, tmp_path: Path, capsys: Any) -> None:
    setting = make("gpt2")
    out = tmp_path / "out"
    for words, message in (
        (["--prompt", TEXT, "--ablate", "96"], "latents 0 to 95"),
        (["--prompt", TEXT, "--ablate", "3:7"], "trained on layers 0 1 2, found 7"),
        (["--prompt", TEXT, "--steer", "3:1"], "LATENT:LAYER:COEFFICIENT"),
        (["--steer", "3:1:2"], "give one with --prompt"),
    ):
        assert main(command(setting, out, *words)) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
