"""Encode tiles of a store's tokens with the autoencoder.

Codes are those of inference, with values >= 0. If the number of active latents varies, a tile is padded with zeros to
the largest number among its vectors. Vectors of a store that was harvested through a tuned lens are encoded as they
are: the lens was already applied to them, as it was to the autoencoder's training data.

Shapes: T tokens, L layers, D d_model, k active latents a vector at most, M n_latents; the T * L vectors of a tile are
rows of one matrix. Tested in test_tiles.py.
"""

import copy
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.hardware import resolve_device
from train.kernels.interface import SparseCodes
from train.model import MLSAE, SAEConfig, Standardized, sae_hash

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}
"""Type of weights and codes; with bfloat16 only the encoder's product is computed in that type."""

PLACES_UNKNOWN = 256
"""Places for a vector's active latents if their mean number is unknown, as for an autoencoder from another library."""


class Encoder:
    """A copy of an autoencoder, ready to encode; several threads may use it. It takes and returns CPU tensors, whatever
    its device."""

    def __init__(self, sae: MLSAE, dtype: str, device: str = "cpu") -> None:
        """device: as in `analyze --device`."""
        self._device = resolve_device(device)
        self.config = sae.config
        self.dtype = DTYPES[dtype]
        self.numpy_dtype = np.dtype(np.float64 if dtype == "float64" else np.float32)
        self._product_dtype = torch.bfloat16 if dtype == "bfloat16" else None
        self._sae = copy.deepcopy(sae).to(self._device, self.dtype).eval()
        self._encoder = self._sae.ready_encoder(product_dtype=self._product_dtype, screened=dtype == "float32")

    def standardize(self, x: Tensor) -> Standardized:
        """Map raw vectors [N, D] of any float type, all layers of each token in turn, to the dictionary's space."""
        n_layers = len(self.config.layers)  # 0 unless vectors are standardised by layer
        layer = torch.arange(n_layers, device=self._device).repeat(len(x) // n_layers) if n_layers else None
        return Standardized(*_to("cpu", *self._sae.standardize(x.to(self._device, self.dtype), layer)))

    def encode(self, standardized: Standardized) -> SparseCodes:
        """Codes of standardised vectors: values [N, k] >= 0, indices int64 [N, k]; 0 is padding."""
        return SparseCodes(*_to("cpu", *self._sae.encode_standardized(standardized.x.to(self._device), self._encoder)))

    def decode(self, codes: SparseCodes, standardized: Standardized) -> Tensor:
        """Reconstructions [N, D] in raw space."""
        mean, std = _to(self._device, standardized.mean, standardized.std)
        return self._sae.decode(SparseCodes(*_to(self._device, *codes)), mean, std).cpu()

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What codes depend on besides the vectors: autoencoder, number formats and device."""
        dtype = self.numpy_dtype.name
        device = {} if self._device.type == "cpu" else {"device": self._device.type}
        product = dtype if self._product_dtype is None else "bfloat16"
        return {"sae_hash": sae_hash(self._sae), "dtype": dtype, "product": product, **device}


def _to(device: torch.device | str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def kept_places(config: SAEConfig) -> int:
    """Places for a vector's active latents in codes that are kept: k for TopK, otherwise four times their mean number;
    `PLACES_UNKNOWN` if that is not known (k is 0)."""
    if config.activation == "topk":
        return config.k
    return min(4 * config.k or PLACES_UNKNOWN, config.n_latents)
