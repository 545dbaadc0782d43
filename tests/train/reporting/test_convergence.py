"""The spread of latents over layers against the analysis' own sums, by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from analysis.moments import LayerMoments, variance_numbers
from analysis.persistence import persistence_summary
from train.kernels.interface import SparseCodes
from train.reporting.convergence import Spread, in_words, is_curve, last_quarter


def codes(n_tokens: int, n_layers: int, k: int, n_latents: int, seed: int) -> SparseCodes:
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(n_latents)[:k] for _ in range(n_tokens * n_layers)])
    values = np.maximum(rng.normal(0.3, 1, size=indices.shape), 0)
    return SparseCodes(torch.from_numpy(values.astype(np.float32)), torch.from_numpy(indices))


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [2, 3, 7, 9]])
def test_it_is_what_the_analysis_measures(layers: list[int]) -> None:
    n_layers, n_latents = 4, 7
    found, moments = Spread.zeros(n_latents, torch.device("cpu")), LayerMoments.zeros(layers, n_latents)
    for seed, n_tokens in ((0, 50), (1, 3)):
        part = codes(n_tokens, n_layers, 3, n_latents, seed)
        found = found.add(part, layers)
        moments.add(*(t.numpy().reshape(n_tokens, n_layers, 3) for t in part))
    numbers = found.numbers()
    assert numbers["ratio"] == pytest.approx(variance_numbers(moments.pooled())["mass"]["aggregate_over_token"])
    assert numbers["stays_on"] == pytest.approx(persistence_summary(moments)["equal"]["stays_on"])


def test_by_hand() -> None:
    """One token, three layers: latent 0 on at layers 0 and 1 with mass 1 each, latent 1 at 0 and 2."""
    values = torch.ones(3, 2)
    values[1, 1] = values[2, 1] = 0
    part = SparseCodes(values, torch.tensor([[0, 1], [0, 2], [1, 2]]))
    numbers = Spread.zeros(3, torch.device("cpu")).add(part, range(3)).numbers()
    # Each latent has one token, so all its variance is within it: (1 / 4 + 1) / 2 for both.
    assert numbers == {"ratio": pytest.approx(1), "stays_on": pytest.approx(1 / 3)}


def test_nothing_active_is_not_defined() -> None:
    part = SparseCodes(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64))
    assert Spread.zeros(2, torch.device("cpu")).add(part, range(3)).numbers() == {"ratio": None, "stays_on": None}


def point(vectors: int, **numbers: Any) -> dict[str, Any]:
    return {"step": vectors // 10, "vectors": vectors, "fvu": 0.5, "ratio": None, "stays_on": None, **numbers}


def test_the_last_quarter_is_from_the_point_nearest_three_quarters() -> None:
    curve = [point(v, ratio=r, fvu=f) for v, r, f in ((100, 9, 9), (290, 2.2, 0.4), (380, 2.0, 0.3), (400, 2.0, 0.32))]
    moved = last_quarter(curve)
    assert moved == {"steps": 11, "fvu": pytest.approx(-0.25), "ratio": pytest.approx(-0.1)} | {
        "stays_on": None,
        "settled": False,
    }


def test_settled_means_that_the_ratio_stays_and_that_there_was_time_to_see_it() -> None:
    def settled(*points: dict[str, Any]) -> bool | None:
        moved = last_quarter(points)
        assert moved is not None
        return moved["settled"]

    assert settled(point(600, ratio=1.51), point(800, ratio=1.5)) is True
    assert settled(point(600, ratio=1.52), point(800, ratio=1.5)) is False
    assert settled(point(600, ratio=1.5), point(790, ratio=1.5)) is False  # 19 steps
    assert settled(point(600, ratio=1.5, fvu=0.56), point(800, ratio=1.5)) is False  # FVU fell by 12 %
    assert settled(point(600, ratio=1.5, fvu=None), point(800, ratio=1.5, fvu=None)) is True
    assert settled(point(600), point(800)) is None


def test_without_a_point_before_the_end_nothing_is_said() -> None:
    assert last_quarter([]) is last_quarter([point(100)]) is last_quarter([point(95), point(100)]) is None


def test_in_words_it_says_what_moved_and_by_how_much() -> None:
    assert in_words(last_quarter([point(300, ratio=2.0), point(400, ratio=1.6)])) == (
        "The ratio has not settled: over the last 10 steps of the training it moved by -25.00% and FVU by +0.00%, "
        "on a sample of held-out tokens (settled: below 1%, FVU below 10%, over 20 steps or more)."
    )
    assert in_words(last_quarter([point(600, ratio=1.0), point(800, ratio=1.001)])).startswith(
        "The ratio has settled: over the last 20 steps"
    )
    assert "not settled: over the last step of" in in_words(last_quarter([point(30, ratio=1.0), point(40, ratio=1.0)]))
    assert in_words(None) == in_words(last_quarter([point(100), point(200)])) == ""


@pytest.mark.parametrize(
    "curve", [{}, [1], [point(200), point(100)], [point(9, fvu=math.nan)], [point(9, ratio="x")], [{"step": 1}]]
)
def test_what_no_trainer_writes_is_no_curve(curve: object) -> None:
    assert not is_curve(curve)
    assert is_curve([point(100), {**point(100), "step": 11}, point(200, ratio=None)])
