"""Fill the shards that a store lacks: forward passes in the main thread, writing in a second one.

How: batches of sequences are fixed by the store's positions and the batch size alone (`sequence_batches`), so that a
run that was stopped computes the same batches again and the bytes do not depend on where it stopped; only batches that
overlap a missing shard are run. Each batch is rounded into one of two host buffers, which the writer cuts into
shards, checks and writes while the next batch is computed. What it does not do: plan, or decide what to store.

Host memory for activations: two batches and about three shards (one being put together, its encoded copy, its
statistics).

Shapes: B sequences, N positions, L stored layers, D = d_model, n = B * N tokens of a batch.
"""

import itertools
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harvest.lens.translators import TunedLens
from harvest.model.load import LoadedModel
from harvest.residual import ResidualRecorder
from harvest.settings import TORCH_DTYPES
from residscope.console import progress, stop_on_signals
from residscope.errors import Interrupted, ResidscopeError
from store.activations import ActivationStore
from store.meta import StoreMeta


class SequenceBatch(NamedTuple):
    """Sequences of one length that go through the model together."""

    start: int
    """First token."""
    stop: int
    """One past the last token."""
    length: int
    """Tokens in each sequence."""


class Filled(NamedTuple):
    """What a run added to a store."""

    shards: int
    """Shards written."""
    tokens: int
    """Tokens that went through the model."""
    seconds: float
    """Time from the first forward pass to the last write."""


