"""Packs the vectors of a shard into its chunks and computes its sums, in one pass over the values.

How: a layer at a time, values are rounded if they are float32, copied into slots (an inner chunk with room for its
checksum), and summed in float64. The loops are compiled by numba. The order of every addition is fixed (no fast-math),
so that the same values give the same bytes on every processor; the interpreter's lock is released, so that threads
can pack several shards at once.

Shapes: t valid tokens of the shard, L stored layers, D = d_model, C tokens in a chunk, P chunks that hold a token.
Arrays are contiguous in the compiled loops.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numcodecs.zstd import Zstd

from store.checksums import CRC_BYTES, checksum
from store.dtypes import OVERFLOW_BITS, from_float32, to_float32
from store.meta import ABSENT, ZSTD_LEVEL, StoreMeta
from store.moments import ShardMoments

_FINITE = np.uint32(0x7FFFFFFF)
_HALF = np.uint32(0x7FFF)
_ONE = np.uint32(1)
_SIXTEEN = np.uint32(16)


class ShardPacker:
    """Packs one shard after another into the same memory: what `pack` returns is valid until its next call."""

    def __init__(self, meta: StoreMeta) -> None:
        """Allocate memory for one shard."""
        self._meta = meta
        self._row_bytes = meta.d_model * meta.itemsize
        n_slots = min(meta.chunks_per_shard, meta.n_chunks) * meta.n_layers
        self._slots = np.empty((n_slots, meta.chunk_tokens * self._row_bytes + CRC_BYTES), np.uint8)

    def pack(self, data: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, ShardMoments]:
        """Pack [t, L, D] vectors, float32 or in the stored format; keep: bool [t].

        Returns the inner chunks in the index's order, each followed by room for its 4-byte checksum, uint8
        [P * L, C * D * itemsize + 4], and the sums over kept tokens.
        Fastest when each layer's [t, D] is contiguous. `ValueError` when a value does not fit the stored format.
        """
        meta = self._meta
        n_present = -(-len(data) // meta.chunk_tokens)
        slots = self._slots[: n_present * meta.n_layers].reshape(n_present, meta.n_layers, -1)
        slots[-1, :, (len(data) - (n_present - 1) * meta.chunk_tokens) * self._row_bytes :] = 0
        kept = np.ascontiguousarray(keep, bool)

        each = (np.ascontiguousarray(data[:, layer]) for layer in range(meta.n_layers))
        layers = [_pack_layer(values, kept, slots, layer, meta) for layer, values in enumerate(each)]
        mean, m2, norm_sums = (np.stack(parts) for parts in zip(*layers, strict=True))
        moments = ShardMoments(int(kept.sum()), mean, m2, norm_sums)
        return slots.reshape(n_present * meta.n_layers, -1), moments


def _pack_layer(
    values: np.ndarray, keep: np.ndarray, slots: np.ndarray, layer: int, meta: StoreMeta
) -> tuple[np.ndarray, np.ndarray, float]:
    """Pack a layer's values [t, D] into slots, uint8 [P, L, C * D * itemsize + 4]; mean [D], M2 [D] and norm sum."""
    stored_dtype, d_model = meta.stored_dtype, meta.d_model
    is_float = values.dtype == np.float32
    # Deviations are from the first kept vector, which avoids cancellation; equal values give exactly zero.
    first = values[keep.argmax()]
    pivot = to_float32(from_float32(first, stored_dtype) if is_float else first, stored_dtype).astype(np.float64)
    sums, squares = np.zeros(d_model), np.zeros(d_model)
    if stored_dtype == "bfloat16":
        bits = values.view(np.uint32) if is_float else values
        target = slots.view(np.uint16)
        shift = 0 if is_float else 16
        norm_sum, largest = pack_bfloat16(bits, shift, target, layer, meta.chunk_tokens, keep, pivot, sums, squares)
        if largest >= OVERFLOW_BITS[stored_dtype]:
            raise ValueError(f"a value is not finite or too large for {stored_dtype}")
    else:
        raw = from_float32(to_float32(values, stored_dtype), stored_dtype)
        rows = raw.reshape(-1).view(np.uint8)
        chunk_bytes = slots.shape[2] - CRC_BYTES
        for chunk, start in enumerate(range(0, rows.size, chunk_bytes)):
            part = rows[start : start + chunk_bytes]
            slots[chunk, layer, : part.size] = part
        norm_sum = measure(to_float32(raw, stored_dtype), keep, pivot, sums, squares)
    if (count := int(keep.sum())) == 0:
        return np.zeros(d_model), np.zeros(d_model), 0.0
    mean = sums / count
    return mean + pivot, np.maximum(squares - count * mean**2, 0), norm_sum


