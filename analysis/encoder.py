"""Encode tiles of a store's tokens with the autoencoder.

Codes are those of inference; values are never negative, and where their number varies a tile is padded with zeros to
the most that one of its vectors has. Vectors of a store that was harvested through a tuned lens are encoded as they
are: they went through it already, as the autoencoder's training data did.

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
"""Type of weights and codes; with bfloat16 the encoder's product alone is made in that type."""

PLACES_UNKNOWN = 256
"""Places for a vector's active latents where their mean number is not known, as of a foreign autoencoder."""


class Encoder:
    """A copy of an autoencoder, ready to encode; several threads may use it. Tensors come and go on the CPU, wherever
    the work is done."""

    def __init__(self, sae: MLSAE, dtype: str, device: str = "cpu") -> None:
        """device: as of `analyze --device`."""
        self._device = resolve_device(device)
        self.config = sae.config
        self.dtype = DTYPES[dtype]
        self.numpy_dtype = np.dtype(np.float64 if dtype == "float64" else np.float32)
        self._product_dtype = torch.bfloat16 if dtype == "bfloat16" else None
        self._sae = copy.deepcopy(sae).to(self._device, self.dtype).eval()
        self._encoder = self._sae.ready_encoder(product_dtype=self._product_dtype, screened=dtype == "float32")

    def standardize(self, x: Tensor) -> Standardized:
        """Raw vectors [N, D] of any float type to the dictionary's space; of whole tokens, layer by layer."""
        n_layers = len(self.config.layers)  # known where they are standardised by layer
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
        """What codes depend on beside the vectors: the autoencoder, and the number formats."""
        dtype, device = self.numpy_dtype.name, {} if self._device.type == "cpu" else {"device": self._device.type}
        product = dtype if self._product_dtype is None else "bfloat16"
        return {"sae_hash": sae_hash(self._sae), "dtype": dtype, "product": product, **device}


def _to(device: torch.device | str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def kept_places(config: SAEConfig) -> int:
    """Places for a vector's active latents where codes are kept: k, or where their number varies four times the mean;
    `PLACES_UNKNOWN` where the mean is not known (k 0)."""
    if config.activation == "topk":
        return config.k
    return min(4 * config.k or PLACES_UNKNOWN, config.n_latents)
