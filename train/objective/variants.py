"""The variants of the sparse autoencoder: how each chooses latents in training and in inference, and what it trains.

    topk        the k largest pre-activations of a vector (Gao et al. 2024)
    batchtopk   the N k largest of a batch; in inference all above a threshold that training measured (Bussmann et al.
                2024)
    matryoshka  as batchtopk, and prefixes of the dictionary must reconstruct on their own too (Bussmann et al. 2025)
    jumprelu    all above the latent's own threshold, which is trained (Rajamanoharan et al. 2024)
    relu        all that are positive, kept few by an L1 penalty (Bricken et al. 2023, with unit-norm decoder rows)

Everything else calls `variant_of(config)`. A new variant is a subclass with the methods of `Variant`, a line in
`VARIANTS`, and its name in the places that CONTRIBUTING.md lists.

Shapes: N rows, D d_model, M n_latents, k active latents per row, w the most that a row has.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from train.config import ObjectiveConfig
from train.kernels.encode import BatchCodes, ReadyEncoder
from train.kernels.interface import SparseCodes
from train.model_config import SAEConfig
from train.objective.passes import Block, MainPass, PassInputs, dense_pass, nested_pass, sparse_pass
from train.objective.weights import Weights
from train.parallel.selection import batch_codes, row_codes

THRESHOLD_RATE = 0.05
"""Weight of a batch's smallest kept activation in the running mean that becomes the threshold of inference: it covers
about the last twenty batches, so that it fits the weights that are saved."""

MULTI_TOPK = (4, 1 / 8)
"""Gao et al. 2024, appendix D: the loss with four times as many latents has a weight of an eighth."""


class Variant(ABC):
    """One way to choose the active latents."""

    def __init__(self, config: SAEConfig) -> None:
        self.config = config

    def extra_state(self) -> Mapping[str, Tensor]:
        """Initial values of this variant's additional tensors: fields of `train.objective.weights.Weights`."""
        return {}

    @abstractmethod
    def encode(self, inputs: Tensor, weights: Weights, encoder: ReadyEncoder) -> SparseCodes:
        """Codes of encoder inputs [N, D] in inference; `encoder` is made from `weights`."""

    @abstractmethod
    def train(self, given: PassInputs, options: "StepOptions") -> MainPass:
        """Loss and gradients of a training batch; may update, in place, a threshold that is measured, not trained."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The options of a step: the same at all steps, except those that warm up (`RunPlan.options_at`)."""

    variant: Variant
    """How latents are chosen."""
    objective: ObjectiveConfig
    """The flags of the loss; those that may be left open or warm up are resolved in the fields below."""
    k: int
    """Latents that may be active on a row, or the target."""
    aux_k: int
    """Dead latents that AuxK may use on a row."""
    sparsity_coef: float = 0.0
    """Weight of the sparsity term of jumprelu and relu."""
    product_dtype: torch.dtype
    """Type of the encoder's product (and of AuxK's)."""
    tile_bytes: int
    """Pre-activations held at once."""


@final
class TopK(Variant):
    """The k largest, then ReLU."""

    def encode(self, inputs: Tensor, weights: Weights, encoder: ReadyEncoder) -> SparseCodes:
        return encoder.topk(inputs, self.config.k)

    def train(self, given: PassInputs, options: StepOptions) -> MainPass:
        factor, weight = MULTI_TOPK
        n_latents = len(given.weights.W_enc)
        wide = min(factor * options.k, n_latents) if options.objective.multi_topk else options.k
        codes = _encoder(given).topk(given.inputs, wide)
        if not options.objective.multi_topk:
            return sparse_pass(row_codes(codes, given.ranks.latents), given)
        if wide == options.k:  # k is all latents already
            return nested_pass([Block(codes, 1 + weight)], 0, codes, given)
        first, rest = (
            SparseCodes(codes.values[:, part].contiguous(), codes.indices[:, part].contiguous())
            for part in (slice(options.k), slice(options.k, None))
        )
        return nested_pass([Block(first, 1.0), Block(rest, weight)], 0, first, given)