def compiled(fastmath: bool | set[str] = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile at the first call, to run without the interpreter's lock, and cache the machine code if possible."""

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(nogil=True, cache=True, fastmath=fastmath)(function)
        except RuntimeError:  # numba has no writable cache folder: compile again in each process
            return numba.njit(nogil=True, fastmath=fastmath)(function)

    return compile_


@numba.njit(inline="always")
def _add_row(row, pivot, sums, squares, work):  # type: ignore[no-untyped-def]
    """Add a vector's deviation from `pivot` to `sums` and its square to `squares`; its L2 norm. All [D]."""
    n = row.size
    for i in range(n):
        value = np.float64(row[i])
        deviation = value - pivot[i]
        sums[i] += deviation
        squares[i] += deviation * deviation
        work[i] = value * value
    # Summed by halves: these elementwise additions can be vectorised in a fixed order.
    while n > 1:
        half = n // 2
        low, high = work[:half], work[n - half : n]
        for i in range(half):
            low[i] += high[i]
        n -= half
    return np.sqrt(work[0])


@compiled()
def measure(values, keep, pivot, sums, squares):  # type: ignore[no-untyped-def]
    """Add up a layer's kept vectors; returns the sum of their L2 norms.

    values: float32 [t, D]; keep: bool [t]; pivot, sums, squares: float64 [D].
    """
    work = np.empty(values.shape[1])
    norms = 0.0
    for token in range(keep.size):
        if keep[token]:
            norms += _add_row(values[token], pivot, sums, squares, work)
    return norms


@compiled()
def pack_bfloat16(bits, shift, slots, layer, chunk_tokens, keep, pivot, sums, squares):  # type: ignore[no-untyped-def]
    """Round a layer to bfloat16 into its slots, and add up the rounded vectors like `measure`.

    bits: [t, D], uint32 bits of float32 (shift 0) or uint16 bits of bfloat16 (shift 16); slots: uint16 [P, L, C * D]
    or longer. Returns the sum of the kept vectors' L2 norms and the largest magnitude, as float32 bits.
    """
    d_model = bits.shape[1]
    work = np.empty(d_model)
    rounded = np.empty(d_model, np.uint32)
    row = rounded.view(np.float32)
    left = np.uint32(shift)
    largest = np.uint32(0)
    norms = 0.0
    for token in range(keep.size):
        source = bits[token]
        chunk, place = divmod(token, chunk_tokens)
        target = slots[chunk, layer, place * d_model : (place + 1) * d_model]
        for i in range(d_model):
            value = np.uint32(source[i]) << left
            largest = max(largest, value & _FINITE)
            high = (value + _HALF + ((value >> _SIXTEEN) & _ONE)) >> _SIXTEEN
            target[i] = np.uint16(high)
            rounded[i] = high << _SIXTEEN
        if keep[token]:
            norms += _add_row(row, pivot, sums, squares, work)
    return norms, largest


def seal_slots(slots: np.ndarray, meta: StoreMeta) -> list[memoryview]:
    """The bytes of a shard's file, in parts to be written one after another.

    slots: uint8 [P * L, C * D * itemsize + 4], inner chunks in the index's order; this fills in their checksums.
    """
    index = np.full((meta.chunks_per_shard * meta.n_layers, 2), ABSENT, "<i8")
    parts: list[memoryview] = []
    if meta.codec == "zstd":
        codec = Zstd(level=ZSTD_LEVEL)
        offset = 0
        for position, slot in enumerate(slots):
            packed = bytes(codec.encode(slot[:-CRC_BYTES]))
            parts.append(memoryview(packed + checksum(packed)))
            index[position] = offset, parts[-1].nbytes
            offset += parts[-1].nbytes
    else:
        for slot in slots:
            slot[-CRC_BYTES:] = np.frombuffer(checksum(slot[:-CRC_BYTES]), np.uint8)
        index[: len(slots), 0] = np.arange(len(slots)) * slots.shape[1]
        index[: len(slots), 1] = slots.shape[1]
        parts.append(slots.data.cast("B"))
    index_bytes = index.tobytes()
    return [*parts, memoryview(index_bytes + checksum(index_bytes))]
