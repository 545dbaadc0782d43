"""The prompt view: its codes against those of the store's own sequences, interventions against forward passes made by
hand, and the command."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor

from analysis.cli import main
from analysis.prompt.intervene import (
    N_AT_TOKEN,
    Effect,
    Intervention,
    PromptedModel,
    PromptRun,
    parse_ablate,
    parse_steer,
)
from analysis.prompt.view import Activations, Usual, latents_of, read_prompt, run_prompt
from residscope.errors import UsageError
from tests.support.harvested import Harvested, make_checkpoint, make_harvested
from tests.support.models import ARCHITECTURES, N_LAYERS
from train.model import MLSAE

DOCS = Path(__file__).parents[3] / "docs"
TEXT = "mary and john"


class Setting(NamedTuple):
    made: Harvested
    sae: MLSAE
    checkpoint: Path

    @property
    def subject(self) -> PromptedModel:
        return PromptedModel(self.made.model, self.sae, self.made.lens, self.made.store.meta.stored_dtype)

    @property
    def layers(self) -> list[int]:
        return list(self.made.store.meta.layers)


Make = Callable[..., Setting]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("prompt")
    made: dict[Any, Setting] = {}

    def make_one(architecture: str, *, with_lens: bool = False) -> Setting:
        key = (architecture, with_lens)
        if key not in made:
            harvested = make_harvested(root, architecture, with_lens=with_lens)
            path = root / f"{architecture}-{with_lens}.pt"
            made[key] = Setting(harvested, make_checkpoint(path, harvested.store), path)
        return made[key]

    return make_one


def read(setting: Setting, text: str = TEXT) -> Any:
    model = setting.made.model
    return read_prompt(setting.made.store, model.tokenizer, model.causal_lm.config, text)


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


def test_a_prompt_is_opened_as_the_stores_sequences_and_documents_are(make: Make) -> None:
    with_bos, without = read(make("llama")), read(make("gpt2"))
    assert with_bos.ids[0] == 257
    assert without.ids[0] == 256
    for tokens in (with_bos, without):
        assert "".join(tokens.texts[1:]) == TEXT
        assert tokens.kept.tolist() == [False, *[True] * len(TEXT)]
    with pytest.raises(UsageError, match="returns no tokens"):
        read(make("llama"), "")
    with pytest.raises(UsageError, match="takes at most 64; give a shorter"):
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


def by_hand(setting: Setting, tokens: Any, layer: int, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Log probabilities [N, V] of the true run and of one in which `change` makes block `layer`'s output [n, D] at the
    kept positions, through the whole model with its head."""
    model, kept = setting.made.model, torch.from_numpy(tokens.kept)
    ids = torch.from_numpy(tokens.ids)[None]

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        residual = output[0] if isinstance(output, tuple) else output
        changed = residual.clone()
        changed[0, kept] = change(residual[0, kept])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with torch.no_grad():
        true = model.causal_lm(ids).logits[0]
        handle = model.blocks[layer].register_forward_hook(hook)
        other = model.causal_lm(ids).logits[0]
        handle.remove()
    return true, other


def expect(effect: Effect, true: Tensor, other: Tensor, tokens: Any) -> None:
    """The numbers of `effect`, from logits [N, V]."""
    log_p, log_q = true.log_softmax(-1), other.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert effect.kl_last == pytest.approx(kl[-1].item(), rel=1e-3, abs=2e-5)
    assert effect.kl_mean == pytest.approx(kl[torch.from_numpy(tokens.kept)].mean().item(), rel=1e-3, abs=2e-5)
    rise = log_q[-1].exp() - log_p[-1].exp()
    change = other[-1] - true[-1]
    change -= change.mean()
    for found, sign in ((effect.increased, 1), (effect.decreased, -1)):
        best = (sign * rise).sort(descending=True)
        assert [sign * (one.p_changed - one.p_true) for one in found] == pytest.approx(
            best.values[: len(found)].tolist(), abs=1e-5
        )
        for one in found:
            assert one.logit_change == pytest.approx(change[one.token_id].item(), abs=1e-3)
            assert one.p_true == pytest.approx(log_p[-1, one.token_id].exp().item(), abs=1e-5)


