"""The parts of an analysis that need the transformer: when they run, that the files hold what was measured, and what
is said when the model is not to be had."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from analysis.cli import main
from analysis.model.downstream import measure_downstream, sae_reconstruction
from analysis.model.downstream_numbers import BOUNDED, PER_LAYER
from analysis.model.findings import FEWEST_TOKENS, MOST_TOKENS, default_tokens
from analysis.model.transformer import spec_of_store
from analysis.run import analyze
from analysis.selection import held_out_documents
from harvest.config import HarvestConfig
from harvest.options_file import options_file, save_options
from residscope.errors import UsageError
from residscope.options import parse_options
from tests.support.harvested import Harvested, make_checkpoint, make_harvested
from tests.support.harvesting import harvest_config
from tests.support.models import tiny_model
from tests.support.small import analyze_config, save_small
from tests.support.stores import make_store
from train.compare.pca import Components
from train.model import MLSAE

DOCS = Path(__file__).parents[3] / "docs"


class Setting(NamedTuple):
    made: Harvested
    sae: MLSAE
    checkpoint: Path


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "lens"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("with_model")
    made = make_harvested(root, "llama", with_lens=request.param, lengths=(19,) * 20, n_tokens=360)
    return Setting(made, make_checkpoint(root / "ckpt.pt", made.store), root / "ckpt.pt")


def run(setting: Setting, out: Path, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"report": False, "pca": False, "nulls": False, **options}
    return analyze(analyze_config(store=setting.made.store.path, sae=setting.checkpoint, out=out, **given))


def found_by(setting: Setting) -> dict[str, str]:
    made = setting.made
    lens = {"lens": str(made.lens_folder)} if made.lens_folder else {}
    return {"model": str(made.model_folder), **lens}


def test_the_files_hold_what_was_measured_on_held_out_tokens(setting: Setting, tmp_path: Path, capsys: Any) -> None:
    made = setting.made
    summary = run(setting, tmp_path, **found_by(setting))
    said = capsys.readouterr().out
    held_out = summary["validation"]["n_documents"]
    rows = pd.read_parquet(tmp_path / "layers.parquet")
    split = held_out_documents(made.store.tokens, {"fraction": 0.2, "seed": 5}, same_store=True)
    expected = measure_downstream(
        made.store,
        made.model,
        sae_reconstruction(setting.sae, made.lens),
        lens=made.lens,
        counted=split[made.store.tokens.document],
    )
    result = expected.result()
    downstream = summary["downstream"]
    assert downstream["tokens"] == "validation"
    assert downstream["n_tokens"] == result.n_tokens > 0
    assert downstream["n_documents"] == held_out == split.sum()
    assert downstream["true_ce"] == pytest.approx(result.true_ce)
    for name in PER_LAYER:
        values = getattr(result, name)
        np.testing.assert_allclose(rows[name], values, rtol=1e-4, atol=1e-5)
        found = np.array([*(row[name] for row in summary["layers"]), downstream[name]], float)  # null as NaN
        np.testing.assert_allclose(found, [*values, values.mean()], rtol=1e-4, atol=1e-5)
    assert summary["transformer"]["reason"] is None
    assert f"{downstream['delta_ce']:.3g}" in said
    assert "delta CE and KL in nats per token: lower is better" in said
    latents = pd.read_parquet(tmp_path / "latent_logits.parquet")
    assert latents["latent"].tolist() == np.flatnonzero(pd.read_parquet(tmp_path / "latents.parquet")["count"]).tolist()
    tokens = summary["latent_logits"]
    assert tokens["embedding_cosine"] == pytest.approx(latents["embedding_cosine"].median())
    assert tokens["unembedding_cosine"] == pytest.approx(latents["unembedding_cosine"].median())
    assert f"embedding {tokens['embedding_cosine']:.3g} ({tokens['embedding_chance']:.3g})" in said
    json.dumps(summary, allow_nan=False)
    docs = (DOCS / "outputs.md").read_text(encoding="utf-8")
    for name in (*rows.columns, *latents.columns, *downstream, *tokens):
        assert name in docs, name
    method = (DOCS / "method.md").read_text(encoding="utf-8")
    for name in (
        *PER_LAYER,
        "true_ce",
        *(set(tokens) - {"norm_folded"}),
        "promoted_logits",
        "suppressed_logits",
    ):
        assert f"`{name}`" in method, name


def test_several_layers_at_once_stand_beside_pca_fitted_on_training_documents(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[MLSAE] = []
    original = Components.autoencoder
    monkeypatch.setattr(Components, "autoencoder", lambda self: kept.append(original(self)) or kept[-1])
    made = setting.made
    found = run(setting, tmp_path, **found_by(setting), pca=True)["downstream"]["together"]
    split = held_out_documents(made.store.tokens, {"fraction": 0.2, "seed": 5}, same_store=True)
    counted: dict[str, Any] = {
        "counted": split[made.store.tokens.document],
        "lens": made.lens,
        "max_tokens": found["n_tokens"],
    }
    layers = [tuple(group["layers"]) for group in found["groups"]]
    linear = sae_reconstruction(kept[0], made.lens)
    by_pca = measure_downstream(made.store, made.model, linear, groups=layers, **counted).result()
    assert kept[0].config.k == 8
    assert [group["pca_delta_ce"] for group in found["groups"]] == pytest.approx(by_pca.delta_ce.tolist(), abs=1e-4)
    assert [group["pca_kl"] for group in found["groups"]] == pytest.approx(by_pca.kl.tolist(), abs=1e-4)
    alone = measure_downstream(made.store, made.model, sae_reconstruction(setting.sae, made.lens), **counted).result()
    assert found["groups"][0]["sum_alone_kl"] == pytest.approx(alone.kl.sum(), rel=1e-4)
    outputs = (DOCS / "outputs.md").read_text(encoding="utf-8")
    assert all(name in outputs for name in found["groups"][0])


def test_intervals_are_given_where_there_are_documents_enough(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("uncertainty", "model.downstream_numbers"):
        monkeypatch.setattr(f"analysis.{module}.MIN_INTERVAL_GROUPS", 15)
    options = {**found_by(setting), "split": "train", "downstream_tokens": 10_000}
    # Nothing is held out from a store that the autoencoder was not trained on: all analysed tokens are measured.
    other = setting.checkpoint.with_name("other.pt")
    save_small(other, setting.sae, setting.made.store, {"content_hash": "another", "validation": None})
    summary = analyze(
        analyze_config(
            store=setting.made.store.path,
            sae=other,
            out=tmp_path,
            report=False,
            nulls=False,
            **{**options, "split": "all"},
        )
    )
    downstream = summary["downstream"]
    assert downstream["tokens"] == "analysed"
    assert downstream["n_documents"] >= 15
    for name in PER_LAYER:
        if downstream[name] is None:  # an ablation cost nothing somewhere
            assert name.startswith("loss_recovered")
            assert downstream["ci95"][name] is None
            continue
        low, high = downstream["ci95"][name]
        assert low <= downstream[name] <= high, name
    for row in summary["layers"]:
        for name in BOUNDED:
            if row[f"{name}_low"] is not None:
                assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert None not in [row[f"{name}_low"] for name in ("delta_ce", "kl")]


def test_without_the_model_the_analysis_goes_on_and_says_why(setting: Setting, tmp_path: Path, capsys: Any) -> None:
    summary = run(setting, tmp_path)
    assert summary["downstream"] is summary["latent_logits"] is None
    assert "give its path with" in summary["transformer"]["reason"]
    assert all(row["delta_ce"] is None and row["kl_high"] is None for row in summary["layers"])
    assert pq.read_table(tmp_path / "layers.parquet")["delta_ce"].null_count == len(summary["layers"])
    assert not (tmp_path / "latent_logits.parquet").exists()
    said = capsys.readouterr().out
    assert "Downstream quality and the tokens that latents promote were skipped: " in said
    assert "--model FOLDER says where the model is" in said


def test_the_harvest_has_left_word_where_model_and_lens_are(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it was given relative paths, and the analysis runs elsewhere."""
    made = setting.made
    monkeypatch.chdir(made.model_folder)
    record = options_file(made.store.path)
    config = harvest_config(
        model=".",
        lens=made.lens_folder and f"../{made.lens_folder.name}",
        dataset=("../texts:2", "pydoc"),
        out=made.store.path,
    )
    try:
        save_options(config)
        monkeypatch.chdir(tmp_path)
        words = ["--config", str(record)]
        again = parse_options(HarvestConfig, words, prog="harvest", description="")
        assert again.text.dataset == (f"{made.model_folder.parent}/texts:2", "pydoc")
        assert again.weights.model == str(made.model_folder)
        assert again.storage.lens == (made.lens_folder and str(made.lens_folder))
        assert run(setting, tmp_path / "out")["transformer"]["reason"] is None
        record.write_text(f'model = "{tiny_model("llama", tmp_path / "llama", seed=1)}"')
        assert "content hash should be" in run(setting, tmp_path / "other")["transformer"]["reason"]
    finally:
        record.unlink()


