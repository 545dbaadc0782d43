"""The store's rows as torch tensors: float32, on the training device, with layers numbered as they are trained.

Not here: the order of the rows, which is `store.shuffle`'s, and reading them, which is `store.loader`'s.

Shapes: N rows, D d_model, t tokens, L layers trained on.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from store.loader import Batch


class Vectors(NamedTuple):
    """Some residual stream vectors."""

    x: Tensor
    """float32 [N, D], raw."""

    layer: Tensor
    """int64 [N], position among the layers trained on, 0 .. L - 1."""


class VectorSource:
    """Turns the loader's batches into tensors; `layers` are the stored layers that are trained on, ascending."""

    def __init__(self, layers: Sequence[int], stored_dtype: str, device: torch.device) -> None:
        self._stored_dtype = stored_dtype
        self._device = device
        self._position = torch.full((max(layers) + 1,), -1, dtype=torch.int64)
        self._position[list(layers)] = torch.arange(len(layers))

    def __call__(self, batch: Batch) -> Vectors:
        """One batch; the conversion to float32 is made on the device, after half the bytes have travelled."""
        rows = self.to_float32(batch.rows)
        return Vectors(rows, self._position[torch.from_numpy(batch.layer)].to(self._device))

    def stream(self, batches: Iterable[Batch]) -> Iterator[Vectors]:
        """All of them."""
        return map(self, batches)

    def to_float32(self, rows: np.ndarray) -> Tensor:
        """Rows in the store's type, of any shape, as float32 on the device."""
        if self._stored_dtype == "bfloat16":
            tensor = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(rows)
        return tensor.to(self._device).float()
