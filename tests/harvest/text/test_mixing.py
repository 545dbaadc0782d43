"""Mixing: every document once and in order, shares of the tokens right to within one document."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvest.text.mixing import Mixture

LENGTHS = st.lists(st.lists(st.integers(1, 9), max_size=30), min_size=1, max_size=4)
WEIGHTS = st.sampled_from([0.5, 1.0, 2.0, 3.0])


def documents(lengths: list[int], source: int) -> list[np.ndarray]:
    """Documents whose tokens say which source and document they are of."""
    return [np.full(n, 1000 * source + i, np.int32) for i, n in enumerate(lengths)]


def naive(lengths: list[list[int]], weights: list[float], n_tokens: int, extra: int) -> list[tuple[int, int]]:
    """(source, document) in order: always from the source that is furthest behind."""
    queues = [list(enumerate(ns)) for ns in lengths]
    given_out = [0] * len(queues)
    order: list[tuple[int, int]] = []
    while sum(given_out) < n_tokens and any(queues):
        behind = sorted((given_out[s] / weights[s], s) for s, queue in enumerate(queues) if queue)
        source = behind[0][1]
        document, n = queues[source].pop(0)
        given_out[source] += n + extra
        order.append((source, document))
    return order


@given(
    lengths=LENGTHS, weights=st.lists(WEIGHTS, min_size=4, max_size=4), n=st.integers(1, 400), extra=st.integers(0, 2)
)
def test_the_order_is_that_of_one_document_at_a_time(
    lengths: list[list[int]], weights: list[float], n: int, extra: int
) -> None:
    mixture = Mixture([iter(documents(ns, s)) for s, ns in enumerate(lengths)], weights[: len(lengths)], n, extra)
    found = list(mixture)
    order = naive(lengths, weights, n, extra)
    assert [divmod(int(ids[0]), 1000) for ids in found] == order
    whole = [lengths[s][d] for s, d in order]
    assert [len(ids) for ids in found[:-1]] == whole[:-1]
    assert mixture.documents == [sum(s == i for s, _ in order) for i in range(len(lengths))]
    assert sum(mixture.tokens) == min(n, sum(whole) + extra * len(whole))


def test_shares_follow_the_weights_until_one_runs_out() -> None:
    lengths = [[5, 3, 9, 1] * 50, [2, 7] * 100, [4] * 100]
    weights = [3.0, 1.0, 2.0]
    mixture = Mixture([iter(documents(ns, s)) for s, ns in enumerate(lengths)], weights, 1200, 1)
    list(mixture)
    assert mixture.ran_out == []
    np.testing.assert_allclose(mixture.tokens, [600, 200, 400], atol=10)
    mixture = Mixture([iter(documents(ns, s)) for s, ns in enumerate(lengths)], weights, 1900, 1)
    list(mixture)
    assert mixture.ran_out == [2]
    assert mixture.tokens[2] == 500
    # What the third could not give is shared by the others as 3 to 1.
    assert mixture.tokens[0] == 1100 or mixture.tokens[0] == pytest.approx(1400 * 3 / 4, abs=60)
