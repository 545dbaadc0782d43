"""FVU, L0 and firing on held-out documents, as method.md defines them: in raw space, one mean vector per layer.

    FVU_l = sum |x - x_hat|^2 / sum |x - mean_l|^2      over the validation vectors, mean_l over those same vectors

Whole chunks of the store are read, in a seeded order, until there are enough tokens.

Shapes: T tokens of the store, t tokens read, L layers, D d_model, M n_latents.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from store.activations import ActivationStore
from store.shuffle import permutation
from train.data import VectorSource
from train.model import MLSAE
from train.objective.losses import FIRING_THRESHOLD
from train.objective.statistics import LayerVariance
from train.reporting.convergence import Spread

INTERIM_TOKENS, INTERIM_CHUNKS = 256, 8
"""Held-out tokens in a validation during training, and the chunks they come from: enough to show a trend, and not that
of a single document, at almost no cost."""

FEW_DOCUMENTS = 5
"""Held-out documents below which the numbers say little about other documents."""


class Validation(NamedTuple):
    """How good an autoencoder is on held-out documents."""

    tokens: int
    """Tokens measured; each gives one vector per layer."""
    fvu: float
    """Mean of the layers' FVUs."""
    fvu_per_layer: list[float]
    """FVU of each layer trained on, in raw space; 0 is perfect, 1 no better than the layer's mean."""
    l0: float
    """Mean number of active latents per vector."""
    l0_per_layer: list[float]
    fired: float
    """Share of the latents that fired on any of these vectors."""
    ratio: float | None = None
    """Aggregate over token-level variance of layers, by mass; None for a single layer or in older checkpoints."""
    stays_on: float | None = None
    """Share of active (token, layer, latent) triples whose latent is active at the next layer too."""
    documents: int | None = None
    """Documents that the tokens are of; None in older checkpoints."""

    def metrics(self) -> dict[str, Any]:
        """The keys of a validation line."""
        names = {"tokens": "validation_tokens", "documents": "validation_documents", "fired": "fired_fraction"}
        return {"split": "validation"} | {names.get(name, name): value for name, value in self._asdict().items()}


class ValidationTarget(NamedTuple):
    """An autoencoder to measure, on the same device as the vectors."""

    sae: MLSAE
    product_dtype: torch.dtype
    """Type of its encoder's product."""
    position: int | None = None
    """The one layer to measure it on, as a position among the layers; None: on all of them."""