def sequence_batches(position: np.ndarray, batch_tokens: int) -> list[SequenceBatch]:
    """All batches, in order, of a store's positions (int [T]): runs of sequences of one length, so that nothing is
    padded, of at most `batch_tokens` tokens, but at least one sequence."""
    starts = np.flatnonzero(position == 0)
    lengths = np.diff(starts, append=len(position))
    runs = np.flatnonzero(np.diff(lengths, prepend=0, append=0))  # First sequence of each run, and one past the last.
    batches = []
    for first, end in itertools.pairwise(runs.tolist()):
        length, start = int(lengths[first]), int(starts[first])
        stop = start + (end - first) * length
        step = max(batch_tokens // length, 1) * length
        batches += [SequenceBatch(at, min(at + step, stop), length) for at in range(start, stop, step)]
    return batches


def batches_for(batches: list[SequenceBatch], missing: Collection[int], shard_tokens: int) -> list[SequenceBatch]:
    """Those of `batches` that overlap a missing shard."""
    wanted = set(missing)
    return [
        b for b in batches if not wanted.isdisjoint(range(b.start // shard_tokens, (b.stop - 1) // shard_tokens + 1))
    ]


def all_finite(values: Tensor) -> Tensor:
    """Whether every value is finite, a bool scalar, in one pass (`isfinite` takes several, 20 times as long)."""
    low, high = torch.aminmax(values)  # Both are NaN where any value is.
    return torch.isfinite(low) & torch.isfinite(high)


class HostBuffer:
    """Room for one batch on the host; `data` [L, n, D] in the stored dtype, `finite` bool [L]. Page-locked for
    CUDA."""

    def __init__(self, n_layers: int, n_tokens: int, d_model: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate for batches of up to `n_tokens`."""
        pinned = device.type == "cuda"
        self.data = torch.empty(n_layers, n_tokens, d_model, dtype=dtype, pin_memory=pinned)
        self.finite = torch.empty(n_layers, dtype=torch.bool, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None

    def mark_copied(self, stream: Any) -> None:
        """Note that what `stream` was given so far fills this buffer."""
        if self._copied is not None:
            self._copied.record(stream)

    def wait(self) -> None:
        """Wait until it is filled."""
        if self._copied is not None:
            self._copied.synchronize()

    def array(self, n_tokens: int) -> np.ndarray:
        """The first `n_tokens` as a numpy array [n, L, D] of the store's raw dtype; a view."""
        data = self.data.view(torch.uint16) if self.data.dtype == torch.bfloat16 else self.data
        return data[:, :n_tokens].numpy().transpose(1, 0, 2)


class BatchRunner:
    """Runs batches and puts their residual streams, through the lens if there is one, into host buffers."""

    def __init__(self, model: LoadedModel, layers: tuple[int, ...], stored_dtype: str, lens: TunedLens | None) -> None:
        """layers: block indices to keep."""
        self.layers = layers
        self._recorder = ResidualRecorder(model, layers)
        self._lens = lens
        self._dtype = TORCH_DTYPES[stored_dtype]
        self._device = model.device
        self._d_model = model.d_model
        # Copies to the host go over a stream of their own, so that the next block's work does not wait for them.
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    def buffer(self, n_tokens: int) -> HostBuffer:
        """Room for batches of up to `n_tokens`."""
        return HostBuffer(len(self.layers), n_tokens, self._d_model, self._dtype, self._device)

    def run(self, input_ids: Tensor, buffer: HostBuffer, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Fill `buffer` with the residual streams of token ids int64 [B, N]; on CUDA the copies may still be under
        way.

        stopped: asked after each block, since a batch may take long; once it is true the pass is given up. Gives
        whether the pass was whole.
        """

        def keep(i: int, residual: Tensor) -> None:
            if stopped():
                raise _Stopped
            values = self.transformed(i, residual)
            target = buffer.data[i, : len(values)]
            if self._stream is None:
                target.copy_(values)
                buffer.finite[i] = all_finite(target)
                return
            stored = values.to(self._dtype, copy=True)  # Not the model's own tensor: the copy is still to come.
            finite = all_finite(stored)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                target.copy_(stored, non_blocking=True)
                buffer.finite[i : i + 1].copy_(finite[None], non_blocking=True)
                stored.record_stream(self._stream)
                finite.record_stream(self._stream)

        try:
            self._recorder.stream(input_ids, keep)
        except _Stopped:
            return False
        buffer.mark_copied(self._stream)
        return True

    def transformed(self, i: int, residual: Tensor) -> Tensor:
        """What is stored of the i-th kept layer's output [B, N, D], before rounding: [n, D]."""
        flat = residual.reshape(-1, self._d_model)
        return flat if self._lens is None else self._lens.apply(flat, self.layers[i])

    def explain_not_finite(self, input_ids: Tensor, first_token: int, stored_dtype: str) -> ResidscopeError:
        """Run a batch again, to name the first layer, token and value that the store cannot hold."""
        problems: list[ResidscopeError] = []

        def look(i: int, residual: Tensor) -> None:
            values = self.transformed(i, residual)
            bad = ~torch.isfinite(values.to(self._dtype))
            if problems or not bool(bad.any()):
                return
            row, dimension = (int(j) for j in bad.nonzero()[0])
            problems.append(
                _not_finite(self.layers[i], first_token + row, dimension, float(values[row, dimension]), stored_dtype)
            )

        self._recorder.stream(input_ids, look)
        if problems:
            return problems[0]
        return ResidscopeError(
            f"tokens {first_token} to {first_token + input_ids.numel() - 1}: the model gave values that are not finite,"
            " and finite ones when run again; the machine computes wrongly. Nothing of it was stored"
        )


class _Stopped(BaseException):
    """Ends a forward pass; no Exception, so that no model code swallows it."""


class _NotFinite(Exception):
    """A batch holds a value that is not finite in the stored dtype."""

    def __init__(self, batch: SequenceBatch) -> None:
        super().__init__(batch)
        self.batch = batch


class ShardAssembler:
    """Cuts batches, which come in order, into the missing shards, and hands each whole one on."""

    def __init__(
        self, meta: StoreMeta, missing: Collection[int], write: Callable[[int, np.ndarray], object], raw_dtype: np.dtype
    ) -> None:
        """write: called with a shard's index and its data [t, L, D]; a view that is only valid during the call."""
        self._meta = meta
        self._missing = frozenset(missing)
        self._write = write
        self._raw_dtype = raw_dtype
        self._partial: np.ndarray | None = None  # [L, S, D]: the one shard that has begun and is not whole
        self._next = 0  # The token that the partial shard goes on with.

    def add(self, start: int, data: np.ndarray) -> None:
        """Take tokens from `start` on, [n, L, D]. A shard of which an earlier part was not taken is never written."""
        size = self._meta.shard_tokens
        for shard in range(start // size, (start + len(data) - 1) // size + 1):
            if shard not in self._missing:
                continue
            first, last = self._meta.shard_bounds(shard)
            low, high = max(first, start), min(last, start + len(data))
            piece = data[low - start : high - start]
            if (low, high) == (first, last):
                self._write(shard, piece)
                continue
            if self._partial is None:
                self._partial = np.empty((self._meta.n_layers, size, self._meta.d_model), self._raw_dtype)
            assert low in (first, self._next), f"shard {shard}: tokens before {low} were not taken"
            partial = self._partial.transpose(1, 0, 2)
            partial[low - first : high - first] = piece
            self._next = high
            if high == last:
                self._write(shard, partial[: last - first])


def fill(store: ActivationStore, model: LoadedModel, runner: BatchRunner, batch_size: int) -> Filled:
    """Write every missing shard of a store that is open for writing.

    A first SIGINT or SIGTERM gives up the batch in flight and raises `Interrupted`; what is written is
    whole. Values that are not finite raise `ResidscopeError` and are not written; so does whatever the disk raises.
    """
    meta, tokens = store.meta, store.tokens
    missing = store.missing_shards()
    batches = batches_for(
        sequence_batches(tokens.position, batch_size * meta.context_length), missing, meta.shard_tokens
    )
    buffers = [runner.buffer(max(b.stop - b.start for b in batches)) for _ in range(min(2, len(batches)))]

    def write_shard(shard: int, data: np.ndarray) -> None:
        first, last = meta.shard_bounds(shard)
        store.write_shard(shard, data, tokens.keep[first:last])

    assembler = ShardAssembler(meta, missing, write_shard, buffers[0].array(0).dtype)
    untaken: list[SequenceBatch] = []

    def take(batch: SequenceBatch, buffer: HostBuffer) -> None:
        # A batch may be in line behind one that failed, before the main thread hears of that: its shards have a hole.
        if untaken:
            return
        untaken.append(batch)
        buffer.wait()
        if not bool(buffer.finite.all()):
            raise _NotFinite(batch)
        assembler.add(batch.start, buffer.array(batch.stop - batch.start))
        untaken.clear()

    def ids(batch: SequenceBatch) -> Tensor:
        found = torch.from_numpy(tokens.token_id[batch.start : batch.stop].astype(np.int64))
        return found.view(-1, batch.length)

    begin = time.perf_counter()
    done = 0
    pending: list[Future[None]] = []
    with stop_on_signals() as stopped, ThreadPoolExecutor(1, "writer") as writer, _bar(meta, batches) as bar:
        try:
            for number, batch in enumerate(batches):
                if len(pending) == len(buffers):
                    pending.pop(0).result()
                buffer = buffers[number % len(buffers)]
                if not runner.run(ids(batch), buffer, stopped):
                    break
                pending.append(writer.submit(take, batch, buffer))
                done += batch.stop - batch.start
                _advance(bar, batch, meta, begin, done)
            for future in pending:
                future.result()
        except _NotFinite as found:
            writer.shutdown(cancel_futures=True)
            raise runner.explain_not_finite(ids(found.batch), found.batch.start, meta.stored_dtype) from None
    left = len(store.missing_shards())
    if left:
        raise Interrupted(
            f"stopped with {meta.n_shards - left} of {meta.n_shards} shards whole; the same command continues the run"
        )
    return Filled(len(missing), done, time.perf_counter() - begin)


def host_bytes(meta: StoreMeta, batch_size: int) -> int:
    """Most bytes of host memory that activations take during `fill`, beside the model's own."""
    batch = min(batch_size * meta.context_length, meta.n_tokens) * meta.bytes_per_token
    return 2 * batch + 3 * meta.shard_tokens * meta.bytes_per_token


def _bar(meta: StoreMeta, batches: list[SequenceBatch]) -> Any:
    todo = sum(b.stop - b.start for b in batches)
    return progress("harvest", "tok", meta.n_tokens, done=meta.n_tokens - todo)


def _advance(bar: Any, batch: SequenceBatch, meta: StoreMeta, begin: float, done: int) -> None:
    rate = done * meta.bytes_per_token / (time.perf_counter() - begin)
    bar.set_postfix_str(f"{rate / 1e9:.3f} GB/s", refresh=False)
    bar.update(batch.stop - batch.start)


def _not_finite(layer: int, token: int, dimension: int, value: float, stored_dtype: str) -> ResidscopeError:
    where = f"layer {layer}, token {token}, dimension {dimension}"
    if np.isfinite(value):
        return ResidscopeError(
            f"{where}: the value {value:.6g} does not fit --store-dtype {stored_dtype}, whose largest is"
            f" {torch.finfo(TORCH_DTYPES[stored_dtype]).max:.6g}. Nothing of it was stored; use --store-dtype bfloat16"
            " or float32"
        )
    return ResidscopeError(
        f"{where}: the model gives {value}. Nothing of it was stored; try --dtype float32, and check the model's"
        " weights"
    )
