"""What reconstruction errors cost the model: the residual stream is replaced at one layer, or at several at once
(`analysis.model.together`), and the rest of the model runs on it.

At layer l the output of block l is replaced by its reconstruction, by the layer's mean, or by zero, and the logits are
compared with those of the unmodified model, without autoencoder or lens:

    delta_ce = CE(replaced) - CE(true)                         nats per predicted token; 0 is perfect, lower is better
    kl = sum_v p_true log(p_true / p_replaced)                 nats per token; KL(true || replaced); lower is better
    loss_recovered = (CE(ablated) - CE(replaced)) / (CE(ablated) - CE(true))   1 is perfect, 0 as bad as ablation

all as means over tokens. *Replaced* are the kept tokens of a sequence; special tokens and position 0 are left alone,
because autoencoders are not trained on them. *Counted* are the kept tokens of the chosen documents that have a next
token in their sequence, which is what the model predicts there. The mean is over the store's kept tokens at the layer.

How: the model runs from a given block output (`analysis.model.continuation`); later layers of a group are replaced on
the way. Logits are computed from the last block's output, a tile of tokens at a time, in float32, so that memory does
not grow with tokens x vocabulary.

Shapes: B sequences, N positions, D d_model, V vocabulary, L layers, C conditions, G documents, n counted tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.model.continuation import Before, block_output, can_skip, changed, last_output
from analysis.model.downstream_numbers import Downstream
from analysis.model.sequences import SequenceBatch, batches_to_measure
from harvest.lens.translators import TunedLens
from harvest.model.checks import check_logits, check_model
from harvest.model.load import LoadedModel
from residscope.console import progress
from residscope.errors import IncompatibleError
from store.activations import ActivationStore
from train.model import MLSAE

Replace = Callable[[Tensor, int], Tensor]
"""replace(x [n, D] of kept tokens, in the model's own space and format, the model's block index) -> [n, D]"""

TILE_BYTES = 32 * 2**20
"""Bytes of the float32 logits of one tile; about six such arrays exist at once."""

KEPT_BYTES = 512 * 2**20
"""The true run's log probabilities of a batch are kept for all layers if they take at most this much."""

BATCH_TOKENS = 2048
"""Tokens in a forward pass; at least one sequence."""


def sae_reconstruction(sae: MLSAE, lens: TunedLens | None) -> Replace:
    """The autoencoder as a replacement: apply the store's lens, encode, decode, and invert the lens. sae: on the
    model's device."""

    def replace(x: Tensor, layer: int) -> Tensor:
        rows = sae.rows_of_layer(layer, len(x))
        if lens is None:
            return sae(x, rows).x_hat
        return lens.invert(sae(lens.apply(x, layer), rows).x_hat, layer)

    return replace