class ValidationData:
    """Some tokens of a store, such as the held-out ones."""

    def __init__(self, store: ActivationStore, mask: np.ndarray, layers: Sequence[int], seed: int) -> None:
        """mask: bool [T], kept tokens of held-out documents; layers: stored layers, ascending."""
        self._store, self._mask, self._layers = store, mask, list(layers)
        chunks = np.unique(np.flatnonzero(mask) // store.meta.chunk_tokens)
        self._chunks = chunks[permutation(len(chunks), seed)]

    def __bool__(self) -> bool:
        """Whether there is anything to measure: FVU is not defined for one token."""
        return bool(np.count_nonzero(self._mask) > 1)

    def evaluate(
        self,
        targets: Sequence[ValidationTarget],
        source: VectorSource,
        *,
        tokens: int,
        chunks: int = 1,
        fired: list[Tensor] | None = None,
    ) -> list[Validation]:
        """Measure each of several autoencoders on the same held-out tokens, which are read once for all of them.
        chunks: see `_choose`. fired: a list to append to: for each autoencoder, which latents fired, bool [M]."""
        n_layers = len(self._layers)
        device = targets[0].sae.W_enc.device
        variance = LayerVariance.zeros(n_layers, self._store.meta.d_model, device)
        sums = [_Sums(target, self._layers) for target in targets]
        chosen = list(self._choose(tokens, chunks))
        for raw in map(self._read, chosen):
            x = source.to_float32(raw)  # [t, L, D]
            layer = torch.arange(n_layers, device=device).repeat(len(x))
            variance = variance.add(x.flatten(0, 1), layer)
            for each in sums:
                each.add(x)
        if fired is not None:
            fired += [each.fired for each in sums]
        seen = self._store.tokens.document[np.concatenate(chosen)]
        return [each.finish(len(seen), len(np.unique(seen)), variance.deviation) for each in sums]

    def read(self, tokens: int) -> Iterator[np.ndarray]:
        """Held-out tokens in the stored type, [t, L, D] of a chunk at a time, until there are `tokens` of them."""
        return map(self._read, self._choose(tokens, 1))

    def _read(self, chosen: np.ndarray) -> np.ndarray:
        size = self._store.meta.chunk_tokens
        first = int(chosen[0]) // size * size
        chunk = slice(first, min(first + size, self._store.meta.n_tokens))
        return self._store.read(chunk, self._layers, raw=True)[chosen - first]

    def _choose(self, tokens: int, chunks: int) -> Iterator[np.ndarray]:
        """Indices [t] of held-out tokens, those of a chunk at a time, until there are `tokens` of them: from as few
        chunks as possible, or an equal share from each of `chunks` if there are that many."""
        size, share = self._store.meta.chunk_tokens, -(-tokens // max(min(chunks, len(self._chunks)), 1))
        for chunk in self._chunks.tolist():
            found = np.flatnonzero(self._mask[chunk * size : (chunk + 1) * size]) + chunk * size
            chosen = found[:: max(len(found) // share, 1)][: min(share, tokens)]
            yield chosen
            tokens -= len(chosen)
            if tokens <= 0:
                return


class _Sums:
    """Running sums over tokens for one autoencoder."""

    def __init__(self, target: ValidationTarget, layers: Sequence[int]) -> None:
        self._target = target
        self._layers = slice(None) if target.position is None else slice(target.position, target.position + 1)
        self._numbers = layers[self._layers]
        self._n_layers = len(self._numbers)
        device = target.sae.W_enc.device
        self._errors, self._active = torch.zeros(2, self._n_layers, dtype=torch.float64, device=device)
        self.fired = torch.zeros(target.sae.config.n_latents, dtype=torch.bool, device=device)
        self._spread = Spread.zeros(target.sae.config.n_latents, device)

    def add(self, x: Tensor) -> None:
        """Count tokens `x` [t, L, D]."""
        rows = x[:, self._layers].flatten(0, 1)
        out = self._target.sae(rows, self._rows_layer(len(x)), product_dtype=self._target.product_dtype)
        by_layer = (len(x), self._n_layers)
        self._errors += (rows - out.x_hat).double().square().sum(dim=1).view(by_layer).sum(dim=0)
        self._active += (out.codes.values > 0).sum(dim=1).view(by_layer).sum(dim=0)
        self.fired[out.codes.indices[out.codes.values > FIRING_THRESHOLD]] = True
        if self._n_layers > 1:
            self._spread = self._spread.add(out.codes, self._numbers)

    def _rows_layer(self, n_tokens: int) -> Tensor | None:
        """The layer of each row of `n_tokens` tokens; None unless the autoencoder standardises by layer."""
        if (known := len(self._target.sae.config.layers)) == 0:
            return None
        positions = torch.arange(known, device=self._errors.device)
        if self._target.position is not None:
            positions = positions[:1] if known == 1 else positions[self._layers]
        return positions.repeat(n_tokens)

    def finish(self, tokens: int, documents: int, deviation: Tensor) -> Validation:
        """The result; deviation: float64 [L], sum of |x - mean_l|^2 over the same tokens."""
        latents, fvu = self._target.sae.latents, self._errors / deviation[self._layers]
        latents.sum_(self._active, fired := self.fired.double().mean())
        return Validation(
            tokens=tokens,
            documents=documents,
            fvu=fvu.mean().item(),
            fvu_per_layer=fvu.tolist(),
            l0=self._active.sum().item() / (tokens * self._n_layers),
            l0_per_layer=(self._active / tokens).tolist(),
            fired=fired.item() / latents.size,
            **self._spread.numbers(latents),
        )