@pytest.mark.parametrize("with_lens", [False, True], ids=["bare", "lens"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_interventions_are_what_one_computes_by_hand(make: Make, architecture: str, with_lens: bool) -> None:
    setting = make(architecture, with_lens=with_lens)
    sae, lens, layer = setting.sae, setting.made.lens, 1
    tokens = read(setting)
    latents = latents_of(run_prompt(setting.subject, tokens, [layer])[1], Usual(np.zeros(96), 1), 1)
    latent = int(latents.latent[0])
    run = PromptRun(setting.subject, torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.kept)[None])

    def without(x: Tensor) -> Tensor:
        y = x if lens is None else lens.apply(x, layer)
        found = sae(y)
        codes = found.codes
        emptied = codes._replace(values=torch.where(codes.indices == latent, 0.0, codes.values))
        y_changed = y + sae.decode(emptied, found.mean, found.std) - found.x_hat
        return y_changed if lens is None else lens.invert(y_changed, layer)

    def pushed(x: Tensor) -> Tensor:
        y = x if lens is None else lens.apply(x, layer)
        y_changed = y + 4.5 * (y.std(dim=1, keepdim=True) + 1e-5) * sae.W_dec[latent]
        return y_changed if lens is None else lens.invert(y_changed, layer)

    with torch.no_grad():
        ablated = run.effect([Intervention(kind="ablate", latent=latent, layers=(layer,))])
        expect(ablated, *by_hand(setting, tokens, layer, without), tokens)
        steered = run.effect([Intervention(kind="steer", latent=latent, layers=(layer,), coefficient=4.5)])
        expect(steered, *by_hand(setting, tokens, layer, pushed), tokens)
    p = by_hand(setting, tokens, layer, without)[0].softmax(dim=-1)
    assert len(run.next_at) == len(p)
    for after, row in zip(run.next_at, p, strict=True):
        assert [chance for _, chance in after] == pytest.approx(row.topk(N_AT_TOKEN).values.tolist(), abs=1e-5)
        assert all(row[token].item() == pytest.approx(chance, abs=1e-5) for token, chance in after)
    assert ablated.kl_last > 0
    assert steered.kl_mean > 0


@pytest.mark.parametrize("with_lens", [False, True], ids=["bare", "lens"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_intervention_of_nothing_changes_nothing(make: Make, architecture: str, with_lens: bool) -> None:
    setting = make(architecture, with_lens=with_lens)
    tokens = read(setting)
    run = PromptRun(setting.subject, torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.kept)[None])
    active = set(run_prompt(setting.subject, tokens, setting.layers)[1].latent.tolist())
    silent = next(latent for latent in range(96) if latent not in active) if len(active) < 96 else None
    every = tuple(range(N_LAYERS[architecture]))
    for layers in (*((layer,) for layer in every), every):
        for one in (
            Intervention(kind="steer", latent=3, layers=layers, coefficient=0.0),
            *([Intervention(kind="ablate", latent=silent, layers=layers)] if silent is not None else []),
        ):
            effect = run.effect([one])
            assert effect.kl_last == effect.kl_mean == 0
            assert effect.increased == effect.decreased == []


def test_changes_of_several_layers_are_those_of_hooks_written_out(make: Make) -> None:
    setting = make("llama")
    model, sae, tokens = setting.made.model, setting.sae, read(setting)
    ids, kept = torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.kept)[None]
    found = latents_of(run_prompt(setting.subject, tokens, setting.layers)[1], Usual(np.zeros(96), 1), 1)
    first, second = found.latent[:2].tolist()

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        found = sae(x[0].float())
        gone = torch.where(found.codes.indices == first, found.codes.values, 0.0).sum(1, keepdim=True)
        x[0, 1:] += (found.std * (3.0 * sae.W_dec[second] - gone * sae.W_dec[first]))[1:]

    with torch.no_grad():
        true = model.causal_lm(ids).logits[0]
        handles = [block.register_forward_hook(hook) for block in model.blocks]
        other = model.causal_lm(ids).logits[0]
        for handle in handles:
            handle.remove()
    both = [
        Intervention(kind="ablate", latent=first, layers="all").at(setting.layers),
        Intervention(kind="steer", latent=second, layers=tuple(setting.layers), coefficient=3.0),
    ]
    run = PromptRun(setting.subject, ids, kept)
    expect(run.effect(both), true, other, tokens)
    assert run.effect(both[::-1]) == run.effect(both)
    assert not any(block._forward_hooks for block in model.blocks)


def test_what_the_model_goes_on_with_is_changed_at_new_tokens_too(make: Make) -> None:
    setting = make("llama")
    model, sae, tokens = setting.made.model, setting.sae, read(setting)
    ids, kept = torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.kept)[None]

    def hook(module: Any, arguments: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        x[0, 1:] += (60.0 * sae(x[0].float()).std * sae.W_dec[3])[1:]

    def greedy(n: int) -> list[int]:
        grown = ids
        with torch.no_grad():
            for _ in range(n):
                grown = torch.cat([grown, model.causal_lm(grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        return grown[0, ids.shape[1] :].tolist()

    run = PromptRun(setting.subject, ids, kept)
    true = greedy(6)
    assert run.continued(6) == true[: len(run.continued(6))]
    handle = model.blocks[1].register_forward_hook(hook)
    pushed = greedy(6)
    handle.remove()
    found = run.continued(6, [Intervention(kind="steer", latent=3, layers=(1,), coefficient=60.0)])
    assert found == pushed[: len(found)] != true[: len(found)]


def test_predictions_that_are_no_numbers_are_refused(make: Make) -> None:
    setting = make("llama", with_lens=False)
    tokens = read(setting)
    run = PromptRun(setting.subject, torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.kept)[None])
    with pytest.raises(UsageError, match=r"steer latent 3: .* smaller coefficient"):
        run.effect([Intervention(kind="steer", latent=3, layers=(1,), coefficient=float("nan"))])


@pytest.mark.parametrize("text", ["17:3", "17", "a:1:2", "17:1:x", "1:2:3:4", "", "1:1:nan", "1:1:-inf", "1:1:1e300"])
def test_a_steering_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="LATENT:LAYER:COEFFICIENT"):
        parse_steer(text)


def test_a_prompt_of_no_text_is_refused(make: Make) -> None:
    with pytest.raises(UsageError, match="is not valid UTF-8"):
        read(make("gpt2"), "caf\udce9")


def test_interventions_are_read() -> None:
    assert parse_steer("17:3:-2.5") == Intervention(kind="steer", latent=17, layers=(3,), coefficient=-2.5)
    assert parse_ablate("17") == Intervention(kind="ablate", latent=17, layers=None)
    assert parse_ablate("17:3") == Intervention(kind="ablate", latent=17, layers=(3,))
    assert parse_ablate("17:5,3,5") == Intervention(kind="ablate", latent=17, layers=(3, 5))
    assert parse_steer("17:all:1") == Intervention(kind="steer", latent=17, layers="all", coefficient=1.0)
    with pytest.raises(UsageError, match="LATENT or LATENT:LAYER"):
        parse_ablate("17:3:1")


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
