"""Validation: method.md's FVU, on held-out documents only, and without side effects."""

from pathlib import Path

import numpy as np
import pytest
import torch

from store.activations import ActivationStore
from tests.support.stores import make_store, random_activations
from train.data import VectorSource, split_tokens
from train.model import MLSAE, SAEConfig
from train.validation import Validation, ValidationData, ValidationTarget


def evaluate(
    store: ActivationStore, sae: MLSAE, mask: np.ndarray, layers: list[int], tokens: int = 10**6
) -> Validation:
    source = VectorSource(layers, store.meta.stored_dtype, torch.device("cpu"))
    data = ValidationData(store, mask, layers, seed=0)
    return data.evaluate([ValidationTarget(sae, torch.float32)], source, tokens=tokens)[0]


def some_sae(d_model: int = 12) -> MLSAE:
    sae = MLSAE(SAEConfig(d_model=d_model, n_latents=30, k=4))
    sae.initialize(0)
    return sae


@pytest.mark.parametrize("layers", [[0, 1, 2], [2]])
def test_fvu_is_about_each_layer_mean_vector_in_raw_space(tmp_path: Path, layers: list[int]) -> None:
    """Mistake 5: FVU against one scalar mean over all dimensions, which is too optimistic."""
    store = make_store(tmp_path / "s.zarr", random_activations(), chunk_tokens=16)
    mask = store.tokens.keep & (store.tokens.document % 3 == 0)
    sae = some_sae()
    found = evaluate(store, sae, mask, layers)
    x = torch.from_numpy(store.read(layers=layers))[mask].double()  # [t, l, D]
    for i in range(len(layers)):
        rows = x[:, i]
        x_hat = sae(rows.float()).x_hat.double()
        expected = (rows - x_hat).square().sum() / (rows - rows.mean(dim=0)).square().sum()
        assert found.fvu_per_layer[i] == pytest.approx(expected.item(), rel=1e-6)
    assert found.fvu == pytest.approx(sum(found.fvu_per_layer) / len(layers))
    assert found.tokens == mask.sum()
    assert found.documents == len(np.unique(store.tokens.document[mask]))


def test_fvu_by_hand(tmp_path: Path) -> None:
    """A blind autoencoder gives back each vector's own mean: sum |x - mean(x)|^2 over sum |x - mean_l|^2.

    Vectors (0, 2) and (4, 2): errors 1 + 1 and 1 + 1, deviations 2^2 + 0 each, so FVU = 4 / 8.
    """
    x = np.array([[[0.0, 2.0]], [[4.0, 2.0]]], dtype=np.float32)
    store = make_store(tmp_path / "s.zarr", x, keep=np.ones(2, bool), chunk_tokens=2)
    sae = MLSAE(SAEConfig(d_model=2, n_latents=3, k=1))  # all weights zero
    found = evaluate(store, sae, np.ones(2, bool), [0])
    assert found.fvu_per_layer == [pytest.approx(0.5)]
    assert found.l0 == 0
    assert found.fired == 0


def test_only_held_out_documents_are_read(tmp_path: Path) -> None:
    """Mistake 10: validation on the training stream. Training tokens hold NaN here, and none comes out."""
    activations = random_activations()
    document = np.arange(300, dtype=np.int32) // 10
    plain = make_store(tmp_path / "a.zarr", activations, document=document, chunk_tokens=16)
    split = split_tokens(plain, 0.2, seed=3)
    assert not set(document[split.train]) & set(document[split.validation])
    assert split.validation.sum() > 0
    assert (split.train | split.validation).tolist() == plain.tokens.keep.tolist()
    poisoned = np.where(split.train[:, None, None], np.float32(3e38), activations)
    other = make_store(tmp_path / "b.zarr", poisoned, document=document, chunk_tokens=16)
    sae = some_sae()
    assert evaluate(other, sae, split.validation, [0, 1, 2]) == evaluate(plain, sae, split.validation, [0, 1, 2])


def test_a_short_validation_reads_part_of_what_a_long_one_reads(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", random_activations(), chunk_tokens=16)
    found = evaluate(store, some_sae(), store.tokens.keep, [0, 1, 2], tokens=20)
    assert found.tokens == 20
    assert 0 < found.l0 <= 4


def test_a_sample_is_spread_over_chunks(tmp_path: Path) -> None:
    """16 tokens of 300, in chunks of 16: every fourth of four chunks; where one has fewer, of further chunks too."""
    store = make_store(tmp_path / "s.zarr", random_activations(), chunk_tokens=16)

    def chosen(mask: np.ndarray) -> list[list[int]]:
        return [part.tolist() for part in ValidationData(store, mask, [0], seed=0)._choose(16, chunks=4)]

    found = chosen(np.ones(300, bool))
    assert [[token % 16 for token in part] for part in found] == [[0, 4, 8, 12]] * 4
    assert len({token // 16 for part in found for token in part}) == 4
    few = np.arange(300) % 16 < 3
    assert [[token % 16 for token in part] for part in chosen(few)] == [*[[0, 1, 2]] * 5, [0]]
    one = np.arange(300) < 10
    assert chosen(one) == [list(range(10))]


def test_dropped_tokens_are_not_validated(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", random_activations())
    split = split_tokens(store, 0.5, seed=0)
    assert not (split.validation & ~store.tokens.keep).any()


def test_one_token_is_none_to_measure_on(tmp_path: Path) -> None:
    """A single token is its own mean, so FVU is not defined."""
    store = make_store(tmp_path / "s.zarr", random_activations())
    for n in (0, 1, 2):
        assert bool(ValidationData(store, np.arange(300) < n, [0], seed=0)) == (n == 2)
