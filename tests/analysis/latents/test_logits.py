"""Tokens that latents promote and suppress: against the product of whole matrices, and against the norms themselves."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from analysis.latents import logits as module
from analysis.latents.logits import (
    COLUMNS,
    LatentTokens,
    Nearest,
    embedding_rows,
    find_latent_tokens,
    latent_logits,
    nearest_rows,
    norm_gain,
    write_latent_tokens,
)
from harvest.lens.translators import TunedLens
from harvest.model.load import LoadedModel, load_model
from harvest.model.names import resolve_model
from tests.support.models import ARCHITECTURES, D_MODEL, tiny_model
from tests.support.saes import make_sae


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    root = tmp_path_factory.mktemp("models")
    return {name: load_model(resolve_model(str(tiny_model(name, root / name)))) for name in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gain_is_the_norms_own(models: dict[str, LoadedModel], architecture: str) -> None:
    norm = models[architecture].final_norm
    gain, centred = norm_gain(norm, D_MODEL) or pytest.fail("not recognised")
    assert isinstance(norm.weight, Tensor)
    expected = norm.weight + 1 if architecture == "gemma" else norm.weight  # Gemma's norm multiplies by 1 + weight
    torch.testing.assert_close(gain, expected.detach().clone(), rtol=1e-4, atol=1e-4)
    assert centred == isinstance(norm, nn.LayerNorm)


def test_what_is_no_plain_norm_is_not_folded() -> None:
    assert norm_gain(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), 8) is None
    assert norm_gain(nn.Tanh(), 8) is None
    odd = nn.LayerNorm(7)
    nn.init.normal_(odd.weight)
    gain, _ = norm_gain(odd, 7) or pytest.fail("not recognised")
    torch.testing.assert_close(gain, odd.weight.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ends_are_those_of_the_whole_product(
    models: dict[str, LoadedModel], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models[architecture]
    monkeypatch.setattr(module, "TILE_BYTES", 4 * 258 * 3)
    directions = torch.randn(8, D_MODEL, generator=torch.Generator().manual_seed(1))
    found = latent_logits(directions, model, n=4)
    assert found.norm_folded
    n_tokens = len(model.tokenizer.ids)
    d = directions - directions.mean(dim=1, keepdim=True) if architecture in ("gpt2", "gpt_neox") else directions
    weight = model.final_norm.weight
    assert isinstance(weight, Tensor)
    unembedding = model.causal_lm.get_output_embeddings().weight.detach()[:n_tokens]
    logits = (d * (weight + (architecture == "gemma"))) @ unembedding.T
    logits = logits - logits.mean(dim=1, keepdim=True)
    order = logits.argsort(dim=1, descending=True).numpy()
    np.testing.assert_array_equal(found.promoted, order[:, :4])
    np.testing.assert_array_equal(found.suppressed, order[:, ::-1][:, :4])
    values = logits.detach().numpy()
    np.testing.assert_allclose(found.promoted_logits, np.take_along_axis(values, found.promoted, 1), rtol=1e-3)
    np.testing.assert_allclose(found.suppressed_logits, np.take_along_axis(values, found.suppressed, 1), rtol=1e-3)


def test_a_direction_is_named_as_the_model_itself_reads_it(models: dict[str, LoadedModel], tmp_path: Path) -> None:
    """A residual stream that is nothing but a large multiple of the direction gives these logits, but for scale and
    the norm's bias."""
    model = models["llama"]
    directions = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(2))
    found = latent_logits(directions, model, n=3)
    own = model.logits(directions * 1e3)[:, : len(model.tokenizer.ids)].detach()
    np.testing.assert_array_equal(found.promoted, own.topk(3).indices.numpy())
    path = tmp_path / "latent_logits.parquet"
    embedding = Nearest(np.array([0.5, 0.25, 1], np.float32), np.array([65, 66, 200]))
    tokens = LatentTokens(np.array([4, 7, 9]), found, embedding, 0.1, 0.2, float(np.median(found.cosine)))
    assert tokens.summary()["above_chance"] == 1  # of three
    assert tokens.summary()["unembedding_chance_99"] == tokens.chance_99
    write_latent_tokens(path, tokens, model.tokenizer)
    table = pq.read_table(path)
    assert table.schema.equals(COLUMNS)
    assert pq.read_schema(path).metadata[b"norm_folded"] == b"true"
    rows = table.to_pylist()
    assert [row["latent"] for row in rows] == [4, 7, 9]
    assert all(len(row[name]) == 3 for row in rows for name in COLUMNS.names[1:5])
    np.testing.assert_allclose(rows[1]["promoted_logits"], found.promoted_logits[1])
    assert [row["embedding_cosine"] for row in rows] == [0.5, 0.25, 1]
    assert rows[0]["unembedding_token"] == model.tokenizer.backend.decode([found.nearest[0]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("with_lens", [False, True], ids=["bare", "lens"])
def test_nearest_tokens_are_those_of_a_loop_over_all(
    models: dict[str, LoadedModel], architecture: str, with_lens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.latents.logits.TILE_BYTES", 4 * 258 * 3)
    model = models[architecture]
    n_tokens = len(model.tokenizer.ids)
    directions = torch.randn(8, D_MODEL, generator=torch.Generator().manual_seed(1))
    lens = TunedLens(torch.randn(3, D_MODEL, D_MODEL), torch.randn(3, D_MODEL)) if with_lens else None
    embedding = model.causal_lm.get_input_embeddings().weight.detach()[:n_tokens]
    embedding = embedding - embedding.mean(dim=0)
    if lens is not None:
        embedding = torch.stack([row + lens.weights[0] @ row for row in embedding])
    found = nearest_rows(directions, embedding_rows(model, lens))
    weight = model.final_norm.weight
    assert isinstance(weight, Tensor)
    reading = model.causal_lm.get_output_embeddings().weight.detach()[:n_tokens]
    reading = (reading - reading.mean(dim=0)) * (weight + (architecture == "gemma"))
    if architecture in ("gpt2", "gpt_neox"):
        reading = reading - reading.mean(dim=1, keepdim=True)
    logits = latent_logits(directions, model, n=2)
    for rows, cosine, token in ((embedding, found.cosine, found.token), (reading, logits.cosine, logits.nearest)):
        for j, direction in enumerate(directions):
            expected = torch.stack([torch.cosine_similarity(direction, row, dim=0) for row in rows])
            assert cosine[j] == pytest.approx(expected.max().item(), rel=1e-4)
            assert token[j] == expected.argmax().item()


def test_a_latent_that_is_a_token_is_found_and_chance_is_far_below(models: dict[str, LoadedModel]) -> None:
    model = models["llama"]
    sae = make_sae(d=D_MODEL, m=96, k=4)
    with torch.no_grad():
        sae.W_dec[5] = embedding_rows(model, None)[77] * 3
    found = find_latent_tokens(sae, np.array([2, 5]), model, None, seed=0)
    assert found.embedding.token[1] == 77
    assert found.embedding.cosine[1] == pytest.approx(1, abs=1e-5)
    summary = found.summary()
    assert summary is not None
    assert summary["embedding_cosine"] == pytest.approx(found.embedding.cosine.mean())  # the median of two
    assert 0.2 < summary["embedding_chance"] < 0.8  # the best of 258 cosines in 32 dimensions
    assert 0.2 < summary["unembedding_chance"] < 0.8
