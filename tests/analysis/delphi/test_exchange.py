"""Activations for delphi are those of the autoencoder on the store's vectors, and all of each row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from analysis.delphi.exchange import highest, rows_of
from residscope.errors import UsageError
from tests.support.live import Live, make_live
from tests.support.stores import token_table


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    sizes: dict[str, Any] = {"lengths": (61, 90, 33, 70), "n_tokens": 200, "context_length": 50}
    return make_live(tmp_path_factory.mktemp("live"), **sizes)


def dense(live: Live) -> np.ndarray:
    """[tokens of the store, L, M] activations at kept tokens, computed plainly."""
    store, sae = live.made.store, live.sae
    x = torch.from_numpy(store.read(slice(0, store.meta.n_tokens)).astype(np.float32))
    found = np.zeros((*x.shape[:2], sae.config.n_latents), np.float32)
    with torch.no_grad():
        for i in range(x.shape[1]):
            values, indices = sae.encode(x[:, i])
            np.put_along_axis(found[:, i], indices.numpy(), values.numpy(), axis=1)
    return found * store.tokens.keep[:, None, None]


def test_every_activation_of_a_row_is_there_layer_by_layer_and_the_highest(live: Live, tmp_path: Path) -> None:
    summary = (live.folder / "summary.json").stat()
    latents, out = [3, 17, 40, 95], tmp_path / "delphi"
    made = live.analyze("--export-delphi", str(out), "--delphi-latents", *map(str, latents))["exported"]
    assert (live.folder / "summary.json").stat().st_mtime_ns == summary.st_mtime_ns  # not made again
    layers, tokens = live.made.store.meta.layers, live.made.store.tokens
    assert made["modules"] == [*(f"layers.{layer}" for layer in layers), "all_layers"]
    rows = rows_of(tokens, tokens.keep)
    assert (made["rows"], made["context_length"]) == rows.shape
    expected, n = dense(live)[rows], 0  # [R, C, L, M]
    for module in made["modules"]:
        layer = json.loads((out / "latents" / module / "config.json").read_text())["residscope"]["layer"]
        data = load_file(out / "latents" / module / f"0_{live.sae.config.n_latents - 1}.safetensors")
        np.testing.assert_array_equal(data["tokens"], tokens.token_id[rows])
        row, position, latent = data["locations"].T.astype(np.int64)
        assert (np.diff(row * rows.shape[1] + position) >= 0).all()  # delphi takes neighbours of one window together
        found = np.zeros((*rows.shape, live.sae.config.n_latents), np.float32)
        found[row, position, latent] = data["activations"]
        of = expected.max(axis=2) if layer is None else expected[:, :, layers.index(layer)]
        np.testing.assert_allclose(found[..., latents], of[..., latents], rtol=1e-4, atol=1e-5)
        assert set(latent.tolist()) <= set(latents)
        assert (data["activations"] > 0).all()
        assert len(np.unique(data["locations"], axis=0)) == len(row)
        n += len(row)
    assert n == made["activations"] > 100


def test_what_cannot_be_exported_is_said_before_any_work(live: Live, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "there" / "latents").mkdir(parents=True)
    for words, said in (
        (["--export-delphi", str(tmp_path / "there")], "already holds an export"),
        (["--export-delphi", str(tmp_path / "a"), "--delphi-latents", "96"], "has latents 0 to 95, found 96"),
        (["--export-delphi", str(live.made.store.path / "a")], "inside the activation store"),
        (["--delphi-latents", "1"], "give a folder with --export-delphi"),
        (["--export-delphi", str(tmp_path / "a"), "--prompt", "b"], "in separate commands"),
    ):
        with pytest.raises(AssertionError):
            live.analyze(*words)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_too_many_activations_are_refused_and_nothing_is_left(
    live: Live, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.delphi.exchange.MOST", 50)
    with pytest.raises(AssertionError):
        live.analyze("--export-delphi", str(tmp_path / "a"), "--delphi-latents", *map(str, range(96)))
    assert "more than 50 activations; export fewer latents" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_rows_are_whole_pieces_of_sequences_that_were_analysed() -> None:
    position = np.concatenate([np.arange(n) for n in (100, 70, 20, 64)])
    tokens = token_table(len(position), position=position, keep=position > 0)
    rows = rows_of(tokens, tokens.keep)
    assert rows.shape == (3, 64)
    assert rows[:, 0].tolist() == [0, 100, 190]
    assert rows_of(tokens, tokens.keep & (np.arange(len(position)) < 165))[:, 0].tolist() == [0, 100]
    assert rows_of(tokens, tokens.keep & (np.arange(len(position)) < 163))[:, 0].tolist() == [0]
    with pytest.raises(UsageError, match="no 64 consecutive tokens of a sequence"):
        rows_of(tokens, tokens.keep & (np.arange(len(position)) < 60))
    short = token_table(31, position=np.arange(31))
    with pytest.raises(UsageError, match=r"no 32 consecutive tokens of a sequence.*--context-length"):
        rows_of(short, short.keep)


def test_the_highest_of_each_latent_at_each_place() -> None:
    place = np.array([4, 4, 4, 9, 9], np.uint32)
    latent, activation = np.array([7, 2, 7, 2, 2], np.uint32), np.array([1, 5, 3, 2, 8], np.float32)
    found = highest((place, latent, activation))
    assert [column.tolist() for column in found] == [[4, 4, 9], [2, 7, 2], [5.0, 3.0, 8.0]]
    assert all(len(column) == 0 for column in highest((place[:0], latent[:0], activation[:0])))
