"""WindowLoader: batches of rows, shuffled over the whole store, within a fixed amount of memory.

How: the plan (plan.py) says which blocks make up each window. A background thread reads the next window into one of two
buffers, its blocks in parallel, every one checked by its crc32c, while batches are gathered from the other. The stream
of rows is cut into batches without regard to windows and epochs, so that batch b is the same bytes whatever came before
it, whatever the number of threads, and wherever a run was resumed. What it does not do: convert numbers
(train/data.py), or know what a row is for.

Memory: two windows of blocks, and the batch that is being made.

Shapes: N rows in a batch, D = d_model, C tokens in a chunk, W blocks in a window, T tokens.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from residscope.errors import UsageError
from store.activations import ActivationStore
from store.care.places import require_in_place
from store.dtypes import STORAGE_DTYPE
from store.shuffle import LoaderPlan, chunk_row_counts

DEFAULT_WINDOW_BYTES = 256 * 1024 * 1024


class Batch(NamedTuple):
    """Some rows of the store; the arrays belong to whoever got them."""

    rows: np.ndarray
    """[N, D] in the stored format."""
    layer: np.ndarray
    """int64 [N]: stored layer of each row."""
    token: np.ndarray
    """int64 [N]: token of the store of each row."""


class _Window(NamedTuple):
    """A window that is in memory."""

    rows: np.ndarray
    """[W * C, words]: the rows of its buffer, as wide integers."""
    order: np.ndarray
    """int64 [rows served]: which of them are served, in order."""
    chunk: np.ndarray
    """int64 [W]: token chunk of each block."""
    layer: np.ndarray
    """int64 [W]: stored layer of each block."""
    ahead: "Future[None] | None"
    """The reading of the next window, if there is one."""


class _Job(NamedTuple):
    """A window to read."""

    epoch: int
    window: int
    chunk: np.ndarray
    """int64 [W]: token chunk of each block."""
    layer: np.ndarray
    """int64 [W]: stored layer of each block."""
    skip: int
    """Rows served in an earlier run."""


class _Pending(NamedTuple):
    """A window that is being read."""

    job: _Job
    out: np.ndarray
    """[W, C, D]: where to."""
    read: "Future[None]"
    order: "Future[np.ndarray]"
    """Meanwhile, on a core that is free: what takes as long as a tenth of the reading."""


class WindowLoader:
    """Gives the batches from `start_batch` to the end of the last epoch, once.

    Every row that the mask keeps comes exactly once in each epoch.
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
        check_places: bool = False,
    ) -> None:
        """Plan the stream; nothing is read before the first batch is asked for.

        row_mask: bool [T], tokens to serve. window_bytes: size of one window; two are held. layers: stored layers,
        default all. threads: readers of a window. start_batch: batches of the stream to leave out, as those that an
        interrupted run has seen. check_places: see that the file of each shard is its own, once (store/care/places.py).
        Raises `UsageError` when there is no row to serve.
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
        self._check_places = check_places
        block_bytes = meta.chunk_tokens * meta.d_model * meta.itemsize
        self.plan = LoaderPlan(
            chunk_rows=chunk_row_counts(row_mask, meta.chunk_tokens),
            layers=tuple(range(meta.n_layers)) if layers is None else tuple(int(layer) for layer in layers),
            blocks_per_window=max(window_bytes // block_bytes, 1),
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        if self.plan.rows_per_epoch == 0:
            raise UsageError(f"{store.path}: no rows to serve: the mask keeps none of its tokens for rank {rank}")
        self._mask = np.zeros((meta.n_chunks, meta.chunk_tokens), bool)
        self._mask.reshape(-1)[: meta.n_tokens] = row_mask
        self._window_blocks = min(self.plan.blocks_per_window, self.plan.n_blocks)
        self.wait_seconds = 0.0
        """Time that the caller has waited for windows to be read."""

    @property
    def n_rows(self) -> int:
        """Rows of the whole stream (all epochs, from batch 0)."""
        return self.plan.rows_per_epoch * self._epochs

    @property
    def n_batches(self) -> int:
        """Batches of the whole stream (all epochs, from batch 0); the last may be short."""
        return -(-self.n_rows // self._batch_size)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the two windows."""
        meta = self._store.meta
        return 2 * self._window_blocks * meta.chunk_tokens * meta.d_model * meta.itemsize

    @property
    def next_batch(self) -> int:
        """Index in the stream of the batch that comes next: `start_batch` for a loader that goes on from here."""
        return self._next

    def __iter__(self) -> Generator[Batch, None, None]:
        helper = ThreadPoolExecutor(1, thread_name_prefix="helper")
        windows = self._windows(helper)
        try:
            window = next(windows, None)
            served = 0
            while window is not None and self._next < self.n_batches:
                wanted = min(self._batch_size, self.n_rows - self._next * self._batch_size)
                batch = self._empty_batch(wanted)
                filled = 0
                while True:
                    filled, served = self._fill(batch, filled, window, served, helper)
                    if filled == wanted:
                        break
                    # The window is spent; its buffer may be written over once it is let go.
                    window, served = next(windows), 0
                self._next += 1
                yield batch
        finally:
            windows.close()
            helper.shutdown()

    def _empty_batch(self, n: int) -> Batch:
        meta = self._store.meta
        rows = np.empty((n, meta.d_model), STORAGE_DTYPE[meta.stored_dtype])
        return Batch(rows, np.empty(n, np.int64), np.empty(n, np.int64))

    def _fill(
        self, batch: Batch, filled: int, window: _Window, served: int, helper: ThreadPoolExecutor
    ) -> tuple[int, int]:
        """Gather rows of the window into the batch; the new numbers of rows filled and served."""
        n = min(len(batch.rows) - filled, len(window.order) - served)
        picked = window.order[served : served + n]
        target = slice(filled, filled + n)
        rows = _wide(batch.rows)[target]
        # While nothing is read, there is a core for a second thread.
        idle = self._threads > 1 and (window.ahead is None or window.ahead.done())
        half = n // 2 if idle else n
        rest = helper.submit(_gather, window.rows, picked[half:], rows[half:]) if half < n else None
        _gather(window.rows, picked[:half], rows[:half])
        block, row = np.divmod(picked, self._store.meta.chunk_tokens)
        batch.layer[target] = window.layer[block]
        batch.token[target] = window.chunk[block] * self._store.meta.chunk_tokens + row
        if rest is not None:
            rest.result()
        return filled + n, served + n

    def _windows(self, helper: ThreadPoolExecutor) -> Generator[_Window, None, None]:
        """Windows from the first that is needed, begun at the right row; each is valid until the next is asked for."""
        first_row = self._next * self._batch_size
        if first_row >= self.n_rows:
            return
        meta = self._store.meta
        shape = (self._window_blocks, meta.chunk_tokens, meta.d_model)
        buffers = [np.empty(shape, STORAGE_DTYPE[meta.stored_dtype]) for _ in range(2)]
        with ThreadPoolExecutor(1, thread_name_prefix="window") as reader:
            pending: _Pending | None = None
            for turn, job in enumerate(self._jobs(first_row)):
                out = buffers[turn % 2][: len(job.chunk)]
                read = reader.submit(self._read, job, out)
                ahead = _Pending(job, out, read, helper.submit(self._order, job))
                if pending is not None:
                    yield self._wait(pending, ahead.read)
                pending = ahead
            if pending is not None:
                yield self._wait(pending, None)

    def _read(self, job: _Job, out: np.ndarray) -> None:
        if self._check_places:
            require_in_place(self._store, job.chunk, job.layer, self._threads)
        self._store.read_blocks(job.chunk, job.layer, out, self._threads)

    def _wait(self, pending: _Pending, ahead: Future[None] | None) -> _Window:
        began = time.perf_counter()
        pending.read.result()
        order = pending.order.result()
        self.wait_seconds += time.perf_counter() - began
        rows = pending.out.reshape(-1, pending.out.shape[-1])
        return _Window(_wide(rows), order, pending.job.chunk, pending.job.layer, ahead)

    def _jobs(self, first_row: int) -> Iterator[_Job]:
        """Each window to read."""
        start = self.plan.locate(first_row)
        for epoch in range(start.epoch, self._epochs):
            blocks = self.plan.epoch(epoch)
            begin = start.window if epoch == start.epoch else 0
            for window in range(begin, len(blocks.row_ends)):
                skip = start.row if (epoch, window) == (start.epoch, start.window) else 0
                yield _Job(epoch, window, *self.plan.window(blocks, window), skip)

    def _order(self, job: _Job) -> np.ndarray:
        """The rows of a window in the order in which they are served, without those that were."""
        rows = np.flatnonzero(self._mask[job.chunk])
        return self.plan.row_order(rows, job.epoch, job.window)[job.skip :]


def _gather(rows: np.ndarray, picked: np.ndarray, out: np.ndarray) -> None:
    # "clip" because "raise" makes numpy gather into a copy; the indices are ours and in range.
    np.take(rows, picked, axis=0, out=out, mode="clip")


def _wide(rows: np.ndarray) -> np.ndarray:
    """Rows seen as the widest integers that fill them: numpy moves those fastest."""
    row_bytes = rows.shape[-1] * rows.itemsize
    width = next(w for w in (8, 4, 2, 1) if row_bytes % w == 0)
    return rows.view(f"u{width}")
