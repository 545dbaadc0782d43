"""From the vectors of a shard to its file's bytes and its statistics, in one pass over the values.

How: values are rounded straight into slots (an inner chunk with room for its checksum), by compiled loops (kernels.py);
the slots are then sealed with their checksums and the index (shards.py). What it does not do: write to a disk.

Shapes: t valid tokens of the shard, L stored layers, D = d_model, C tokens in a chunk, P chunks that hold a token.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import xxhash

from store.dtypes import OVERFLOW_BITS, from_float32, to_float32
from store.meta import StoreMeta
from store.moments import ShardMoments
from store.row_loops import measure, pack_bfloat16
from store.shards import CRC_BYTES, seal_slots


class PackedShard(NamedTuple):
    """A shard that is ready to be written."""

    parts: list[memoryview]
    """The bytes of its file, one part after another."""
    moments: ShardMoments
    """Sums over its kept tokens."""

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return sum(part.nbytes for part in self.parts)

    @property
    def xxh3_128(self) -> str:
        """Hash of the file."""
        digest = xxhash.xxh3_128()
        for part in self.parts:
            digest.update(part)
        return digest.hexdigest()


class ShardPacker:
    """Packs one shard after another into the same memory: what `pack` gives is valid until its next call."""

    def __init__(self, meta: StoreMeta) -> None:
        """Take the memory: the size of one shard."""
        self._meta = meta
        self._row_bytes = meta.d_model * meta.itemsize
        n_slots = min(meta.chunks_per_shard, meta.n_chunks) * meta.n_layers
        self._slots = np.empty((n_slots, meta.chunk_tokens * self._row_bytes + CRC_BYTES), np.uint8)

    def pack(self, data: np.ndarray, keep: np.ndarray, threads: int = 1) -> PackedShard:
        """Pack [t, L, D] vectors, float32 or in the stored format; keep: bool [t].

        Fastest when each layer's [t, D] is contiguous. `threads` share out the layers; the result does not depend on
        them. `ValueError` where a value does not fit the stored format.
        """
        meta = self._meta
        n_present = -(-len(data) // meta.chunk_tokens)
        slots = self._slots[: n_present * meta.n_layers].reshape(n_present, meta.n_layers, -1)
        slots[-1, :, (len(data) - (n_present - 1) * meta.chunk_tokens) * self._row_bytes :] = 0
        kept = np.ascontiguousarray(keep, bool)

        def run(layer: int) -> _LayerMoments:
            return _pack_layer(np.ascontiguousarray(data[:, layer]), kept, slots, layer, meta)

        if threads == 1:
            layers = [run(layer) for layer in range(meta.n_layers)]
        else:
            with ThreadPoolExecutor(threads) as pool:
                layers = list(pool.map(run, range(meta.n_layers)))
        mean, m2, norm_sums = (np.stack(parts) for parts in zip(*layers, strict=True))
        parts = seal_slots(slots.reshape(n_present * meta.n_layers, -1), meta)
        return PackedShard(parts, ShardMoments(int(kept.sum()), mean, m2, norm_sums))


class _LayerMoments(NamedTuple):
    """Moments of one layer's kept vectors."""

    mean: np.ndarray
    """float64 [D]."""
    m2: np.ndarray
    """float64 [D]."""
    norm_sum: float


def _pack_layer(values: np.ndarray, keep: np.ndarray, slots: np.ndarray, layer: int, meta: StoreMeta) -> _LayerMoments:
    """Put a layer into its slots and add it up. values: [t, D]; slots: uint8 [P, L, C * D * itemsize + 4]."""
    stored_dtype, d_model = meta.stored_dtype, meta.d_model
    is_float = values.dtype == np.float32
    # Deviations are taken from the first kept vector, so that nothing cancels, and equal values give exactly zero.
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
    count = int(keep.sum())
    if count == 0:
        return _LayerMoments(np.zeros(d_model), np.zeros(d_model), 0.0)
    mean = sums / count
    return _LayerMoments(mean + pivot, np.maximum(squares - count * mean**2, 0), norm_sum)
