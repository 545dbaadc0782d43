"""Shards: each is assembled from its own tokens, whichever are missing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harvest.fill import ShardAssembler
from harvest.sequences import batches_for, sequence_batches
from harvest.stored_values import n_writers
from store.meta import StoreMeta

SIZES = st.tuples(st.integers(1, 200), st.integers(1, 20), st.integers(1, 5))


def meta(n_tokens: int, shard_tokens: int) -> StoreMeta:
    return StoreMeta(
        n_tokens=n_tokens,
        layers=(0, 1),
        n_model_layers=2,
        d_model=3,
        chunk_tokens=1,
        shard_tokens=shard_tokens,
        context_length=4,
    )


@given(sizes=SIZES, shard_tokens=st.integers(1, 60), data=st.data())
def test_missing_shards_are_assembled_from_their_batches_alone(
    sizes: tuple[int, int, int], shard_tokens: int, data: st.DataObject
) -> None:
    n_tokens, context, batch_size = sizes
    store = meta(n_tokens, shard_tokens)
    missing = data.draw(st.sets(st.integers(0, store.n_shards - 1), min_size=1))
    values = np.arange(n_tokens * 6, dtype=np.float32).reshape(n_tokens, 2, 3)
    written: dict[int, np.ndarray] = {}

    def write(shard: int, piece: np.ndarray) -> None:
        assert shard not in written
        written[shard] = piece.copy()

    assembler = ShardAssembler(store, missing, write, np.dtype(np.float32))
    batches = sequence_batches(np.arange(n_tokens) % context, context * batch_size)
    wanted = batches_for(batches, missing, shard_tokens)
    needed = [
        b
        for b in batches
        if any(b.start < store.shard_bounds(s)[1] and b.stop > store.shard_bounds(s)[0] for s in missing)
    ]
    assert wanted == needed
    for batch in wanted:
        assembler.add(batch.start, values[batch.start : batch.stop])
    assert list(written) == sorted(missing)
    for shard, piece in written.items():
        start, stop = store.shard_bounds(shard)
        np.testing.assert_array_equal(piece, values[start:stop])


def test_a_shard_of_which_a_part_was_not_taken_is_never_written() -> None:
    """Neither where a batch is left out, nor where one fails while a shard of it is written."""
    written: list[int] = []

    def write(shard: int, piece: np.ndarray) -> None:
        if shard == 1:
            raise OSError("full disk")
        written.append(shard)

    rows = np.ones((6, 2, 3), np.float32)
    assembler = ShardAssembler(meta(40, 10), {0, 1, 2, 3}, write, np.dtype(np.float32))
    assembler.add(0, rows)
    assembler.add(6, rows)
    with pytest.raises(OSError, match="full disk"):
        assembler.add(12, np.ones((12, 2, 3), np.float32))  # The end of shard 1 and the beginning of shard 2.
    with pytest.raises(AssertionError, match="shard 2: tokens before 24 were not taken"):
        assembler.add(24, rows)
    with pytest.raises(AssertionError, match="shard 3: tokens before 34 were not taken"):
        assembler.add(34, rows)
    assert written == [0]


@pytest.mark.parametrize(("device", "cores", "n"), [("cuda", 6, 5), ("cuda:1", 1, 1), ("cuda", 64, 8), ("cpu", 64, 1)])
def test_as_many_shards_are_written_at_once_as_the_model_leaves_cores_for(device: str, cores: int, n: int) -> None:
    assert n_writers(torch.device(device), cores) == n
