"""WindowLoader: batches of rows, shuffled in windows from all over the store, within a fixed amount of memory.

How: `RowOrder` (shuffle.py) decides which blocks make up each window, and the order in which their rows are served. A
background thread reads the next window into one of two buffers (its blocks in parallel, each checked against its
crc32c), while batches are gathered from the other. The stream of rows is cut into batches across the bounds of windows
and epochs, so that batch b has the same bytes whatever came before it, whatever the number of threads, and wherever a
run was resumed. Memory: two windows of blocks, and the batch that is being made.

When n processes (ranks) share the stream, each reads every n-th block of each window, and serves those rows of each
batch that are in its blocks: a batch is the same rows for any n, and each block is read by one rank only.

Shapes: N rows in a batch, D = d_model, C tokens in a chunk, W blocks in a window, T tokens.
"""

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from residscope.errors import UsageError
from store.activations import ActivationStore
from store.dtypes import STORAGE_DTYPE
from store.shuffle import RowOrder, chunk_row_counts

DEFAULT_WINDOW_BYTES = 256 * 1024 * 1024  # `train` has its own default
_POLL_SECONDS = 0.02


class Batch(NamedTuple):
    """Some rows of the store; the caller owns the arrays."""

    rows: np.ndarray
    """[N, D] in the stored format."""
    layer: np.ndarray
    """int64 [N]: stored layer of each row."""
    token: np.ndarray
    """int64 [N]: token of each row, counted in the store."""
    of_layer: np.ndarray
    """int64 [stored layers]: number of rows of each layer, over all ranks."""


class _Window(NamedTuple):
    """A window that is being read; it is in memory once `read` is done."""

    chunk: np.ndarray
    """int64 [W]: token chunk of each block."""
    layer: np.ndarray
    """int64 [W]: stored layer of each block."""
    rows: np.ndarray
    """[W' * C, words]: the rows of its buffer (this rank's blocks only), as wide integers."""
    read: "Future[None]"
    order: "Future[np.ndarray]"
    """int64 [rows served]: which of the blocks' rows are served, in order; takes a tenth of the time of `read`."""


