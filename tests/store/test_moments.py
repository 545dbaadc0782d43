"""Moments of several shards, merged, are those of all their tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from store.moments import ShardMoments, merge, no_moments, statistics


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.floats(0, 1e6))
def test_merging_shards_is_taking_them_together(sizes: list[int], offset: float) -> None:
    x = np.random.default_rng(0).normal(size=(sum(sizes), 2, 3)) + offset
    total = no_moments(2, 3)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        if len(part):
            mean = part.mean(0)
            norms = np.linalg.norm(part, axis=-1).sum(0)
            total = merge(total, ShardMoments(len(part), mean, ((part - mean) ** 2).sum(0), norms))
        else:
            total = merge(total, no_moments(2, 3))
    found = statistics(total)
    assert found.count == len(x)
    if len(x):
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.var, x.var(0), rtol=1e-8, atol=1e-9)
        assert (found.var >= 0).all()
