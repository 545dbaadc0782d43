"""Whole runs of every variant and option on a tiny store: they learn, resume bit for bit, and analyze reads them."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from analysis.run import analyze
from residscope.errors import IncompatibleError, Interrupted
from residscope.options import with_values
from store.activations import ActivationStore
from tests.support.small import analyze_config
from tests.support.stores import make_store, random_activations
from tests.support.training import StopAt, metrics_lines, timeless, train_config
from train import run as loop
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.data import split_tokens
from train.hardware import has_byte_products
from train.kernels.cpu.screen import Screen
from train.model_config import Activation
from train.run import train

OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"activation": name} for name in get_args(Activation)},
    "matryoshka": {"activation": "matryoshka", "prefixes": (5, 40)},
    "jumprelu with a penalty": {"activation": "jumprelu", "sparsity_loss": "penalty"},
    "relu": {"activation": "relu", "sparsity_coef": 1.0},
    "by layer": {"standardize": "layer"},
    "raw": {"standardize": "none", "loss_space": "raw"},
    "encoder bias": {"encoder_bias": True, "apply_b_dec_to_input": False},
    "multi": {"multi_topk": True},
    "k falls": {"k_start": 20, "k_warmup_fraction": 0.5},
    "clipped": {"clip_norm": 0.05},
    "mean": {"ema_decay": 0.9},
    "mean squares by weight": {"second_moment": "weight"},
    "free norms": {"decoder_norm": "free", "encoder_bias": True, "clip_norm": 0.05},
    "all": {
        "activation": "matryoshka",
        "standardize": "layer",
        "ema_decay": 0.9,
        "clip_norm": 1.0,
        "k_start": 9,
        "decoder_norm": "free",
    },
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "acts.zarr"
    make_store(path, random_activations(n_tokens=400), chunk_tokens=32, stored_dtype="float32")
    return path


def make_config(store: Path, out: Path, **changes: Any) -> TrainConfig:
    fixed: dict[str, Any] = {
        "dtype": "float32",
        "n_latents": 40,
        "k": 4,
        "batch_size": 64,
        "dead_tokens": 20,
        "window_gb": 1e-5,
    }
    return train_config(
        store=store, out=out, **{**fixed, "log_every": 4, "threads": 1, "lr": 3e-3, "encoder_lr": 1.0, **changes}
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_stopped_and_resumed_it_ends_with_the_same_bytes(
    store: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(store, tmp_path / "ckpt.pt", epochs=1, **OPTIONS[name])
    train(config)
    whole, lines = config.out.read_bytes(), timeless(metrics_lines(config.out))
    validations = [line["fvu"] for line in lines if "split" in line]
    assert validations[-1] < validations[0]
    config.out.unlink()
    for steps in (1, 7):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "stop_on_signals", lambda steps=steps: StopAt(steps))
            with pytest.raises(Interrupted, match="same command and --resume"):
                train(with_values(config, resume=True))
    train(with_values(config, resume=True))
    assert config.out.read_bytes() == whole
    assert timeless(metrics_lines(config.out)) == lines
    torch.testing.assert_close(load_checkpoint(config.out).sae.W_dec.norm(dim=1), torch.ones(40), rtol=0, atol=1e-6)


def test_a_run_moves_the_encoder_at_its_own_rate(store: Path, tmp_path: Path) -> None:
    def after_one_step(rate: float) -> torch.Tensor:
        train(make_config(store, tmp_path / "ckpt.pt", steps=1, encoder_lr=rate, overwrite=True))
        return load_checkpoint(tmp_path / "ckpt.pt").sae.W_enc

    start, half, whole = (after_one_step(rate) for rate in (1e-30, 0.5, 1.0))
    assert (whole - start).abs().max() > 1e-3
    torch.testing.assert_close(2 * (half - start), whole - start, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("flags", "columns"), [({}, 1), ({"second_moment": "weight"}, 12), ({"recipe": "gao"}, 12)])
def test_a_run_keeps_the_mean_squares_of_its_recipe(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], columns: int
) -> None:
    monkeypatch.setattr(loop, "stop_on_signals", lambda: StopAt(1))
    with pytest.raises(Interrupted):
        train(make_config(store, tmp_path / "ckpt.pt", epochs=1, **flags))
    kept = load_checkpoint(tmp_path / "ckpt.pt").trainer["optimizer"]["exp_avg_sq"]
    assert kept["W_enc"].shape == kept["W_dec"].shape == (40, columns)


@pytest.mark.skipif(not has_byte_products(), reason="this processor has no fast products of bytes (AVX512-VNNI)")
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "matryoshka"])
def test_screened_runs_learn_what_float32_ones_do_and_resume_to_the_same_bytes(
    tmp_path: Path, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other runs here are too small for the screen: it needs d_model in sixteens, and many latents."""
    calls = []
    screened = Screen.topk_relu
    monkeypatch.setattr(Screen, "topk_relu", lambda self, x, k: calls.append(k) or screened(self, x, k))
    make_store(tmp_path / "acts.zarr", random_activations(n_tokens=400, d_model=16), chunk_tokens=32)
    # AuxK's products may be in bfloat16; and at a high rate Adam makes two runs of two that are nearly equal.
    options = {"activation": activation, "k": 2, "n_latents": 256, "epochs": 1, "aux_coef": 0.0, "lr": 1e-4}
    plain = train(make_config(tmp_path / "acts.zarr", tmp_path / "plain.pt", dtype="float32", **options))
    assert not calls
    config = make_config(tmp_path / "acts.zarr", tmp_path / "ckpt.pt", dtype="int8", **options)
    whole = train(config)
    assert calls
    assert whole.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)
    before = config.out.read_bytes()
    config.out.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_on_signals", lambda: StopAt(5))
        with pytest.raises(Interrupted, match="same command and --resume"):
            train(config)
    train(with_values(config, resume=True))
    assert config.out.read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        *({"activation": "relu"}, {"standardize": "layer"}, {"encoder_bias": True}, {"apply_b_dec_to_input": False}),
        *({"k_start": 9}, {"k_warmup_fraction": 0.3}, {"multi_topk": True}, {"bandwidth": 7.0}, {"clip_norm": 2.0}),
        *({"ema_decay": 0.5}, {"sparsity_loss": "penalty"}, {"sparsity_warmup_fraction": 0.2}),
        {"decoder_norm": "free"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_resume_with_another_option_is_refused_by_name(store: Path, tmp_path: Path, changes: dict) -> None:
    activation = "jumprelu" if {"bandwidth", "sparsity_loss"} & {*changes} else "topk"
    config = make_config(store, tmp_path / "ckpt.pt", steps=1, activation=activation)
    train(config)
    with pytest.raises(IncompatibleError, match=next(iter(changes)) + " was"):
        train(with_values(config, resume=True, **changes))


def test_sparsity_reaches_its_goal(store: Path, tmp_path: Path) -> None:
    for name in ("batchtopk", "jumprelu"):
        validation = train(make_config(store, tmp_path / f"{name}.pt", epochs=6, **OPTIONS[name])).validation
        assert validation is not None
        assert 2.8 < validation.l0 < 5.6
        assert validation.fvu < 0.7


def test_layers_are_standardised_by_their_own_training_vectors(store: Path, tmp_path: Path) -> None:
    result = train(make_config(store, tmp_path / "ckpt.pt", epochs=1, standardize="layer", layers=(2, 0)))
    saved = load_checkpoint(tmp_path / "ckpt.pt")
    assert saved.config.layers == (0, 2)
    tokens, opened = split_tokens(ActivationStore.open(store), 0.05, 0).train, ActivationStore.open(store)
    x = opened.read(slice(0, 400), [0, 2])[tokens].astype(np.float64)  # all were in the sample: [t, 2, D]
    np.testing.assert_allclose(saved.sae.layer_mean, x.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(saved.sae.layer_scale, np.sqrt(x.var(0).mean(-1)), rtol=1e-5)
    np.testing.assert_allclose(saved.trainer["statistics"]["standardized"], 12, rtol=1e-9)  # d_model
    found = saved.sae.standardize(torch.from_numpy(x[:, 1]).float(), torch.ones(len(x), dtype=torch.int64)).x
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    assert found.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert result.validation is not None
    assert len(result.validation.fvu_per_layer) == 2


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka", "jumprelu", "relu", "by layer", "encoder bias", "all"])
def test_analyze_measures_it_as_validation_does(store: Path, tmp_path: Path, name: str) -> None:
    result = train(make_config(store, tmp_path / "ckpt.pt", epochs=1, **OPTIONS[name]))
    split: Any = "validation"
    options = {"report": False, "split": split, "dtype": "float32"}
    summary = analyze(analyze_config(store=store, sae=tmp_path / "ckpt.pt", out=tmp_path / "out", **options))
    assert result.validation is not None
    assert summary["n_tokens"] == result.validation.tokens
    rows = summary["layers"]
    assert [row["fvu"] for row in rows] == pytest.approx(result.validation.fvu_per_layer, rel=2e-3)
    # A pre-activation that is on its threshold but for rounding may fall on either side: one latent of one token here.
    assert [row["l0"] for row in rows] == pytest.approx(result.validation.l0_per_layer, abs=1.01 / summary["n_tokens"])
