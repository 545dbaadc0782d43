"""A whole analysis of a store made from known codes: variances, runs, nulls, kinds and redundant pairs by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.run import analyze
from tests.support.small import analyze_config, save_small
from tests.support.stores import make_store
from train.model import MLSAE, SAEConfig

N_TOKENS, N_LAYERS, N_LATENTS = 96, 6, 8
FIRST, LAST, RUN, MOVING, SILENT, ENDS = range(6)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Vectors that are their own codes: an identity encoder, nothing standardised, and every activation 1."""
    folder = tmp_path_factory.mktemp("planted")
    x = np.zeros((N_TOKENS, N_LAYERS, N_LATENTS), np.float32)
    x[:, 0, FIRST] = x[:, 5, LAST] = 1
    x[:, 1:5, RUN] = 1
    x[np.arange(N_TOKENS), np.arange(N_TOKENS) % 6, MOVING] = 1
    x[:, [0, 5], ENDS] = 1
    store = make_store(
        folder / "acts.zarr",
        x,
        document=np.arange(N_TOKENS, dtype=np.int32) // 8,
        keep=np.ones(N_TOKENS, bool),
        stored_dtype="float32",
        chunk_tokens=32,
        shard_tokens=32,
    )
    sae = MLSAE(SAEConfig(d_model=N_LATENTS, n_latents=N_LATENTS, k=5, standardize="none"))
    decoder = torch.eye(N_LATENTS)
    decoder[LAST] = decoder[FIRST]  # the same direction, once for the first layer and once for the last
    sae.load_state_dict({"W_enc": torch.eye(N_LATENTS), "W_dec": decoder, "b_pre": torch.zeros(N_LATENTS)})
    save_small(folder / "ckpt.pt", sae, store, {"validation": None})
    config = analyze_config(store=store.path, sae=folder / "ckpt.pt", out=folder / "out", dtype="float64", report=False)
    return analyze(config), pd.read_parquet(folder / "out" / "latents.parquet"), folder / "out"


def test_variances_are_those_planted(result):
    summary, _, _ = result
    # Masses of a token: 1, 1, 4, 1, 2. Variances of the layer: a run of four 15/12, both ends 25/4, moving 35/12.
    mass = summary["variance"]["mass"]
    assert mass["within_token"] == pytest.approx((4 * 15 / 12 + 2 * 25 / 4) / 9)
    assert mass["between_tokens"] == pytest.approx(1 * 35 / 12 / 9)
    assert mass["between_latents"] == pytest.approx(2 * 2.5**2 / 9)
    equal = summary["variance"]["equal"]
    assert equal["within_token"] == pytest.approx((15 / 12 + 25 / 4) / 5)
    assert equal["between_tokens"] == pytest.approx(35 / 12 / 5)
    latent = summary["variance"]["latent"]
    assert [latent["within_token"], latent["between_tokens"]] == pytest.approx([1.5, 35 / 60])


def test_runs_are_those_planted(result):
    summary, table, _ = result
    found = summary["persistence"]["equal"]
    expected = {
        "n_layers_active": 9 / 5,
        "run_length": 8 / 5,
        "n_runs": 6 / 5,
        "contiguity": (4 + 1 / 6) / 5,
        "unbroken": 4 / 5,
        "single_layer": 3 / 5,
        "contiguity_multi": (1 + 1 / 6) / 2,
        "unbroken_multi": 1 / 2,
        "onset": (0 + 5 + 1 + 2.5 + 0) / 5,
        "offset": (0 + 5 + 4 + 2.5 + 5) / 5,
        "stays_on": 3 / (9 - 2 - 1 / 6),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert summary["persistence"]["n_pairs"] == 5 * N_TOKENS
    assert found["distributions"]["n_layers_active"] == pytest.approx([3 / 5, 1 / 5, 0, 1 / 5, 0, 0])
    np.testing.assert_allclose(table["run_length"][[FIRST, LAST, RUN, MOVING, ENDS]], [1, 1, 4, 1, 1])
    assert table["contiguity"][ENDS] == pytest.approx(1 / 6)
    assert pd.isna(table["onset"][SILENT])
    for name, (low, high) in found["ci95"].items():
        if name not in ("onset", "offset", "stays_on"):  # all documents alike, but for the moving latent's layers
            assert [low, high] == pytest.approx([found[name]] * 2), name


def test_nulls_are_those_that_follow(result):
    summary, _, _ = result
    layers, tokens = summary["nulls"]["layers_permuted"], summary["nulls"]["tokens_permuted"]
    # Layers permuted: n of 6 layers at random have variance (n - 1) / n times 42 / 12 on average; masses stay.
    assert layers["variance"]["mass"]["within_token"] == pytest.approx((4 * 3 / 4 + 2 * 1 / 2) * 3.5 / 9, rel=0.05)
    assert layers["persistence"]["equal"]["n_layers_active"] == pytest.approx(9 / 5)
    # Tokens permuted: what is the same at every token stays as it is, so only the moving latent can change.
    for name in ("aggregate", "between_latents", "total"):
        assert tokens["ratio"]["variance"]["mass"][name] == pytest.approx(1)
    change = tokens["variance"]["mass"]["within_token"] - summary["variance"]["mass"]["within_token"]
    assert 0 < change < 35 / 12 / 9


def test_kinds_and_the_redundant_pair_are_those_planted(result):
    summary, table, out = result
    found = dict(zip(table["latent"], table["profile"], strict=True))
    assert [found[j] for j in (FIRST, LAST, RUN, MOVING, ENDS)] == [
        "early",
        "late",
        "persistent",
        "persistent",
        "bimodal",
    ]
    assert pd.isna(found[SILENT])
    assert summary["redundancy"]["parallel_pairs"] == summary["redundancy"]["redundant_pairs"] == 1
    assert summary["redundancy"]["mmcs"] == pytest.approx((1 + 1 + 0 + 0 + 0) / 5)
    pairs = pd.read_parquet(out / "redundancy.parquet")
    assert pairs.to_dict("records") == [
        {"latent_a": FIRST, "latent_b": LAST, "cosine": 1.0, "overlap": 0.0, "redundant": True}
        | {"layer_mean_a": 0.0, "layer_mean_b": 5.0}
    ]