class WindowLoader:
    """Yields the batches from `start_batch` to the end of the last epoch, once.

    Every row that the mask keeps appears exactly once in each epoch.
    """

    def __init__(
        self,
        store: ActivationStore,
        row_mask: np.ndarray,
        batch_size: int,
        seed: int,
        window_bytes: int = DEFAULT_WINDOW_BYTES,
        *,
        layers: Sequence[int] | None = None,
        threads: int = 4,
        start_batch: int = 0,
        epochs: int = 1,
        rank: int = 0,
        world_size: int = 1,
        shard_part: np.ndarray | None = None,
        ready: Callable[[int], bool] = lambda _: True,
    ) -> None:
        """Fix the order of rows; nothing is read before the first batch is asked for.

        row_mask: bool [T], tokens to serve. window_bytes: size of one window; two are held. layers: stored layers,
        default all. threads: threads that read a window. start_batch: batches of the stream to skip, such as those
        that an interrupted run has seen. rank: index of this process among the `world_size` that share each batch.
        shard_part: int64 [shards], each shard's part, if each epoch is to serve the store part by part.
        ready: whether a part can be read yet. Raises `UsageError` when there is no row to serve.
        """
        meta = store.meta
        row_mask = np.asarray(row_mask, bool)
        if row_mask.shape != (meta.n_tokens,):
            raise UsageError(f"loader: row_mask should have shape ({meta.n_tokens},), found {row_mask.shape}")
        if batch_size < 1 or epochs < 1 or threads < 1 or start_batch < 0:
            raise UsageError(
                "loader: batch_size, epochs and threads should be at least 1 and start_batch at least 0, found "
                f"{batch_size}, {epochs}, {threads}, {start_batch}"
            )
        self._store = store
        self._batch_size = batch_size
        self._epochs = epochs
        self._threads = threads
        self._next = start_batch
        self._rank, self._world_size = rank, world_size
        self._order = RowOrder(
            chunk_rows=chunk_row_counts(row_mask, meta.chunk_tokens),
            layers=tuple(range(meta.n_layers)) if layers is None else tuple(int(layer) for layer in layers),
            blocks_per_window=max(window_bytes // (meta.chunk_tokens * meta.d_model * meta.itemsize), 1),
            seed=seed,
            part=None if shard_part is None else np.repeat(shard_part, meta.chunks_per_shard)[: meta.n_chunks],
        )
        self._ready = ready
        if self._order.row_ends[-1] == 0:
            raise UsageError(f"{store.path}: no rows: the mask excludes all tokens")
        self._mask = row_mask

    @property
    def n_rows(self) -> int:
        """Rows of the whole stream (all epochs, from batch 0)."""
        return int(self._order.row_ends[-1]) * self._epochs

    @property
    def n_batches(self) -> int:
        """Batches of the whole stream (all epochs, from batch 0); the last may be short."""
        return -(-self.n_rows // self._batch_size)

    @property
    def part_ends(self) -> np.ndarray:
        """int64 [parts]: rows of an epoch that have been served at the end of each part."""
        return self._order.row_ends

    @property
    def buffer_shape(self) -> tuple[int, int, int]:
        """(W', C, D) of each of the two windows in memory."""
        meta, blocks = self._store.meta, min(self._order.blocks_per_window, self._order.n_blocks)
        return -(-blocks // self._world_size), meta.chunk_tokens, meta.d_model

    def __iter__(self) -> Generator[Batch, None, None]:
        meta = self._store.meta
        helper = ThreadPoolExecutor(1, thread_name_prefix="helper")
        windows = self._windows(helper)
        try:
            (window, ahead), served = next(windows, (None, None)), 0
            while window is not None and self._next < self.n_batches:
                wanted = min(self._batch_size, self.n_rows - self._next * self._batch_size)
                rows = np.empty((wanted, meta.d_model), STORAGE_DTYPE[meta.stored_dtype])
                layer, token = np.empty((2, wanted), np.int64)
                batch = Batch(rows, layer, token, np.zeros(meta.n_layers, np.int64))
                passed = filled = 0
                while True:
                    # While no window is being read, a core is free for a second thread.
                    idle = self._threads > 1 and (ahead is None or ahead.read.done())
                    picked = window.order.result()[served : served + wanted - passed]
                    filled += self._fill(batch, filled, window, picked, helper if idle else None)
                    passed, served = passed + len(picked), served + len(picked)
                    if passed == wanted:
                        break
                    # The window is used up; the next call may overwrite its buffer.
                    (window, ahead), served = next(windows), 0
                self._next += 1
                yield Batch(rows[:filled], layer[:filled], token[:filled], batch.of_layer)
        finally:
            windows.close()
            helper.shutdown()

    def _fill(
        self, batch: Batch, filled: int, window: _Window, picked: np.ndarray, helper: ThreadPoolExecutor | None
    ) -> int:
        """Gather those of the window's rows `picked` that are this rank's into the batch; returns their number."""
        chunk_tokens, ranks = self._store.meta.chunk_tokens, self._world_size
        block, row = np.divmod(picked, chunk_tokens)
        batch.of_layer[:] += np.bincount(window.layer[block], minlength=len(batch.of_layer))
        if ranks > 1:
            own = block % ranks == self._rank
            block, row = block[own], row[own]
            picked = block // ranks * chunk_tokens + row
        n = len(picked)
        target = slice(filled, filled + n)
        rows = _wide(batch.rows)[target]
        half = n // 2 if helper else n
        rest = helper.submit(_gather, window.rows, picked[half:], rows[half:]) if helper and half < n else None
        _gather(window.rows, picked[:half], rows[:half])
        batch.layer[target] = window.layer[block]
        batch.token[target] = window.chunk[block] * chunk_tokens + row
        if rest is not None:
            rest.result()
        return n

    def _windows(self, helper: ThreadPoolExecutor) -> Generator[tuple[_Window, _Window | None], None, None]:
        """Windows from the first that is needed, each with the one being read meanwhile; valid until the next yield."""
        if (first_row := self._next * self._batch_size) >= self.n_rows:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="window") as reader:
            reading = self._reading(first_row, reader, helper)
            for window in reading:
                if window is None:  # The next part cannot be read yet.
                    time.sleep(_POLL_SECONDS)
                while window is not None:
                    ahead = next(reading, None)
                    window.read.result()
                    window.order.result()
                    yield window, ahead
                    window = ahead

    def _reading(
        self, first_row: int, reader: ThreadPoolExecutor, helper: ThreadPoolExecutor
    ) -> Iterator[_Window | None]:
        """Windows starting with the one of the stream's row `first_row`, each as soon as `reader` has begun to read it;
        None as long as the next one is not ready."""
        dtype = STORAGE_DTYPE[self._store.meta.stored_dtype]
        buffers = itertools.cycle([np.empty(self.buffer_shape, dtype) for _ in range(2)])
        start = self._order.locate(first_row)
        for epoch in range(start.epoch, self._epochs * self._order.n_parts):
            while not self._ready(epoch % self._order.n_parts):
                yield None
            blocks = start.blocks if epoch == start.epoch else self._order.epoch(epoch)
            for window in range(start.window if epoch == start.epoch else 0, len(blocks.row_ends)):
                skip = start.row if (epoch, window) == (start.epoch, start.window) else 0
                chunk, layer = blocks.window(window)
                own = slice(self._rank, None, self._world_size)
                out = next(buffers)[: len(chunk[own])]
                read = reader.submit(self._store.read_blocks, chunk[own], layer[own], out, self._threads)
                order = helper.submit(self._served_rows, chunk, epoch, window, skip)
                yield _Window(chunk, layer, _wide(out.reshape(-1, out.shape[-1])), read, order)

    def _served_rows(self, chunk: np.ndarray, epoch: int, window: int, skip: int) -> np.ndarray:
        """The rows of a window in the order in which they are served, except the first `skip`."""
        token = chunk[:, None] * self._store.meta.chunk_tokens + np.arange(self._store.meta.chunk_tokens)
        is_served = self._mask.take(token, mode="clip") & (token < len(self._mask))
        return self._order.shuffled(np.flatnonzero(is_served), epoch, window)[skip:]


def _gather(rows: np.ndarray, picked: np.ndarray, out: np.ndarray) -> None:
    # "clip" because "raise" makes numpy gather into a copy; the indices are known to be in range.
    np.take(rows, picked, axis=0, out=out, mode="clip")


def _wide(rows: np.ndarray) -> np.ndarray:
    """A view of rows as the widest integers that divide them, which numpy copies fastest."""
    row_bytes = rows.shape[-1] * rows.itemsize
    width = next(w for w in (8, 4, 2, 1) if row_bytes % w == 0)
    return rows.view(f"u{width}")
