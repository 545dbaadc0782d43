"""Whole analyses of a small store, every number against a dense computation of its definition; and what may not change
it."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zarr

from analysis.encoder import Encoder
from analysis.run import analyze
from residscope.destinations import held_alone
from residscope.errors import ResidscopeError, UsageError
from store.activations import ActivationStore
from store.shards import ShardReader
from store.shuffle import validation_documents
from tests.support.dense import decompose, reference_ratios
from tests.support.small import LAYERS, VALIDATION, Small, analyze_config, make_small, save_small
from tests.support.small import run_small as run
from tests.support.stores import make_store, random_activations
from train.model import MLSAE, STD_EPSILON, SAEConfig

WEIGHTINGS = ("mass", "equal", "latent")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    return make_small(tmp_path_factory.mktemp("small"))


class Dense:
    """The autoencoder and its numbers, from the formulas, one dense array at a time, in float64."""

    def __init__(self, small: Small, chosen: np.ndarray) -> None:
        self.x = small.x[chosen].astype(np.float64)  # [T, L, D]
        w_enc, w_dec, b_pre = (
            p.detach().double().numpy() for p in (small.weights.W_enc, small.weights.W_dec, small.weights.b_pre)
        )
        self.own_mean = self.x.mean(axis=-1, keepdims=True)
        self.scale = self.x.std(axis=-1, ddof=1, keepdims=True) + STD_EPSILON
        self.standardized = (self.x - self.own_mean) / self.scale
        z = (self.standardized - b_pre) @ w_enc.T
        threshold = np.sort(z, axis=-1)[..., [-small.weights.config.k]]
        self.codes = np.where(z >= threshold, np.maximum(z, 0), 0)  # [T, L, M]
        self.x_hat = (self.codes @ w_dec + b_pre) * self.scale + self.own_mean

    def fvu(self, x_hat: np.ndarray) -> np.ndarray:
        return ((self.x - x_hat) ** 2).sum(axis=(0, 2)) / ((self.x - self.x.mean(axis=0)) ** 2).sum(axis=(0, 2))


def masks(small: Small) -> dict[str, np.ndarray]:
    n_documents = int(small.document.max()) + 1
    held_out = validation_documents(n_documents, **VALIDATION)[small.document]
    return {"all": small.keep, "train": small.keep & ~held_out, "validation": small.keep & held_out}


def test_tokens_that_carry_much_of_the_variance_are_named(small, tmp_path):
    assert not any("variance" in warning for warning in run(small, tmp_path / "a")["warnings"])
    x = random_activations(300, len(LAYERS), 12)
    x[100, 2] *= 100
    store = make_store(tmp_path / "acts.zarr", x, layers=LAYERS, n_model_layers=10)
    save_small(tmp_path / "ckpt.pt", small.weights, store, {})
    planted = small._replace(store=store.path, sae=tmp_path / "ckpt.pt")
    (warning,) = (text for text in run(planted, tmp_path / "b")["warnings"] if "variance" in text)
    found = f"% of the variance of layer {LAYERS[2]} is in 1 token of {store.tokens.keep.sum()} examined, probably"
    assert f"{found} attention sinks: id 100 1 x" in warning


@pytest.mark.parametrize("split", ["all", "train", "validation"])
def test_every_number_equals_a_dense_computation(small, tmp_path, split):
    summary = run(small, tmp_path, split=split)
    chosen = masks(small)[split]
    dense = Dense(small, chosen)
    layers = np.array(LAYERS)

    for weighting in WEIGHTINGS:
        found = summary["variance"][weighting]
        expected = decompose(dense.codes, layers, weighting)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-9), f"{weighting} {name}"
        aggregate = expected["within_token"] + expected["between_tokens"]
        assert found["aggregate"] == pytest.approx(aggregate, rel=1e-9)
        assert found["aggregate_over_token"] == pytest.approx(aggregate / expected["within_token"], rel=1e-9)
        parts = found["within_token"] + found["between_tokens"] + found["between_latents"]
        assert parts == pytest.approx(found["total"], rel=1e-12)
    for name, value in reference_ratios(dense.codes, layers).items():
        assert summary["variance"]["mlsae_compat"][name] == pytest.approx(value, rel=1e-9), name

    rows = pd.DataFrame(summary["layers"])
    deviation = dense.x - small.x[small.keep].astype(np.float64).mean(axis=0)
    unit = deviation / np.linalg.norm(deviation, axis=-1, keepdims=True)
    expected_rows = {
        "layer": layers,
        "fvu": dense.fvu(dense.x_hat),
        "mse": ((dense.x - dense.x_hat) ** 2).mean(axis=(0, 2)),
        "l0": (dense.codes > 0).sum(axis=-1).mean(axis=0),
        "mean_norm": np.linalg.norm(dense.x, axis=-1).mean(axis=0),
        "cosine_to_next": [*(unit[:, :-1] * unit[:, 1:]).sum(axis=-1).mean(axis=0), np.nan],
        "n_vectors": [chosen.sum()] * 4,
        "active_latents": (dense.codes > 0).any(axis=0).sum(axis=-1),
        "mass_share": dense.codes.sum(axis=(0, 2)) / dense.codes.sum(),
    }
    for name, values in expected_rows.items():
        np.testing.assert_allclose(
            rows[name].astype(float), values, rtol=1e-5 if name in ("fvu", "cosine_to_next") else 1e-9, err_msg=name
        )
    if summary["uncertainty"]:
        low, fvu, high = (rows[name].to_numpy(float) for name in ("fvu_low", "fvu", "fvu_high"))
        assert ((low <= fvu) & (fvu <= high)).all()
        for name in ("fvu", "mse", "l0"):
            low, high = summary["reconstruction"]["ci95"][name]
            assert low <= summary["reconstruction"][name] <= high
    for name in ("fvu", "mse", "l0"):
        assert summary["reconstruction"][name] == pytest.approx(expected_rows[name].mean(), rel=1e-5)

    fired = (dense.codes > 0).any(axis=(0, 1))
    assert summary["latents"] == {"active": fired.sum(), "dead": (~fired).sum()}
    assert summary["n_tokens"] == chosen.sum() == summary["split"]["n_tokens"]
    assert summary["layer_numbers"] == list(LAYERS)
    table = pd.read_parquet(tmp_path / "layers.parquet")
    pd.testing.assert_frame_equal(table, rows.astype(table.dtypes))  # a column of None alone has no type in JSON
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


@pytest.mark.parametrize("split", ["all", "validation"])
def test_a_value_that_is_not_finite_is_named_by_its_place_in_the_store(tmp_path, split, monkeypatch):
    small = make_small(tmp_path)
    monkeypatch.setattr(ShardReader, "require_own", lambda *_: None)  # it would be found before
    token = int(np.flatnonzero(masks(small)["train"])[-1])  # of the last shard; in validation only PCA looks at it
    array: Any = zarr.open_group(small.store, mode="r+")["resid_post"]
    array[token, 2, 7] = np.nan
    with pytest.raises(ResidscopeError, match=f"layer 5, token {token} of the store, dimension 7: the value nan"):
        run(small, tmp_path / "out", split=split)


def test_sound_shards_that_were_swapped_are_found(tmp_path):
    small = make_small(tmp_path)
    one, other = (small.store / "resid_post" / f"c.{shard}.0.0" for shard in (1, 2))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    with pytest.raises(ResidscopeError, match=r"c\.[12]\.0\.0: .* a valid file of another shard or store"):
        run(small, tmp_path / "out")
    other.write_bytes(one.read_bytes())
    one.write_bytes(data[:-1])
    with pytest.raises(ResidscopeError, match=r"c\.1\.0\.0: the shard should have \d+ bytes"):
        run(small, tmp_path / "out")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e-3])
def test_a_value_that_is_no_activation_is_named_by_its_place_in_the_store(tmp_path, monkeypatch, value):
    small = make_small(tmp_path)
    token = int(np.flatnonzero(small.keep)[200])
    original = Encoder.encode

    def encode(self, standardized):
        codes = original(self, standardized)
        codes.values[(standardized.mean.flatten() == np.float64(small.x[token, 1].astype(np.float64).mean()))] = value
        return codes

    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(ResidscopeError, match=f"activation is {value} at layer 3, token {token} of the store"):
        run(small, tmp_path / "out")


@pytest.mark.parametrize("split", ["all", "validation"])
def test_validation_fvu_and_pca_are_on_the_held_out_documents_whatever_the_split(small, tmp_path, split):
    summary = run(small, tmp_path, split=split)
    train, validation = Dense(small, masks(small)["train"]), Dense(small, masks(small)["validation"])
    expected = validation.fvu(validation.x_hat)
    np.testing.assert_allclose(summary["validation"]["fvu_per_layer"], expected, rtol=1e-5)
    assert summary["validation_fvu"] == pytest.approx(expected.mean(), rel=1e-5)

    rows = train.standardized.reshape(-1, 12)
    _, _, directions = np.linalg.svd(rows - rows.mean(axis=0))
    projector = directions[:3].T @ directions[:3]
    x_hat = (validation.standardized - rows.mean(axis=0)) @ projector + rows.mean(axis=0)
    pca = validation.fvu(x_hat * validation.scale + validation.own_mean)
    np.testing.assert_allclose(summary["baseline"]["pca"]["fvu_per_layer"], pca, rtol=1e-5)
    assert summary["baseline"]["pca"]["fvu"] == pytest.approx(pca.mean(), rel=1e-5)
    assert summary["baseline"]["pca"]["n_train_vectors"] == len(rows)


def test_the_latent_table_equals_a_dense_computation(small, tmp_path):
    run(small, tmp_path)
    table = pd.read_parquet(tmp_path / "latents.parquet").set_index("latent")
    codes = Dense(small, small.keep).codes
    np.testing.assert_array_equal(np.stack(list(table["counts"])), (codes > 0).sum(axis=0).T)
    np.testing.assert_allclose(np.stack(list(table["totals"])), codes.sum(axis=0).T, rtol=1e-12)
    np.testing.assert_array_equal(table["n_tokens"], (codes > 0).any(axis=1).sum(axis=0))
    for latent in range(codes.shape[-1]):
        own, row = codes[:, :, [latent]], table.loc[latent]
        if not own.any():
            assert pd.isna(row["layer_mean"])
            continue
        expected = decompose(own, np.array(LAYERS), "mass")
        assert row["within_token"] == pytest.approx(expected["within_token"], rel=1e-9, abs=1e-12)
        assert row["between_tokens"] == pytest.approx(expected["between_tokens"], rel=1e-9, abs=1e-12)
        assert row["layer_var"] == pytest.approx(expected["total"], rel=1e-9, abs=1e-12)
        assert row["layer_std"] == pytest.approx(expected["total"] ** 0.5, rel=1e-9, abs=1e-9)
        profile = own.sum(axis=(0, 2)) / own.sum()
        assert row["layer_mean"] == pytest.approx(profile @ np.array(LAYERS), rel=1e-12)
        np.testing.assert_allclose(row["probs"], profile, rtol=1e-12)
        assert row["entropy"] == pytest.approx(-sum(p * np.log2(p) for p in profile if p > 0), rel=1e-9, abs=1e-12)
        assert row["mean"] == pytest.approx(own.sum() / (own > 0).sum(), rel=1e-12)


def numbers(value: Any) -> list[float]:
    """All numbers in a summary, in order, but for the time that it took, where the data lie, and the null that permutes
    the tokens of a chunk."""
    if isinstance(value, dict):
        left_out = ("seconds", "provenance", "chunk_tokens", "tokens_permuted")
        return [n for key, item in value.items() if key not in left_out for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.parametrize("shape", [{"chunk_tokens": 300, "shard_tokens": 300}, {"chunk_tokens": 8, "shard_tokens": 16}])
def test_the_numbers_do_not_depend_on_how_tokens_are_cut_into_shards(small, tmp_path, shape):
    one = run(small, tmp_path / "a")
    other = run(make_small(tmp_path, **shape), tmp_path / "b")
    for weighting in WEIGHTINGS:
        np.testing.assert_allclose(
            numbers(one["variance"][weighting]), numbers(other["variance"][weighting]), rtol=1e-12
        )
    np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-9)


def test_the_numbers_are_the_same_bits_with_any_number_of_threads_and_grouping_changes_only_rounding(
    small, tmp_path, monkeypatch
):
    one = run(small, tmp_path / "a", n_workers=1)
    three = run(small, tmp_path / "b", n_workers=3)
    assert numbers(one) == numbers(three)
    monkeypatch.setattr("analysis.jobs.TASKS", 2)
    grouped = run(small, tmp_path / "c")
    np.testing.assert_allclose(numbers(grouped), numbers(one), rtol=1e-12)


def test_float32_and_bfloat16_are_close_to_float64(small, tmp_path):
    exact = run(small, tmp_path / "a")["variance"]["mass"]["total"]
    assert run(small, tmp_path / "b", dtype="float32")["variance"]["mass"]["total"] == pytest.approx(exact, rel=1e-4)
    assert run(small, tmp_path / "c", dtype="bfloat16")["variance"]["mass"]["total"] == pytest.approx(exact, rel=0.05)


def test_max_tokens_takes_the_first_kept_tokens(small, tmp_path):
    summary = run(small, tmp_path, max_tokens=70)
    first = np.flatnonzero(small.keep)[:70]
    expected = decompose(Dense(small, first).codes, np.array(LAYERS), "mass")
    assert summary["n_tokens"] == 70
    assert summary["variance"]["mass"]["total"] == pytest.approx(expected["total"], rel=1e-9)
    assert "first 70" in summary["split"]["text"]


@pytest.mark.parametrize(("split", "trained_on"), [("all", "some"), ("train", "all"), ("validation", "none")])
def test_the_summary_says_which_tokens_and_warns_of_those_trained_on(small, tmp_path, capsys, split, trained_on):
    summary = run(small, tmp_path, split=split)
    chosen = masks(small)[split]
    assert summary["split"]["trained_on"] == trained_on
    assert f"{chosen.sum()} tokens of {len(np.unique(small.document[chosen]))} documents" in summary["split"]["text"]
    assert any("training documents" in warning for warning in summary["warnings"]) == (split != "validation")
    out = capsys.readouterr().out
    assert summary["split"]["text"] in out
    assert "times the token-level variance" in out


def test_another_store_of_the_same_model_is_analysed_and_said_to_be_another(small, tmp_path):
    other = make_small(tmp_path, n_tokens=200)
    summary = analyze(analyze_config(store=other.store, sae=small.sae, out=tmp_path / "out", report=False))
    assert summary["split"]["trained_on"] == "unknown"
    assert "not trained on this store" in " ".join(summary["warnings"])


def test_an_autoencoder_of_some_layers_is_analysed_on_those(small, tmp_path):
    part = make_small(tmp_path, trained_on={"layers": [3, 8]})
    summary = run(part, tmp_path / "out")
    assert summary["layer_numbers"] == [3, 8]
    dense = Dense(part._replace(x=part.x[:, [1, 3]]), part.keep)
    expected = decompose(dense.codes, np.array([3, 8]), "mass")
    assert summary["variance"]["mass"]["total"] == pytest.approx(expected["total"], rel=1e-9)
    np.testing.assert_allclose([row["fvu"] for row in summary["layers"]], dense.fvu(dense.x_hat), rtol=1e-5)


def test_without_held_out_documents_there_is_no_validation_and_no_baseline(tmp_path):
    summary = run(make_small(tmp_path, trained_on={"validation": None}), tmp_path / "out")
    assert summary["validation"] is None
    assert summary["validation_fvu"] is None
    assert summary["baseline"] == {"pca": None}
    assert summary["split"]["trained_on"] == "all"


def test_a_store_of_other_documents_has_no_part_held_out(tmp_path):
    other = {"content_hash": "another", "validation": {**VALIDATION, "n_documents": 31}}
    summary = run(make_small(tmp_path, trained_on=other), tmp_path / "out")
    assert summary["validation"] is None
    assert summary["baseline"] == {"pca": None}
    assert summary["split"]["trained_on"] == "unknown"
    assert summary["split"]["n_validation_tokens"] == 0


def test_relu_has_no_k_and_pca_beside_it_as_many_components_as_latents_are_active(small, tmp_path):
    """Its k sets nothing."""
    relu = MLSAE(SAEConfig(d_model=12, n_latents=24, k=3, activation="relu", encoder_bias=True))
    relu.initialize(1, torch.zeros(12))
    with ActivationStore.open(small.store) as store:
        save_small(tmp_path / "relu.pt", relu, store, {})
    summary = run(small._replace(sae=tmp_path / "relu.pt"), tmp_path / "out")
    assert summary["baseline"]["pca"]["k"] == round(summary["reconstruction"]["l0"]) > 3
    assert summary["provenance"]["sae"]["k"] is None


def test_no_pca_reads_no_more_than_the_split_needs(small, tmp_path, monkeypatch):
    read = []
    original = ActivationStore.read
    monkeypatch.setattr(
        ActivationStore, "read", lambda self, tokens, *a, **k: read.append(tokens) or original(self, tokens, *a, **k)
    )
    run(small, tmp_path, split="validation", pca=False)
    held_out = masks(small)["validation"]
    assert read
    assert all(held_out[tokens].any() for tokens in read)


def test_intervals_hold_their_value_and_are_the_same_each_time(small, tmp_path):
    one, again = (run(small, tmp_path / name)["variance"] for name in ("a", "b"))
    for weighting in WEIGHTINGS:
        assert one[weighting]["ci95"] == again[weighting]["ci95"]
        for name, (low, high) in one[weighting]["ci95"].items():
            assert low <= one[weighting][name] <= high
    assert run(small, tmp_path / "c", intervals=False)["uncertainty"] is None


def test_default_folder_is_beside_the_checkpoint_and_an_earlier_result_is_replaced(tmp_path):
    small = make_small(tmp_path)
    out = tmp_path / "ckpt.analysis"
    out.mkdir()
    (out / "report.html").write_text("of an earlier analysis")
    (out / "notes.txt").write_text("the user's own")
    analyze(analyze_config(store=small.store, sae=small.sae, report=False, intervals=False))
    assert sorted(path.name for path in out.iterdir()) == [
        "analyze.config.toml",
        "examples.parquet",
        "histograms.parquet",
        "latents.parquet",
        "layers.parquet",
        "notes.txt",
        "random_examples.parquet",
        "redundancy.parquet",
        "summary.json",
    ]


def test_a_run_that_fails_leaves_no_summary_that_looks_whole(small, tmp_path, monkeypatch):
    run(small, tmp_path)
    before = (tmp_path / "summary.json").read_text()
    monkeypatch.setattr(
        "analysis.results.write.write_layers", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        run(small, tmp_path, max_tokens=50)
    assert (tmp_path / "summary.json").read_text() == before  # the earlier result is still whole
    monkeypatch.undo()
    run(small, tmp_path, max_tokens=50)
    assert not (tmp_path / ".partial").exists()


def test_an_analysis_replaces_no_other_files_of_these_names(tmp_path):
    small = make_small(tmp_path)
    (tmp_path / "report.html").write_text("the user's own")
    with pytest.raises(UsageError, match=r"report.html exists already; choose another folder"):
        run(small, tmp_path)
    assert (tmp_path / "report.html").read_text() == "the user's own"


def test_two_autoencoders_do_not_share_a_default_folder(tmp_path):
    small = make_small(tmp_path)
    flags = {"store": small.store, "report": False, "intervals": False}
    analyze(analyze_config(sae=small.sae, **flags))
    other = small.sae.with_suffix("")
    other.write_bytes(small.sae.read_bytes())
    with pytest.raises(UsageError, match=r"ckpt.analysis/.* belong to .*ckpt.pt: choose another folder with --out"):
        analyze(analyze_config(sae=other, **flags))
    small.sae.unlink()
    analyze(analyze_config(sae=other, **flags))  # renamed


def test_an_autoencoder_whose_latents_are_all_silent_is_analysed_and_reported(tmp_path):
    small = make_small(tmp_path)
    small.weights.W_enc.data.zero_()
    save_small(small.sae, small.weights, ActivationStore.open(small.store), {})
    summary = run(small, tmp_path / "out", report=True)
    assert summary["latents"]["active"] == 0
    assert (tmp_path / "out" / "report.html").exists()


def test_numbers_stay_whatever_becomes_of_their_report(small, tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.report.page.write_figures", lambda *_: (_ for _ in ()).throw(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        run(small, tmp_path, report=True)
    assert json.loads((tmp_path / "summary.json").read_text())["n_tokens"] > 0
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / ".partial").exists()


def test_with_json_stdout_is_the_summary_alone(small, tmp_path, capsys):
    summary = run(small, tmp_path, json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == summary
    assert "token-level variance" in captured.err


def test_two_analyses_into_one_folder_do_not_mix(small, tmp_path):
    (tmp_path / "out" / ".partial").mkdir(parents=True)
    (tmp_path / "out" / ".partial" / "mine").touch()
    with (
        held_alone(tmp_path / "out" / ".partial", tmp_path / "out"),
        pytest.raises(ResidscopeError, match=f"--out {tmp_path}/out: another process is writing there"),
    ):
        run(small, tmp_path / "out")
    assert (tmp_path / "out" / ".partial" / "mine").exists()
    run(small, tmp_path / "out")
    assert not (tmp_path / "out" / ".partial").exists()
