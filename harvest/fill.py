"""Fills the missing shards of a store: forward passes in the main thread, writing in others.

How: batches of sequences depend on the store's positions and the batch size alone, so that a continued run
computes the same batches, and the bytes do not depend on where a run stopped; only batches that overlap a missing
shard are run. Each batch is rounded into one of two host buffers; a second thread cuts it into shards, and others check
and write these while the next batch is computed. Worker processes (`harvest.filling.workers`) do the same for some of
the shards.

Host memory for activations: `harvest.stored_values.host_bytes`.

Shapes: B sequences, N positions, L stored layers, D = d_model, n = B * N tokens of a batch.
"""

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harvest.filling.rolling import parts_to_fill
from harvest.model.load import LoadedModel
from harvest.residual import EndOfPass, ResidualRecorder
from harvest.sequences import SequenceBatch, batches_for, sequence_batches, token_ids
from harvest.settings import TORCH_DTYPES, Settings
from harvest.stored_values import HostBuffer, n_writers, not_finite_error
from residscope.cluster import n_cores
from residscope.console import progress, stop_on_signals
from residscope.errors import Interrupted, ResidscopeError
from store.activations import ActivationStore
from store.meta import StoreMeta

Write = Callable[[int, np.ndarray], object]
"""Takes a shard's index and its data [t, L, D], a view that is valid until its batch has been written."""


class Filled(NamedTuple):
    """What was added to a store."""

    shards: int
    tokens: int
    """Tokens of these shards."""
    seconds: float
    """Time that filling took."""


