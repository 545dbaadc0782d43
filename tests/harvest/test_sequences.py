"""Batches of sequences: every sequence once, of one length, nothing padded."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harvest.sequences import sequence_batches

SIZES = st.tuples(st.integers(1, 200), st.integers(1, 20), st.integers(1, 5))


@given(SIZES)
def test_batches_cover_every_sequence_once_without_padding(sizes: tuple[int, int, int]) -> None:
    n_tokens, context, batch_size = sizes
    batches = sequence_batches(np.arange(n_tokens) % context, context * batch_size)
    assert [b.start for b in batches] == [0, *[b.stop for b in batches[:-1]]]
    assert batches[-1].stop == n_tokens
    for batch in batches:
        assert (batch.stop - batch.start) % batch.length == 0
        assert (batch.stop - batch.start) // batch.length <= batch_size
    assert all(b.length == context for b in batches[:-1])


def test_batches_hold_sequences_of_one_length() -> None:
    position = np.concatenate([np.arange(4), np.arange(4), np.arange(4), np.arange(2), np.arange(9)])
    found = sequence_batches(position, 8)
    assert found == [(0, 8, 4), (8, 12, 4), (12, 14, 2), (14, 23, 9)]
