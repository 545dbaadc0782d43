"""FVU, L0 and firing on held-out documents, as method.md defines them: raw space, one mean vector a layer.

    FVU_l = sum |x - x_hat|^2 / sum |x - mean_l|^2      over the validation vectors, mean_l over those same vectors

Whole chunks of the store are read, in a seeded order, until there are enough tokens: with a large store only a few of
its bytes are touched, and a short validation sees the first of the chunks that a long one sees. Changes nothing in the
trainer: neither the counters of dead latents nor any random state.

Shapes: T tokens of the store, t tokens read, L layers, D d_model, M n_latents.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from store.activations import ActivationStore
from store.plan import permutation
from train.batches import VectorSource
from train.losses import FIRING_THRESHOLD, LayerMoments
from train.sae import MLSAE


class Validation(NamedTuple):
    """How good an autoencoder is on held-out documents."""

    tokens: int
    """Tokens looked at; each gives one vector a layer."""

    fvu: float
    """Mean over layers of the FVU."""

    fvu_per_layer: list[float]
    """FVU by layer trained on, in raw space; 0 is perfect, 1 no better than each layer's mean."""

    l0: float
    """Active latents a vector, mean."""

    l0_per_layer: list[float]
    """Active latents a vector by layer."""

    fired: float
    """Share of the latents that fired on any of these vectors."""

    def metrics(self) -> dict[str, Any]:
        """The keys of a validation line."""
        return {
            "split": "validation",
            "validation_tokens": self.tokens,
            "fvu": self.fvu,
            "fvu_per_layer": self.fvu_per_layer,
            "l0": self.l0,
            "l0_per_layer": self.l0_per_layer,
            "fired_fraction": self.fired,
        }


class ValidationData:
    """The held-out tokens of a store."""

    def __init__(self, store: ActivationStore, mask: np.ndarray, layers: Sequence[int], seed: int) -> None:
        """mask: bool [T], kept tokens of held-out documents; layers: stored layers, ascending."""
        self._store = store
        self._mask = mask
        self._layers = list(layers)
        size = store.meta.chunk_tokens
        chunks = np.unique(np.flatnonzero(mask) // size)
        self._chunks = chunks[permutation(len(chunks), seed)]

    def __bool__(self) -> bool:
        return len(self._chunks) > 0

    def evaluate(self, sae: MLSAE, source: VectorSource, *, tokens: int, product_dtype: torch.dtype) -> Validation:
        """Measure `sae` on up to `tokens` held-out tokens."""
        n_layers = len(self._layers)
        device = sae.W_enc.device
        moments = LayerMoments.zeros(n_layers, sae.config.d_model, device)
        errors = torch.zeros(n_layers, dtype=torch.float64, device=device)
        active = torch.zeros(n_layers, dtype=torch.float64, device=device)
        fired = torch.zeros(sae.config.n_latents, dtype=torch.bool, device=device)
        seen = 0
        for raw in self._read(tokens):
            x = source.to_float32(raw)  # [t, L, D]
            rows = x.flatten(0, 1)
            layer = torch.arange(n_layers, device=device).repeat(len(x))
            out = sae(rows, product_dtype=product_dtype)
            moments = moments.add(rows, layer)
            errors += _by_layer((rows - out.x_hat).double().square().sum(dim=1), n_layers)
            active += _by_layer((out.codes.values > 0).sum(dim=1), n_layers)
            fired[out.codes.indices[out.codes.values > FIRING_THRESHOLD]] = True
            seen += len(x)
        fvu = errors / moments.deviation
        return Validation(
            tokens=seen,
            fvu=fvu.mean().item(),
            fvu_per_layer=fvu.tolist(),
            l0=active.sum().item() / (seen * n_layers),
            l0_per_layer=(active / seen).tolist(),
            fired=fired.double().mean().item(),
        )

    def _read(self, tokens: int) -> Iterator[np.ndarray]:
        """Held-out tokens in the stored type, [t, L, D] at a time, until there are `tokens` of them."""
        size, n_tokens = self._store.meta.chunk_tokens, self._store.meta.n_tokens
        for chunk in self._chunks.tolist():
            part = slice(chunk * size, min((chunk + 1) * size, n_tokens))
            chosen = np.flatnonzero(self._mask[part])[:tokens]
            yield self._store.read(part, self._layers, raw=True)[chosen]
            tokens -= len(chosen)
            if tokens <= 0:
                return


def _by_layer(values: Tensor, n_layers: int) -> Tensor:
    """Sum over tokens of `values` [t * L], layers running fastest: float64 [L]."""
    return values.view(-1, n_layers).double().sum(dim=0)