class BatchRunner:
    """Runs batches and puts their residual streams, with the lens applied if there is one, into host buffers."""

    def __init__(self, model: LoadedModel, settings: Settings) -> None:
        self.layers = settings.layers
        self.device = model.device
        self._model = model
        self._recorder = ResidualRecorder(model, settings.layers)
        self._lens = settings.lens
        self._dtype = TORCH_DTYPES[settings.store_dtype]
        # Copies to the host use their own CUDA stream, so that the next block does not wait for them.
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    def buffer(self, n_tokens: int) -> HostBuffer:
        """Room for batches of up to `n_tokens`."""
        return HostBuffer(len(self.layers), n_tokens, self._model.d_model, self._dtype, self._model.device)

    def run(self, input_ids: Tensor, buffer: HostBuffer, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Fill `buffer` with the residual streams of token ids int64 [B, N]; on CUDA the copies may not have finished.

        stopped: called after each block; if it returns True, the pass is abandoned. Returns whether the pass finished.
        """

        def keep(i: int, residual: Tensor) -> None:
            if stopped():
                raise EndOfPass
            buffer.put(i, self._transformed(i, residual), self._stream)

        try:
            self._recorder.stream(input_ids, keep)
        except EndOfPass:
            return False
        buffer.mark_copied(self._stream)
        return True

    def norms(self, input_ids: Tensor) -> np.ndarray:
        """L2 norms, float64 [n, L], of the vectors that would be stored for token ids int64 [B, N]."""
        norms: list[Tensor] = []

        def measure(i: int, residual: Tensor) -> None:
            stored = self._transformed(i, residual).to(self._dtype)
            norms.append(torch.linalg.vector_norm(stored, dim=1, dtype=torch.float64).cpu())

        self._recorder.stream(input_ids, measure)
        return torch.stack(norms, 1).numpy()

    def explain_not_finite(self, input_ids: Tensor, first_token: int) -> ResidscopeError:
        """Run a batch again to find the first layer, token and value that the store cannot hold."""
        problems: list[ResidscopeError | None] = []

        def look(i: int, residual: Tensor) -> None:
            if not any(problems):
                values = self._transformed(i, residual)
                problems.append(not_finite_error(values, self._dtype, self.layers[i], first_token))

        self._recorder.stream(input_ids, look)
        return next(filter(None, problems), None) or ResidscopeError(
            f"tokens {first_token} to {first_token + input_ids.numel() - 1}: the model gave values that are not finite,"
            " but finite ones when run again: this machine makes errors. These tokens were not stored"
        )

    def _transformed(self, i: int, residual: Tensor) -> Tensor:
        """The vectors to store for the i-th stored layer's output [B, N, D], before rounding: [n, D]."""
        flat = residual.reshape(-1, self._model.d_model)
        return flat if self._lens is None else self._lens.apply(flat, self.layers[i])


class ShardAssembler:
    """Cuts batches, which arrive in order, into the missing shards, and passes each complete shard to `write`."""

    def __init__(self, meta: StoreMeta, missing: Collection[int], write: Write, raw_dtype: np.dtype) -> None:
        self._meta = meta
        self._missing = frozenset(missing)
        self._write = write
        self._raw_dtype = raw_dtype
        self._partial: np.ndarray | None = None  # [L, S, D]: the shard that is partly filled
        self._next = 0  # The next token of that shard.

    def add(self, start: int, data: np.ndarray) -> list[Any]:
        """Take the tokens from `start` on, [n, L, D]; returns what `write` returned for each shard that they complete.
        A shard whose earlier tokens were not taken is never written."""
        size, written = self._meta.shard_tokens, []
        for shard in range(start // size, (start + len(data) - 1) // size + 1):
            if shard not in self._missing:
                continue
            first, last = self._meta.shard_bounds(shard)
            low, high = max(first, start), min(last, start + len(data))
            piece = data[low - start : high - start]
            if (low, high) == (first, last):
                written.append(self._write(shard, piece))
                continue
            if self._partial is None:
                self._partial = np.empty((self._meta.n_layers, size, self._meta.d_model), self._raw_dtype)
            assert low in (first, self._next), f"shard {shard}: tokens before {low} were not taken"
            partial = self._partial.transpose(1, 0, 2)
            partial[low - first : high - first] = piece
            self._next = high
            if high == last:
                self._partial = None
                written.append(self._write(shard, partial[: last - first]))
        return written


class Filler:
    """Computes the vectors of any shards of a store, repeatedly if asked to."""

    def __init__(self, store: ActivationStore, runner: BatchRunner, batch_size: int, cores: int) -> None:
        """store: open at least for reading. cores: number of cores for this process."""
        self._store, self._runner = store, runner
        self._batches = sequence_batches(store.tokens.position, batch_size * store.meta.context_length)
        longest = max(b.stop - b.start for b in self._batches)
        self._writers = n_writers(runner.device, cores)
        self._buffers = [runner.buffer(longest) for _ in range(min(2, len(self._batches)))]

    def run(self, shards: Collection[int], write: Write, stopped: Callable[[], bool]) -> None:
        """Call `write(shard, data [t, L, D])` for each of `shards`, started in ascending order, in other threads, until
        `stopped()`. `ResidscopeError` for a value that is not finite."""
        store = self._store
        failed, not_finite = list[SequenceBatch](), list[SequenceBatch]()  # A batch is in `failed` until it succeeds.

        def take(batch: SequenceBatch, buffer: HostBuffer) -> list[Future[object]]:
            """Assemble the next batch, unless one has failed: then the shards of later batches may have a hole."""
            if failed:
                return []
            failed.append(batch)
            buffer.wait()
            if not bool(buffer.finite.all()):
                not_finite.append(batch)
                return []
            begun = assembler.add(batch.start, buffer.array(batch.stop - batch.start))
            failed.clear()
            return begun

        def finish(taken: Future[list[Future[object]]]) -> None:
            """Wait until a batch's buffer is no longer in use."""
            for written in taken.result():
                written.result()

        pending: list[Future[list[Future[object]]]] = []
        with ThreadPoolExecutor(1, "assembler") as thread, ThreadPoolExecutor(self._writers, "writer") as writers:
            dtype = self._buffers[0].array(0).dtype
            assembler = ShardAssembler(store.meta, shards, lambda *given: writers.submit(write, *given), dtype)
            for number, batch in enumerate(batches_for(self._batches, shards, store.meta.shard_tokens)):
                if len(pending) == len(self._buffers):
                    finish(pending.pop(0))
                buffer = self._buffers[number % len(self._buffers)]
                ids = torch.from_numpy(token_ids(store.tokens.token_id, batch))
                if not_finite or not self._runner.run(ids, buffer, stopped):
                    break
                pending.append(thread.submit(take, batch, buffer))
            for taken in pending:
                finish(taken)
        for batch in not_finite:
            ids = torch.from_numpy(token_ids(store.tokens.token_id, batch))
            raise self._runner.explain_not_finite(ids, batch.start)


def fill(store: ActivationStore, runner: BatchRunner, batch_size: int) -> Filled:
    """Write every missing shard of a store that is open for writing; raises like `Filler.run` and `filled`."""
    filler, lock = Filler(store, runner, batch_size, n_cores()), threading.Lock()

    def work(missing: list[int], stopped: Callable[[], bool], advance: Callable[[int], object]) -> None:
        def write(shard: int, data: np.ndarray) -> None:
            store.write_shard(shard, data)
            with lock:
                advance(len(data))

        filler.run(missing, write, stopped)

    return filled(store, work)


def filled(store: ActivationStore, work: Callable[..., object]) -> Filled:
    """Run `work(missing, stopped, advance)`, which fills the missing shards and calls `advance` with each one's tokens.

    The first SIGINT or SIGTERM makes `stopped()` true. `Interrupted` if shards are still missing at the end.
    """
    meta, missing, begin = store.meta, store.missing_shards(), time.perf_counter()
    todo = sum(stop - start for start, stop in map(meta.shard_bounds, missing))

    def advance(n: int) -> None:
        bar.update(n)
        rate = (bar.n - bar.initial) * meta.bytes_per_token / (time.perf_counter() - begin)
        bar.set_postfix_str(f"{rate / 1e9:.3f} GB/s", refresh=False)

    with stop_on_signals() as stopped, progress("harvest", "tok", meta.n_tokens, done=meta.n_tokens - todo) as bar:
        for shards in parts_to_fill(store, stopped):
            work(shards, stopped, advance)
    if left := len(store.missing_shards()):
        done_of = f"{meta.n_shards - left} of {meta.n_shards} shards complete"
        raise Interrupted(f"stopped with {done_of}; run the same command to continue")
    return Filled(len(missing), todo, time.perf_counter() - begin)