def test_a_folder_of_no_known_place_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    """By its name alone it would be: "gpt2" is a short name too."""
    made = make_harvested(tmp_path, "gpt2", lengths=(40,), n_tokens=30)
    with pytest.raises(
        UsageError, match=r"from the folder 'gpt2', which was not found, .*gpt2-False.harvest.toml next to .* --model"
    ):
        spec_of_store(made.store, offline=True)


def test_a_model_of_the_hub_is_not_taken_without_its_adapter(tmp_path: Path) -> None:
    x = np.zeros((64, 1, 4), np.float32)
    record = {"model": "me/tuned", "model_source": "hub", "model_revision": "abc", "adapter": "LORA, peft 1"}
    store = make_store(tmp_path / "a.zarr", x, provenance=record)
    with pytest.raises(UsageError, match=r"me/tuned has an adapter, .* give --model"):
        spec_of_store(store, offline=True)


def test_asked_for_outright_a_missing_model_is_an_error_before_any_work(
    setting: Setting, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(UsageError, match="give its path with"):
        run(setting, tmp_path / "out", downstream_tokens=5)
    assert not (tmp_path / "out").exists()
    words = ["--store", str(setting.made.store.path), "--sae", str(setting.checkpoint), "--downstream-tokens", "5"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "give its path with" in line


def test_what_is_turned_off_is_not_made(setting: Setting, tmp_path: Path, capsys: Any) -> None:
    summary = run(setting, tmp_path / "none", downstream_tokens=0, latent_logits=False)
    assert summary["transformer"]["reason"] is summary["downstream"] is summary["latent_logits"] is None
    assert "transformer" not in capsys.readouterr().out
    summary = run(setting, tmp_path / "tokens", downstream_tokens=0, **found_by(setting))
    assert summary["downstream"] is None
    assert summary["latent_logits"] is not None
    summary = run(setting, tmp_path / "downstream", latent_logits=False, downstream_tokens=7, **found_by(setting))
    assert 0 < summary["downstream"]["n_tokens"] <= 7
    assert summary["latent_logits"] is None
    assert not (tmp_path / "downstream" / "latent_logits.parquet").exists()


def test_an_untrained_model_is_drawn_again_from_its_seed(tmp_path: Path) -> None:
    made = make_harvested(tmp_path, "gpt_neox", lengths=(40,), n_tokens=30, random_init=True, seed=3)
    make_checkpoint(tmp_path / "ckpt.pt", made.store)
    setting = Setting(made, make_checkpoint(tmp_path / "ckpt.pt", made.store), tmp_path / "ckpt.pt")
    summary = run(setting, tmp_path / "out", model=str(made.model_folder), downstream_tokens=10)
    assert summary["downstream"]["n_tokens"] > 0  # `check_model` compared its vectors with the store's


def test_the_default_number_of_tokens_falls_with_the_models_size(setting: Setting) -> None:
    model = setting.made.model
    assert default_tokens(model, 4) == MOST_TOKENS
    assert default_tokens(model, 10**9) == FEWEST_TOKENS
