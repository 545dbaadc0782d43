"""Stores with less than a batch, and odd sizes: training says so or works, and analysis equals a naive computation."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from residscope.errors import ResidscopeError
from tests.support.small import analyze_config
from tests.support.stores import make_store, random_activations
from tests.support.training import train_config
from train.checkpoint import load_checkpoint
from train.run import train

SIZES = {"n_latents": 77, "k": 1, "epochs": 3, "batch_size": 100_000, "validation_fraction": 0, "threads": 1}


def test_one_token_is_too_few_and_two_are_enough(tmp_path: Path) -> None:
    for n_tokens in (2, 3):  # The first is not kept.
        store = make_store(tmp_path / f"{n_tokens}.zarr", random_activations(n_tokens, 3, 52)).path
        config = train_config(store=store, out=tmp_path / f"{n_tokens}.pt", **{**SIZES, "k": 64})
        if n_tokens == 2:
            with pytest.raises(ResidscopeError, match="layer 0: its 1 training vectors are all equal"):
                train(config)
        else:
            train(config)
        assert config.out.exists() == (n_tokens == 3)


def test_less_than_a_batch_is_trained_on_and_analysed(tmp_path: Path) -> None:
    from analysis.run import analyze

    x = random_activations(60, 3, 52)
    store = make_store(tmp_path / "a.zarr", x, stored_dtype="float32")
    train(train_config(store=store.path, out=tmp_path / "c.pt", **SIZES))
    found = analyze(analyze_config(store=store.path, sae=tmp_path / "c.pt", report=False, dtype="float64"))

    x = x[store.tokens.keep].astype(float)  # [T, L, D]
    sae = load_checkpoint(tmp_path / "c.pt").sae
    W_enc, W_dec, b_pre = (t.detach().double().numpy() for t in (sae.W_enc, sae.W_dec, sae.b_pre))
    mean, std = x.mean(2, keepdims=True), x.std(2, ddof=1, keepdims=True) + 1e-5
    z = ((x - mean) / std - b_pre) @ W_enc.T
    h = np.where(z == z.max(2, keepdims=True), np.maximum(z, 0), 0)  # [T, L, M]
    error = x - (std * (h @ W_dec + b_pre) + mean)
    fvu = (error**2).sum((0, 2)) / ((x - x.mean(0)) ** 2).sum((0, 2))
    assert [row["fvu"] for row in found["layers"]] == pytest.approx(fvu.tolist())
    layer, mass = np.arange(3), h.sum(1)
    first = np.einsum("tlj,l->tj", h, layer)
    square = np.divide(first**2, mass, out=np.zeros_like(mass), where=mass > 0)
    within = ((h * (layer**2)[:, None]).sum() - square.sum()) / h.sum()
    assert found["variance"]["mass"]["within_token"] == pytest.approx(within, abs=1e-12)


def test_fvu_without_tokens_that_carry_much_of_the_variance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planted at one layer; training warns of them, and analysis gives FVU without them, as naively computed."""
    from analysis.report.data import load_results
    from analysis.report.sections.reconstruction import section
    from analysis.run import analyze

    x = random_activations(300, 3, 12)
    x[[100, 200], 1] *= 80
    store = make_store(tmp_path / "a.zarr", x, stored_dtype="float32")
    train(train_config(store=store.path, out=tmp_path / "c.pt", **SIZES))
    warning = (
        r"warning: \d+ % of the variance of layer 1 is in 2 tokens of 2\d\d examined, probably attention sinks: id \d+ "
    )
    assert re.search(warning, capsys.readouterr().err)
    out = tmp_path / "c.analysis"
    found = analyze(analyze_config(store=store.path, sae=tmp_path / "c.pt", dtype="float64", out=out, examples=False))

    kept = store.tokens.keep.copy()
    kept[[100, 200]] = False
    rows = x[kept].astype(float)
    with torch.no_grad():
        found_rows = load_checkpoint(tmp_path / "c.pt").sae.double()(torch.from_numpy(rows).view(-1, 12))
        x_hat = found_rows[0].view(rows.shape).numpy()
    fvu = ((rows - x_hat) ** 2).sum((0, 2)) / ((rows - rows.mean(0)) ** 2).sum((0, 2))
    assert [row["fvu_without_few"] for row in found["layers"]] == pytest.approx(fvu.tolist(), rel=1e-6)
    assert found["reconstruction"]["fvu_without_few"] == pytest.approx(fvu.mean(), rel=1e-6)
    assert found["layers"][1]["fvu"] != pytest.approx(fvu[1], rel=0.01)
    words = capsys.readouterr().out
    assert f"Without the outlier tokens of the warning: FVU {fvu.mean():.3g}." in words
    assert "FVU without outlier tokens" in words
    assert "FVU without outlier tokens" in section(load_results(out)).body
