"""Decides which sequences of a token table go through the model together, from their positions alone."""

import itertools
from collections.abc import Collection
from typing import NamedTuple

import numpy as np


class SequenceBatch(NamedTuple):
    """Neighbouring sequences of the same length."""

    start: int
    """First token."""
    stop: int
    """One past the last token."""
    length: int
    """Tokens in each sequence."""


def sequence_batches(position: np.ndarray, batch_tokens: int) -> list[SequenceBatch]:
    """All sequences of a table, in order, in batches of neighbours of the same length, so that nothing is padded: as
    many as fit in `batch_tokens`, at least one. position: int [T], 0 where a sequence begins."""
    starts = np.flatnonzero(position == 0)
    lengths = np.diff(starts, append=len(position))
    runs = np.flatnonzero(np.diff(lengths, prepend=0, append=0))  # First sequence of each run, and one past the last.
    batches = []
    for first, end in itertools.pairwise(runs.tolist()):
        length, start = int(lengths[first]), int(starts[first])
        stop = start + (end - first) * length
        step = max(batch_tokens // length, 1) * length
        batches += [SequenceBatch(token, min(token + step, stop), length) for token in range(start, stop, step)]
    return batches


def batches_for(batches: list[SequenceBatch], missing: Collection[int], shard_tokens: int) -> list[SequenceBatch]:
    """The `batches` that overlap a missing shard."""
    wanted, size = set(missing), shard_tokens
    return [b for b in batches if not wanted.isdisjoint(range(b.start // size, (b.stop - 1) // size + 1))]


def shard_groups(
    batches: list[SequenceBatch], missing: list[int], shard_tokens: int, n_workers: int
) -> list[list[int]]:
    """`missing` shards (ascending) in groups, each of which is one task for one of `n_workers`.

    A batch across two groups is run for both, so a group ends where a batch does, if one ends between half and twice
    the group size: a 16th of a worker's share, at least 8 batches, at most the share and the larger of 16 batches and
    16 shards."""
    longest, share = max(b.stop - b.start for b in batches), len(missing) * shard_tokens // n_workers
    size = round(min(max(share // 16, 8 * longest), 16 * max(longest, shard_tokens), share) / shard_tokens) or 1
    ends, wanted = {b.stop for b in batches}, set(missing)
    clean = {i for i, shard in enumerate(missing, 1) if (shard + 1) * shard_tokens in ends or shard + 1 not in wanted}
    groups, at = [], 0
    while at < len(missing):
        places = clean.intersection(range(at + (size + 1) // 2, at + 2 * size + 1)) or {at + size}
        end = min(places, key=lambda i, middle=at + size: (abs(i - middle), i))
        groups.append(missing[at:end])
        at = end
    return groups


def token_ids(token_id: np.ndarray, batch: SequenceBatch) -> np.ndarray:
    """The batch's token ids, int64 [B, N], from those of the table (int [T])."""
    return token_id[batch.start : batch.stop].astype(np.int64).reshape(-1, batch.length)
