"""Whole analyses of stores whose codes are known, case by case: what is said of each can be worked out on paper."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis.run import analyze
from tests.support.small import analyze_config, save_small
from tests.support.stores import make_store
from train.model import MLSAE, SAEConfig

L = 6
WEIGHTINGS = ("mass", "equal", "latent")


def analyzed(folder: Path, x: np.ndarray, *, k: int, first_layer: int = 0, document_tokens: int = 8) -> dict[str, Any]:
    """The summary of vectors [T, L, M] that are their own codes: an identity encoder, nothing standardised."""
    n_tokens, n_layers, n_latents = x.shape
    folder.mkdir(exist_ok=True)
    store = make_store(
        folder / "acts.zarr",
        x.astype(np.float32),
        document=np.arange(n_tokens, dtype=np.int32) // document_tokens,
        keep=np.ones(n_tokens, bool),
        stored_dtype="float32",
        chunk_tokens=32,
        shard_tokens=32,
        layers=tuple(range(first_layer, first_layer + n_layers)),
        n_model_layers=first_layer + n_layers,
    )
    sae = MLSAE(SAEConfig(d_model=n_latents, n_latents=n_latents, k=k, standardize="none"))
    sae.load_state_dict(
        {"W_enc": torch.eye(n_latents), "W_dec": torch.eye(n_latents), "b_pre": torch.zeros(n_latents)}, strict=False
    )
    save_small(folder / "ckpt.pt", sae, store, {"validation": None})
    return analyze(
        analyze_config(
            store=store.path,
            sae=folder / "ckpt.pt",
            out=folder / "out",
            dtype="float64",
            report=False,
            redundancy=False,
        )
    )


def test_where_the_true_ratio_is_one_the_reference_reads_0_079_and_it_moves_with_the_numbering(tmp_path):
    """docs/method.md, "The artefact on planted data": its numbers are these."""
    n_tokens = 400
    x = np.zeros((n_tokens, L, 8))
    for j in range(8):  # two latents centred at each of layers 1 to 4, each active at 2 of 400 tokens
        for t in (7 * j, 7 * j + 200):
            x[t, [j % 4, j % 4 + 1, j % 4 + 2], j] = 7 / 8, 1, 7 / 8
    for first_layer, squares, shown in ((0, 7.5, 0.079), (1, 13.5, 0.045)):  # mean squared centre
        found = analyzed(tmp_path / str(first_layer), x, k=1, first_layer=first_layer)["variance"]
        for weighting in WEIGHTINGS:
            assert found[weighting]["aggregate_over_token"] == pytest.approx(1, rel=1e-12)
            assert found[weighting]["within_token"] == pytest.approx(7 / 11, rel=1e-12)
            assert found[weighting]["between_latents"] == pytest.approx(1.25, rel=1e-12)
        compat, active = found["mlsae_compat"], 2 / n_tokens
        expected = (7 / 11) / (7 / 11 + squares - active * squares)
        assert compat["rel_var_t"] == pytest.approx(expected, rel=1e-12)
        assert round(compat["rel_var_t"], 3) == shown


def test_the_same_profile_at_every_token_and_latents_of_one_layer_leave_every_null_but_one_as_it_is(tmp_path):
    x = np.zeros((64, L, 4))
    x[:, :, 0] = 2  # at all layers alike
    x[:, 2, 1] = 3  # at one layer
    x[:, 1:3, 2] = 1  # at two neighbours
    summary = analyzed(tmp_path / "a", x, k=3)  # latent 3 is silent
    mass = summary["variance"]["mass"]
    assert summary["latents"] == {"active": 3, "dead": 1}
    assert mass["within_token"] == pytest.approx((12 * 35 / 12 + 2 * 0.25) / 17, rel=1e-12)
    assert mass["between_tokens"] == pytest.approx(0, abs=1e-12)
    assert mass["aggregate_over_token"] == pytest.approx(1, rel=1e-12)
    tokens, layers = (summary["nulls"][name] for name in ("tokens_permuted", "layers_permuted"))
    for part, weightings in (("variance", WEIGHTINGS), ("persistence", ("mass", "equal"))):
        for weighting in weightings:
            for name, value in tokens[part][weighting].items():
                assert value == pytest.approx(summary[part][weighting][name], rel=1e-12, abs=1e-12), name
    # Two of six layers at random: distance d with probability (6 - d) / 15, variance d^2 / 4; 64 tokens, so roughly.
    mean = sum((6 - d) / 15 * d**2 / 4 for d in range(1, 6))
    assert layers["variance"]["mass"]["within_token"] == pytest.approx((12 * 35 / 12 + 2 * mean) / 17, rel=0.02)
    equal = layers["persistence"]["equal"]
    assert equal["n_layers_active"] == summary["persistence"]["equal"]["n_layers_active"] == pytest.approx(3)
    assert equal["single_layer"] == pytest.approx(1 / 3)
    assert layers["ratio"]["variance"]["mass"]["within_token"] < 1  # neighbours are nearer than chance


def test_a_layer_that_moves_from_token_to_token_is_all_between_tokens(tmp_path):
    x = np.zeros((60, L, 2))
    x[np.arange(60), np.arange(60) % L, 0] = 1
    summary = analyzed(tmp_path / "a", x, k=1)
    for weighting in WEIGHTINGS:
        found = summary["variance"][weighting]
        assert found["between_tokens"] == pytest.approx(35 / 12, rel=1e-12)
        assert found["within_token"] == found["between_latents"] == 0
        assert found["aggregate_over_token"] is None
    found = summary["persistence"]["equal"]
    assert [found[name] for name in ("run_length", "n_runs", "contiguity", "single_layer")] == [1, 1, 1, 1]
    assert found["contiguity_multi"] is found["unbroken_multi"] is None
    assert found["distributions"]["onset"] == pytest.approx([1 / 6] * 6)
    assert summary["nulls"]["layers_permuted"]["variance"]["mass"]["within_token"] == 0


def test_of_a_single_token_everything_is_within_it_and_no_interval_is_given(tmp_path):
    x = np.zeros((1, L, 3))
    x[0, 1, 0], x[0, 4, 0], x[0, 3, 1] = 3, 1, 2
    summary = analyzed(tmp_path / "a", x, k=1)
    mass = summary["variance"]["mass"]
    # Latent 0 by mass: mean 1.75, variance 9 * 3/16; latent 1 sits at layer 3.
    assert mass["within_token"] == pytest.approx(4 * 9 * 3 / 16 / 6, rel=1e-12)
    assert mass["between_tokens"] == pytest.approx(0, abs=1e-15)
    assert mass["between_latents"] == pytest.approx((4 * 1.75**2 + 2 * 9) / 6 - (13 / 6) ** 2, rel=1e-12)
    assert mass["aggregate_over_token"] == pytest.approx(1)
    assert summary["persistence"]["equal"]["n_runs"] == 1.5
    tokens = summary["nulls"]["tokens_permuted"]
    assert tokens["variance"]["mass"]["within_token"] == mass["within_token"]  # alone in its chunk, it stays
    assert mass["ci95"] == {}
    assert summary["uncertainty"] is None
    assert any("1 document in 1 group" in warning for warning in summary["warnings"])
