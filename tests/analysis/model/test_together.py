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


def test_numbers_stand_beside_pca_and_the_sum_of_single_layers_at_the_same_tokens() -> None:
    groups, n = groups_of([3, 4]), 25
    ce, kl = np.random.default_rng(0).random((2, 5, 3, n)) * 10  # all, first 1, last 1; then layers 3 and 4
    one = np.full(n, 10)
    first = np.array([3, 3, 4, 3, 4])
    several = Downstream(layers=first, documents=np.arange(n), n_tokens=one, true_ce=one * 0.5, ce=ce, kl=kl)
    found = together_summary(groups, several, True, True)
    assert (found["n_tokens"], found["n_documents"], found["true_ce"]) == (10 * n, n, 0.5)
    every, first, last = found["groups"]
    assert every["delta_ce"] == pytest.approx(ce[0, 0].sum() / (10 * n) - 0.5)
    assert every["mean_ablation_kl"] == pytest.approx(kl[0, 1].sum() / (10 * n))
    assert (every["pca_delta_ce"], every["pca_kl"]) == pytest.approx(
        (ce[0, 2].sum() / (10 * n) - 0.5, kl[0, 2].sum() / (10 * n))
    )
    assert every["sum_alone_delta_ce"] == pytest.approx(ce[3:, 0].sum() / (10 * n) - 1)
    assert first["sum_alone_kl"] == pytest.approx(kl[3, 0].sum() / (10 * n))
    assert last["layers"] == [4]
    bounds = several.intervals()
    for i, group in enumerate(found["groups"]):
        for name, of in (("delta_ce", "delta_ce"), ("kl", "kl"), ("pca_kl", "zero_ablation_kl")):
            assert group["ci95"][name] == list(bounds[of][i] or ())
            assert group["ci95"][name][0] <= group[name] <= group["ci95"][name][1]
    without = together_summary(groups, several, False, False)["groups"][0]
    assert (without["pca_kl"], without["pca_delta_ce"], without["ci95"]) == (None, None, {})
    assert "pca_kl" not in together_summary(groups, several, False, True)["groups"][0]["ci95"]
