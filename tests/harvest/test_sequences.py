"""Batches of sequences: every sequence once, of one length, nothing padded."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harvest.sequences import batches_for, sequence_batches, shard_groups

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


@given(sizes=SIZES, shard_tokens=st.integers(1, 60), n_workers=st.integers(1, 5), data=st.data())
def test_groups_hold_every_missing_shard_once_and_in_order(
    sizes: tuple[int, int, int], shard_tokens: int, n_workers: int, data: st.DataObject
) -> None:
    n_tokens, context, batch_size = sizes
    batches = sequence_batches(np.arange(n_tokens) % context, context * batch_size)
    n_shards = -(-n_tokens // shard_tokens)
    missing = sorted(data.draw(st.sets(st.integers(0, n_shards - 1), min_size=1)))
    groups = shard_groups(batches, missing, shard_tokens, n_workers)
    assert [shard for group in groups for shard in group] == missing
    assert all(groups)


def test_groups_end_where_batches_do_and_keep_workers_busy_to_the_end() -> None:
    """Shards of 1,792 tokens and batches of 3 x 2,048: both end at each 24th shard."""
    batches = sequence_batches(np.arange(1792 * 2400) % 2048, 3 * 2048)
    groups = shard_groups(batches, list(range(2400)), 1792, 8)
    assert all(group[0] % 24 == 0 for group in groups)
    assert sum(len(batches_for(batches, group, 1792)) for group in groups) == len(batches)
    assert len(groups) >= 4 * 8
    few = shard_groups(batches, list(range(20)), 1792, 8)  # Not one worker for all, though batches lie across.
    assert len(few) >= 8