class MeasuredThreshold(Variant):
    """Trained on the N k largest of a batch; in inference, all above a running mean of the smallest kept activation."""

    def extra_state(self) -> Mapping[str, Tensor]:
        return {"threshold": torch.zeros(())}

    def encode(self, inputs: Tensor, weights: Weights, encoder: ReadyEncoder) -> SparseCodes:
        assert weights.threshold is not None
        return encoder.above(inputs, weights.threshold)

    def measured_codes(self, given: PassInputs, k: int) -> SparseCodes:
        """Codes of a training batch; updates the threshold of inference."""
        codes, smallest = _batch_codes(given, k)
        if (threshold := given.weights.threshold) is not None and smallest is not None:
            first = threshold == 0  # nothing measured yet
            threshold.copy_(torch.where(first, smallest, threshold.lerp(smallest, THRESHOLD_RATE)))
        return codes


@final
class BatchTopK(MeasuredThreshold):
    """The N k largest of a batch."""

    def train(self, given: PassInputs, options: StepOptions) -> MainPass:
        return sparse_pass(self.measured_codes(given, options.k), given)


@final
class Matryoshka(MeasuredThreshold):
    """BatchTopK, with a loss for each prefix of the dictionary; the losses are added."""

    def train(self, given: PassInputs, options: StepOptions) -> MainPass:
        codes, prefixes = self.measured_codes(given, options.k), self.config.prefixes
        group = torch.bucketize(codes.indices, torch.tensor(prefixes, device=codes.indices.device), right=True)
        blocks = [Block(_only(codes, group == b), 1.0) for b in range(len(prefixes))]
        return nested_pass(blocks, len(blocks) - 1, codes, given)


@final
class JumpReLU(Variant):
    """All above the latent's own threshold, which is trained with a rectangle kernel.

    On the first batch all thresholds start at that of BatchTopK with the same k. A start far from it takes long to
    correct: a threshold is one number with Adam's small steps, a pre-activation is moved by d_model weights.
    """

    def extra_state(self) -> Mapping[str, Tensor]:
        return {"log_threshold": torch.full((self.config.n_latents,), -torch.inf)}  # threshold 0: not measured yet

    def encode(self, inputs: Tensor, weights: Weights, encoder: ReadyEncoder) -> SparseCodes:
        assert weights.log_threshold is not None
        return encoder.above(inputs, weights.log_threshold.exp())

    def train(self, given: PassInputs, options: StepOptions) -> MainPass:
        log_threshold = given.weights.log_threshold
        assert log_threshold is not None
        if bool((log_threshold == -torch.inf).all()):
            smallest = _batch_codes(given, options.k).smallest
            log_threshold.copy_(torch.zeros(()) if smallest is None else smallest.log())
        kind = "target" if options.objective.sparsity_loss == "target" else "l0"
        return dense_pass(given, kind, options.k, options.sparsity_coef, options.objective.bandwidth)


@final
class ReLU(Variant):
    """All that are positive."""

    def encode(self, inputs: Tensor, weights: Weights, encoder: ReadyEncoder) -> SparseCodes:
        return encoder.above(inputs, inputs.new_zeros(()))

    def train(self, given: PassInputs, options: StepOptions) -> MainPass:
        return dense_pass(given, "l1", options.k, options.sparsity_coef, options.objective.bandwidth)


VARIANTS: dict[str, type[Variant]] = {v.__name__.lower(): v for v in (TopK, BatchTopK, Matryoshka, JumpReLU, ReLU)}
"""By the name in `SAEConfig.activation`."""


def variant_of(config: SAEConfig) -> Variant:
    return VARIANTS[config.activation](config)


def _encoder(given: PassInputs) -> ReadyEncoder:
    W_enc, b_enc = given.weights.W_enc, given.weights.b_enc
    return ReadyEncoder(given.kernels, W_enc, b_enc, product_dtype=given.product_dtype, tile_bytes=given.tile_bytes)


def _batch_codes(given: PassInputs, k: int) -> BatchCodes:
    return batch_codes(_encoder(given), given.inputs, k * given.n, given.ranks.rows)


def _only(codes: SparseCodes, mask: Tensor) -> SparseCodes:
    """The pairs for which `mask` [N, w] is true, closing the gaps: [N, w'], w' >= 1."""
    mask = mask & (codes.values > 0)
    width = max(1, int(mask.sum(dim=1).max())) if len(mask) else 1
    order = mask.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    values = codes.values.masked_fill(~mask, 0).gather(1, order)
    return SparseCodes(values, codes.indices.gather(1, order))
