"""Which sequences of a store are run through the model again, chosen from the token table alone.

A sequence extends to the next token at position 0. Whole sequences are run, without padding.

Shapes: T tokens, B sequences, N positions, n counted tokens. Tested in test_downstream.py.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from store.arrays import TokenTable


class SequenceBatch(NamedTuple):
    """Sequences of the same length."""

    input_ids: Tensor
    """int64 [B, N]"""
    kept: Tensor
    """bool [B, N] positions that are replaced."""
    counted: Tensor
    """bool [B, N] positions that count; never the last."""
    document: NDArray[np.int64]
    """[n] document of each counted token."""


def batches_to_measure(
    tokens: TokenTable, chosen: NDArray[np.bool_], max_tokens: int, batch_tokens: int
) -> list[SequenceBatch]:
    """The sequences to run for at most `max_tokens` counted tokens: kept tokens of `chosen` [T] with a next token in
    their sequence.

    If there are more, evenly spaced sequences are taken, so that as many documents as possible are represented.
    """
    starts, stops = sequence_bounds(tokens.position)
    counted = tokens.keep & chosen
    counted[stops - 1] = False
    size = np.add.reduceat(counted, starts, dtype=np.int64)
    fitting = np.flatnonzero(size)
    if size.sum() > max_tokens:
        n = int(np.ceil(max_tokens / size[fitting].mean()))
        fitting = fitting[np.unique((np.arange(n) + 0.5) * len(fitting) / n).astype(np.int64)]
    runs: list[tuple[int, int]] = []
    left = max_tokens
    for start, stop in zip(starts[fitting], stops[fitting], strict=True):
        places = start + np.flatnonzero(counted[start:stop])
        counted[places[left:]] = False
        left -= min(left, len(places))
        runs.append((int(start), int(stop)))
        if left == 0:
            break
    return [_batch(tokens, counted, group) for group in _grouped(runs, batch_tokens)]


def sequence_bounds(position: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first token of each sequence, and one past its last, from positions [T]."""
    starts = np.union1d([0], np.flatnonzero(position == 0))
    return starts, np.append(starts[1:], len(position))


def _grouped(runs: list[tuple[int, int]], batch_tokens: int) -> Iterator[list[tuple[int, int]]]:
    """Consecutive runs of the same length, at most `batch_tokens` tokens together, but at least one run."""
    for length, group in groupby(runs, lambda run: run[1] - run[0]):
        alike, n = list(group), max(1, batch_tokens // length)
        yield from (alike[i : i + n] for i in range(0, len(alike), n))


def _batch(tokens: TokenTable, counted: NDArray[np.bool_], runs: list[tuple[int, int]]) -> SequenceBatch:
    index = np.stack([np.arange(start, stop) for start, stop in runs])  # [B, N]
    return SequenceBatch(
        input_ids=torch.from_numpy(tokens.token_id[index].astype(np.int64)),
        kept=torch.from_numpy(tokens.keep[index]),
        counted=torch.from_numpy(counted[index]),
        document=tokens.document[index][counted[index]].astype(np.int64),
    )
