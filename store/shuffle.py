"""The order in which a store's rows are served: a window shuffle, a pure function of (seed, epoch).

A row is one vector: a token at a layer. A block is one inner chunk: C tokens at one layer. How: each epoch has one
random order of the chunks, in which every run of chunks is spread over the whole store (`spread_order`), because
neighbouring chunks are alike. Every layer follows this order cyclically from a different, evenly spaced start; step p
of the epoch takes the p-th chunk of every layer, with the layers in random order. So any run of blocks covers all
layers and all parts of the store evenly, and each chunk about equally often: what a chunk's tokens have in common at
all layers cancels out. Compared to a random order for each layer, that halves what windows add to the variance of
batch means (benchmarks/bench_shuffle.py). A window is a run of blocks, whose rows are permuted.

Shapes: T tokens, C tokens in a chunk, L layers served, B blocks in an epoch.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from residscope.errors import UsageError

_PIECE = 1 << 22  # Blocks that are processed at once.

# Each use of random numbers has its own stream, so that no two with the same seed coincide.
_, _CHUNKS, _LAYERS, _ROWS, _DOCUMENTS, _STARTS = range(6)


class EpochOrder:
    """The blocks of an epoch, in order, computed on demand: a store of 1e9 tokens has 10^8 of them."""

    def __init__(self, order: "RowOrder", epoch: int) -> None:
        self._order, self._epoch = order, epoch
        self._used = order.used(epoch)
        n_layers, n_steps = len(order.layers), len(self._used)
        self.n_blocks = n_steps * n_layers
        self._steps = spread_order(n_steps, order.seed, _CHUNKS, 0, epoch)
        starts = permutation(n_layers, order.seed, _STARTS, 0, epoch)
        self._starts = starts * n_steps // n_layers
        before = np.zeros(n_steps + 1, np.int64)  # rows served before each step
        of_step = order.chunk_rows[self._used][self._steps]
        for begin in self._starts.tolist():
            before[1:] += np.roll(of_step, -begin)
        np.cumsum(before, out=before)
        per_window = min(order.blocks_per_window, self.n_blocks)  # the former may exceed int64
        ends = np.append(np.arange(per_window, self.n_blocks, per_window), self.n_blocks)
        self.row_ends = before[ends // n_layers]
        """int64 [windows]: rows of the epoch that have been served at the end of each window."""
        for start in range(0, len(ends), size := max(_PIECE // per_window, 1)):
            step, rest = np.divmod(ends[start : start + size], n_layers)
            chunk, _ = self._mixed(np.minimum(step, n_steps - 1))
            of_step = order.chunk_rows[chunk] * (np.arange(n_layers) < rest[:, None])
            self.row_ends[start : start + size] += of_step.sum(axis=1)

    def window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Token chunk and stored layer, each int64, of a window's blocks."""
        size = self._order.blocks_per_window
        return self.blocks(window * size, (window + 1) * size)

    def blocks(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Token chunk and stored layer, each int64, of the epoch's blocks from `start` to `stop`."""
        n_layers = len(self._order.layers)
        first, last = start // n_layers, -(-min(stop, self.n_blocks) // n_layers)
        chunk, layer = self._mixed(np.arange(first, last))
        wanted = slice(start - first * n_layers, stop - first * n_layers)
        return chunk.reshape(-1)[wanted], layer.reshape(-1)[wanted]

    def _mixed(self, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token chunk and stored layer, each int64 [n, L], of the blocks of the steps `step`, int64 [n], ascending."""
        order, n_layers = self._order, len(self._order.layers)
        chunk = self._used[self._steps[(step[:, None] + self._starts) % len(self._steps)]]
        first, end = (int(edge) * n_layers for edge in (step[0], step[-1] + 1))
        # Philox gives four numbers per counter value.
        bits = _bits(order.seed, _LAYERS, 0, self._epoch).advance(first // 4)
        draws = np.asarray(bits.random_raw(end - first + first % 4), np.uint64)[first % 4 :]
        mix = np.argsort(draws.reshape(-1, n_layers)[step - step[0]], axis=1)
        return np.take_along_axis(chunk, mix, axis=1), np.array(order.layers, np.int64)[mix]


class Position(NamedTuple):
    """A place in the stream of rows."""

    epoch: int
    window: int
    row: int
    """Rows of the window that precede it."""
    blocks: EpochOrder
    """The blocks of the epoch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowOrder:
    """The order of the rows in every epoch."""

    chunk_rows: np.ndarray
    """int64 [chunks of the store]: rows that the mask keeps in each chunk, per layer."""
    layers: tuple[int, ...]
    """Stored layers to serve."""
    blocks_per_window: int
    """Blocks that are in memory, and shuffled together, at once."""
    seed: int
    """Seed of every permutation; not negative."""
    part: np.ndarray | None = None
    """int64 [chunks of the store]: each chunk's part, if the store is served part by part, each part as an epoch of its
    own; every part has rows."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"loader: seed should not be negative, found {self.seed}")
        if self.blocks_per_window < 1:
            raise UsageError(f"loader: a window should hold at least 1 block, found {self.blocks_per_window}")
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise UsageError(f"loader: layers should be at least one, without repeats, found {list(self.layers)}")

    @cached_property
    def _part(self) -> np.ndarray:
        return np.zeros(len(self.chunk_rows), np.int64) if self.part is None else self.part

    def used(self, epoch: int) -> np.ndarray:
        """The chunks with rows in an epoch, ascending."""
        return np.flatnonzero((self.chunk_rows > 0) & (self._part == epoch % self.n_parts))

    @cached_property
    def n_parts(self) -> int:
        """Number of parts in which the store is served."""
        return int(self._part.max()) + 1

    @cached_property
    def row_ends(self) -> np.ndarray:
        """int64 [parts]: rows of all parts that have been served at the end of each part."""
        rows = np.bincount(self._part, weights=self.chunk_rows, minlength=self.n_parts)
        return np.cumsum(rows.astype(np.int64)) * len(self.layers)

    @property
    def n_blocks(self) -> int:
        """Number of blocks of the largest epoch."""
        return int(np.bincount(self._part, weights=self.chunk_rows > 0).max()) * len(self.layers)

    def epoch(self, epoch: int) -> EpochOrder:
        """The blocks of an epoch, in order, and the ends of its windows."""
        return EpochOrder(self, epoch)

    def locate(self, row: int) -> Position:
        """The position of the row-th row of the stream (from 0, over all epochs)."""
        times, rest = divmod(row, int(self.row_ends[-1]))
        part = int(np.searchsorted(self.row_ends, rest, side="right"))
        rest -= int(self.row_ends[part - 1]) if part else 0
        epoch = times * self.n_parts + part
        blocks = self.epoch(epoch)
        window = int(np.searchsorted(blocks.row_ends, rest, side="right"))
        return Position(epoch, window, rest - (int(blocks.row_ends[window - 1]) if window else 0), blocks)

    def shuffled(self, rows: np.ndarray, epoch: int, window: int) -> np.ndarray:
        """The rows of a window (any int array) in the order in which they are served."""
        return np.random.Generator(_bits(self.seed, _ROWS, 0, epoch, window)).permutation(rows)


def chunk_row_counts(row_mask: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """How many tokens of each token chunk the mask (bool [T]) keeps: int64 [chunks]."""
    return np.add.reduceat(row_mask, np.arange(0, len(row_mask), chunk_tokens), dtype=np.int64)


def validation_documents(n_documents: int, fraction: float, seed: int) -> np.ndarray:
    """Which documents are held out for validation: bool [n_documents].

    A random subset, `fraction` of them to the nearest whole document; if 0 < fraction < 1 and there are two or more
    documents, at least one is held out and at least one is not. The same with every version of numpy.
    """
    if not 0 <= fraction <= 1:
        raise UsageError(f"validation fraction should be within 0..1, found {fraction}")
    n_held_out = round(fraction * n_documents)
    if 0 < fraction < 1 and n_documents >= 2:
        n_held_out = min(max(n_held_out, 1), n_documents - 1)
    held_out = np.zeros(n_documents, bool)
    held_out[permutation(n_documents, seed, _DOCUMENTS)[:n_held_out]] = True
    return held_out


def permutation(n: int, seed: int, *stream: int) -> np.ndarray:
    """A random order of 0..n-1: int64 [n]. Made from raw bits, which numpy promises not to change between versions."""
    return np.argsort(_random(n, seed, *stream), kind="stable")


def spread_order(n: int, seed: int, *stream: int) -> np.ndarray:
    """A random order of 0..n-1, int64 [n], in which every run of numbers is spread evenly over the range.

    It is van der Corput's order with randomly scrambled digits: the order alternates between the two halves of the
    range, between the halves of each half, and so on; which half comes first is random.
    """
    order = np.zeros(1, np.int64)
    depth = max(n - 1, 0).bit_length()
    bits = (_random(1 << depth, seed, *stream) >> np.uint64(63)).astype(np.int64)
    while len(order) < 1 << depth:
        first = 2 * order + bits[len(order) : 2 * len(order)]  # One half of each part; the other halves follow.
        order = np.concatenate([first, first ^ 1])
    return order[order < n]


def _random(n: int, seed: int, *stream: int) -> np.ndarray:
    return np.asarray(_bits(seed, *stream).random_raw(n), np.uint64)


def _bits(seed: int, *stream: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream))