def measure_downstream(
    store: ActivationStore,
    model: LoadedModel,
    replace: Replace,
    *,
    lens: TunedLens | None,
    pca: Replace | None = None,
    layers: Sequence[int] | None = None,
    groups: Sequence[tuple[int, ...]] | None = None,
    n_lean: int = 0,
    counted: NDArray[np.bool_] | None = None,
    max_tokens: int = 16_384,
    batch_tokens: int = BATCH_TOKENS,
) -> Downstream:
    """Replace each of `layers` (the model's block indices; default the store's), one at a time, on the store's own
    sequences. With `groups` (each some of `layers`, ascending), replace all layers of a group at once, with one result
    for each group; the last `n_lean` groups by the reconstruction only. pca: used instead of zero ablation.

    lens: the store's (`analysis.model.transformer.lens_of_store`); the layers' means are mapped back through it.
    counted: bool [T], default all; only kept tokens with a next token count. max_tokens: most tokens to count, from
    sequences evenly spaced over the store. Raises `IncompatibleError` if the model or the lens is not the store's, if
    no token counts, or if the model's logits cannot be computed from its last block's output.
    """
    check_model(store, model, lens)
    chosen = tuple(store.meta.layers if layers is None else sorted(set(layers)))
    means = torch.from_numpy(store.statistics().mean[[store.meta.layers.index(layer) for layer in chosen]])  # [L, D]
    if lens is not None:  # The lens is affine, so it maps the mean to the mean.
        means = torch.stack([lens.invert(mean, layer) for mean, layer in zip(means, chosen, strict=True)])
    conditions: tuple[Replace, ...] = (  # in the order of `RECONSTRUCTED`, `MEAN`, `ZERO`
        replace,
        lambda x, layer: means[chosen.index(layer)].to(x).expand_as(x),
        pca or (lambda x, layer: torch.zeros_like(x)),
    )
    everything = np.ones(store.meta.n_tokens, bool)
    batches = batches_to_measure(store.tokens, everything if counted is None else counted, max_tokens, batch_tokens)
    if not batches:
        raise IncompatibleError(
            f"{store.path}: nothing to predict: no kept token of the chosen documents has a next token in its "
            "sequence; choose other documents, or harvest longer sequences"
        )
    check_logits(model, batches[0].input_ids)
    skip = can_skip(model, batches[0].input_ids)
    groups = [(layer,) for layer in chosen] if groups is None else groups
    name = "downstream" if max(map(len, groups)) == 1 else "several layers"
    with progress(name, "layers", len(batches) * len(groups)) as bar:
        many = [conditions if i < len(groups) - n_lean else conditions[:1] for i in range(len(groups))]
        parts = [_measure(model, batch, groups, many, skip, bar) for batch in batches]
    true_ce, ce, kl = (torch.cat(part, dim=-1).numpy() for part in zip(*parts, strict=True))
    documents, member = np.unique(np.concatenate([batch.document for batch in batches]), return_inverse=True)

    def sums(losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """[..., n] -> [..., G]"""
        rows = losses.reshape(-1, len(member))
        found = np.stack([np.bincount(member, row) for row in rows]).astype(np.float64)
        return found.reshape(*losses.shape[:-1], len(documents))

    return Downstream(
        layers=np.array([group[0] for group in groups], np.int64),
        documents=documents,
        n_tokens=np.bincount(member),
        true_ce=sums(true_ce),
        ce=sums(ce),
        kl=sums(kl),
    )


@torch.inference_mode()
def _measure(
    model: LoadedModel,
    batch: SequenceBatch,
    groups: Sequence[tuple[int, ...]],
    conditions: Sequence[Sequence[Replace]],
    skip: bool,
    bar: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """At a batch's counted tokens: cross-entropy [n] of the true run, and cross-entropy and KL [L, C, n] for each group
    and condition, float64; NaN for conditions that a group does not have."""
    kept, counted = batch.kept.to(model.device), batch.counted.to(model.device)
    target = batch.input_ids[:, 1:][batch.counted[:, :-1]].to(model.device)  # [n]
    true = last_output(model, batch.input_ids)[counted]  # [n, D]
    true_ce = torch.empty(len(target), dtype=torch.float64)
    ce = torch.full((len(groups), len(conditions[0]), len(target)), torch.nan, dtype=torch.float64)
    kl = ce.clone()
    known = TrueRun(model.logits, true)
    before: Before | None = None
    for i in sorted(range(len(groups)), key=lambda i: groups[i][0]):
        first, *others = groups[i]
        if before is None or before.layer != first:
            before = block_output(model, batch.input_ids, first, before if skip else None)
        replaced = []
        for condition in conditions[i]:

            def change(output: Any, layer: int, c: Replace = condition) -> Any:
                return with_residual(output, lambda x: c(x, layer), kept)

            with changed(model, others, change):
                start = Before(first, change(before.output, first))
                replaced.append(last_output(model, batch.input_ids, start, skip=skip)[counted])
        true_ce[:], ce[i, : len(replaced)], kl[i, : len(replaced)] = compare(known, replaced, target)
        bar.update()
    return true_ce, ce, kl


def with_residual(output: Any, replace: Callable[[Tensor], Tensor], kept: Tensor) -> Any:
    """A copy of a block's output with its residual stream [B, N, D] replaced where `kept` [B, N]."""
    residual = output[0] if isinstance(output, tuple | list) else output
    changed = residual.clone()
    changed[kept] = replace(residual[kept]).to(residual.dtype)
    return type(output)([changed, *output[1:]]) if isinstance(output, tuple | list) else changed


class TrueRun:
    """The last block's outputs [n, D] of the unmodified model, and its log probabilities, a tile of tokens at a time.
    These are kept if they are few, because every layer is compared with them."""

    def __init__(self, logits: Callable[[Tensor], Tensor], true: Tensor) -> None:
        self.logits = logits
        vocabulary = logits(true[:1]).shape[-1]
        self.rows = max(1, TILE_BYTES // (4 * vocabulary))
        self._true = true
        self._kept: dict[int, Tensor] | None = {} if 4 * vocabulary * len(true) <= KEPT_BYTES else None

    def log_probabilities(self, start: int) -> Tensor:
        """[rows, V] for the tile that begins at token `start`."""
        if self._kept is not None and start in self._kept:
            return self._kept[start]
        found = self.logits(self._true[start : start + self.rows]).float().log_softmax(dim=-1)
        if self._kept is not None:
            self._kept[start] = found
        return found


def compare(known: TrueRun, replaced: Sequence[Tensor], target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy [n] of the true run, and cross-entropy [C, n] and KL(true || replaced) [C, n] of each replaced one;
    in nats, float64 on the CPU.

    replaced: the last block's outputs, each [n, D]. target: int64 [n].
    """
    n, size = len(target), (len(replaced), len(target))
    true_ce = torch.empty(n, dtype=torch.float64)
    ce, kl = torch.empty(size, dtype=torch.float64), torch.empty(size, dtype=torch.float64)
    for start in range(0, n, known.rows):
        tile = slice(start, start + known.rows)
        wanted = target[tile, None]
        log_p = known.log_probabilities(start)  # [rows, V]
        p = log_p.exp()
        true_ce[tile] = -log_p.gather(-1, wanted)[:, 0].double().cpu()
        for i, other in enumerate(replaced):
            log_q = known.logits(other[tile]).float().log_softmax(dim=-1)
            ce[i, tile] = -log_q.gather(-1, wanted)[:, 0].double().cpu()
            kl[i, tile] = torch.sub(log_p, log_q, out=log_q).mul_(p).sum(dim=-1).double().cpu()
    return true_ce, ce, kl
