"""Residual streams as they are stored: in the store's number format, in host memory, and finite.

Shapes: L stored layers, n tokens of a batch, D = d_model.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from residscope.errors import ResidscopeError
from store.meta import StoreMeta


def all_finite(values: Tensor) -> Tensor:
    """Whether every value is finite, a bool scalar, in one pass (`isfinite` takes several, 20 times as long)."""
    low, high = torch.aminmax(values)  # Both are NaN where any value is.
    return torch.isfinite(low) & torch.isfinite(high)


class HostBuffer:
    """A batch in host memory, page-locked for CUDA; `data` [L, n, D] in the stored dtype, `finite` bool [L]."""

    def __init__(self, n_layers: int, n_tokens: int, d_model: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate for batches of up to `n_tokens` from a model on `device`."""
        self._device = device
        on_cuda = device.type == "cuda"
        self.data = torch.empty(n_layers, n_tokens, d_model, dtype=dtype, pin_memory=on_cuda)
        self.finite = torch.empty(n_layers, dtype=torch.bool, pin_memory=on_cuda)
        self._copied = torch.cuda.Event() if on_cuda else None

    def put(self, i: int, values: Tensor, stream: Any) -> None:
        """Round the i-th layer's vectors [n, D] into the buffer; on CUDA over `stream`, without waiting for it."""
        target = self.data[i, : len(values)]
        if stream is None:
            target.copy_(values)
            self.finite[i] = all_finite(target)
            return
        stored = values.to(self.data.dtype, copy=True)  # Not the model's own tensor, which may change before the copy.
        finite = all_finite(stored)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(stored, non_blocking=True)
            self.finite[i : i + 1].copy_(finite[None], non_blocking=True)
            stored.record_stream(stream)
            finite.record_stream(stream)

    def mark_copied(self, stream: Any) -> None:
        """Record that this buffer is full once `stream` has done its work so far."""
        if self._copied is not None:
            self._copied.record(stream)

    def wait(self) -> None:
        """Wait until the buffer is full."""
        if self._copied is not None:
            self._copied.synchronize()

    def array(self, n_tokens: int) -> np.ndarray:
        """A view of the first `n_tokens` as a numpy array [n, L, D] of the store's raw dtype."""
        data = self.data.view(torch.uint16) if self.data.dtype == torch.bfloat16 else self.data
        return data[:, :n_tokens].numpy().transpose(1, 0, 2)


def not_finite_error(values: Tensor, dtype: torch.dtype, layer: int, first_token: int) -> ResidscopeError | None:
    """The error for the first value in a layer's vectors [n, D] that is not finite in `dtype`; None if all are."""
    bad = ~torch.isfinite(values.to(dtype))
    if not bool(bad.any()):
        return None
    row, dimension = (int(j) for j in bad.nonzero()[0])
    value = float(values[row, dimension])
    where = f"layer {layer}, token {first_token + row}, dimension {dimension}"
    if np.isfinite(value):
        return ResidscopeError(
            f"{where}: the value {value:.6g} does not fit --store-dtype {str(dtype).removeprefix('torch.')}, whose"
            f" maximum is {torch.finfo(dtype).max:.6g}. It was not stored; use --store-dtype bfloat16 or float32"
        )
    way_out = "try --dtype float32, and check the model's weights"
    return ResidscopeError(f"{where}: the model gives {value}. It was not stored; {way_out}")


def n_writers(device: torch.device, cores: int) -> int:
    """Shards that are written at once: several for a GPU, which is faster than a core packs; a CPU needs its cores."""
    return max(min(cores - 1, 8), 1) if device.type == "cuda" else 1


def host_bytes(meta: StoreMeta, batch_size: int, writers: int) -> int:
    """Maximum host memory for activations during `fill`, in bytes, without the model's own: two batches, three shards
    that are assembled from several batches, and for each writer an encoded copy of a shard and its working memory."""
    batch = min(batch_size * meta.context_length, meta.n_tokens)
    return (2 * batch + (3 + 2 * writers) * meta.shard_tokens) * meta.bytes_per_token
