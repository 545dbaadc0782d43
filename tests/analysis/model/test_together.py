"""Groups of layers that are replaced at once, and what is told of them."""

import numpy as np
import pytest

from analysis.model.downstream_numbers import Downstream
from analysis.model.together import group_words, groups_of, together_summary


def test_groups_are_all_every_nth_and_both_ends() -> None:
    found = [(group.kind, group.n, group.layers) for group in groups_of([0, 2, 4, 6, 8])]
    assert found == [
        ("all", 5, (0, 2, 4, 6, 8)),
        ("every", 2, (0, 4, 8)),
        ("every", 4, (0, 8)),
        ("first", 1, (0,)),
        ("first", 2, (0, 2)),
        ("first", 4, (0, 2, 4, 6)),
        ("last", 1, (8,)),
        ("last", 2, (6, 8)),
        ("last", 4, (2, 4, 6, 8)),
    ]
    assert [group_words(kind, n) for kind, n, _ in groups_of([3, 4, 5])] == [
        "all 3",
        "every 2nd",
        "first 1",
        "first 2",
        "last 1",
        "last 2",
    ]
    assert groups_of([3]) == []


def test_numbers_stand_beside_the_sum_of_single_layers() -> None:
    groups = groups_of([3, 4])
    rng = np.random.default_rng(0)

    def sums(n: int) -> Downstream:
        one = np.full(2, 10)
        ce, kl = rng.random((2, n, 3, 2)) * 10
        first = np.arange(3, 3 + n)
        return Downstream(layers=first, documents=np.arange(2), n_tokens=one, true_ce=one * 0.5, ce=ce, kl=kl)

    several, alone = sums(3), sums(2)
    found = together_summary(groups, several, alone)
    assert (found["n_tokens"], found["n_documents"], found["true_ce"]) == (20, 2, 0.5)
    every, first, last = found["groups"]
    assert every["delta_ce"] == pytest.approx(several.ce[0, 0].sum() / 20 - 0.5)
    assert every["mean_ablation_kl"] == pytest.approx(several.kl[0, 1].sum() / 20)
    assert every["sum_alone_delta_ce"] == pytest.approx(alone.ce[:, 0].sum() / 20 - 1)
    assert first["sum_alone_kl"] == pytest.approx(alone.kl[0, 0].sum() / 20)
    assert last["layers"] == [4]
