"""The spread of latents over layers against the analysis' own sums, by hand, and what a curve foretells."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from analysis.moments import LayerMoments, variance_numbers
from analysis.persistence import persistence_summary
from train.kernels.interface import SparseCodes
from train.reporting.convergence import Spread, foretold, in_words, is_curve


def codes(n_tokens: int, n_layers: int, k: int, n_latents: int, seed: int) -> SparseCodes:
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(n_latents)[:k] for _ in range(n_tokens * n_layers)])
    values = np.maximum(rng.normal(0.3, 1, size=indices.shape), 0)
    return SparseCodes(torch.from_numpy(values.astype(np.float32)), torch.from_numpy(indices))


def test_it_is_what_the_analysis_measures() -> None:
    n_layers, n_latents = 4, 7
    found, moments = Spread.zeros(n_latents, torch.device("cpu")), LayerMoments.zeros(range(n_layers), n_latents)
    for seed, n_tokens in ((0, 50), (1, 3)):
        part = codes(n_tokens, n_layers, 3, n_latents, seed)
        found = found.add(part, n_layers)
        moments.add(*(t.numpy().reshape(n_tokens, n_layers, 3) for t in part))
    numbers = found.numbers()
    assert numbers["ratio"] == pytest.approx(variance_numbers(moments.pooled())["mass"]["aggregate_over_token"])
    assert numbers["stays_on"] == pytest.approx(persistence_summary(moments)["equal"]["stays_on"])


def test_by_hand() -> None:
    """One token, three layers: latent 0 on at layers 0 and 1 with mass 1 each, latent 1 at 0 and 2."""
    values = torch.ones(3, 2)
    values[1, 1] = values[2, 1] = 0
    part = SparseCodes(values, torch.tensor([[0, 1], [0, 2], [1, 2]]))
    numbers = Spread.zeros(3, torch.device("cpu")).add(part, 3).numbers()
    # Each latent has one token, so all its variance is within it: (1 / 4 + 1) / 2 for both.
    assert numbers == {"ratio": pytest.approx(1), "stays_on": pytest.approx(1 / 3)}


def test_nothing_active_is_not_defined() -> None:
    part = SparseCodes(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64))
    assert Spread.zeros(2, torch.device("cpu")).add(part, 3).numbers() == {"ratio": None, "stays_on": None}


def point(vectors: int, **numbers: Any) -> dict[str, Any]:
    return {"step": vectors // 10, "vectors": vectors, "fvu": 0.5, "ratio": None, "stays_on": None, **numbers}


def test_numbers_are_taken_to_move_with_the_logarithm_of_the_training() -> None:
    curve = [point(v, ratio=2 - 0.1 * math.log2(v / 100), fvu=0.5) for v in (100, 200, 300, 400)]
    found = foretold(curve)
    assert found is not None
    assert found["ratio"] == pytest.approx(-0.1 * math.log2(3) / 1.8)  # from 1.8 at 400
    assert (found["fvu"], found["stays_on"], found["settled"]) == (pytest.approx(0), None, False)
    still = foretold([point(200, ratio=1.51), point(400, ratio=1.5)])
    assert still is not None
    assert still["settled"] is True


def test_one_point_foretells_nothing() -> None:
    assert foretold([]) is foretold([point(100)]) is None


def test_in_words_it_says_what_would_move_and_by_how_much() -> None:
    assert in_words(foretold([point(100, ratio=2.0), point(300, ratio=1.6)])).startswith(
        "Not settled: three times the training would move the ratio by about -25.0% and FVU by +0.0% ("
    )
    assert in_words(foretold([point(100, ratio=1.0), point(300, ratio=1.01)])).startswith("Settled: ")
    assert in_words(None) == in_words(foretold([point(100), point(200)])) == ""


@pytest.mark.parametrize(
    "curve", [{}, [1], [point(200), point(100)], [point(9, fvu=math.nan)], [point(9, ratio="x")], [{"step": 1}]]
)
def test_what_no_trainer_writes_is_no_curve(curve: object) -> None:
    assert not is_curve(curve)
    assert is_curve([point(100), point(200, ratio=None)])
