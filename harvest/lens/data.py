"""The data that a lens is fitted on: the vectors of a table's tokens, at every layer, from a model or from a store.

How: the table's sequences are processed in batches, each one forward pass or one read. Each document has one `Role`:
most are fitted on, some choose the ridge penalty, and those that `train` holds out for validation, with the same seed
and share, are only measured on. A store lacks the first block's input, which the model computes at little cost.

Shapes: T tokens of the table, n tokens of a batch, L = n_layers, D = d_model. The vectors of a batch are L + 1 tensors
[n, D] in float32 on the model's device: the inputs of blocks 0 to L - 1, each the output of the block before it, and
the last block's output.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harvest.model.load import LoadedModel
from harvest.residual import EndOfPass, ResidualRecorder
from harvest.sequences import SequenceBatch, token_ids
from residscope.errors import IncompatibleError
from store.activations import ActivationStore
from store.arrays import TokenTable
from store.shuffle import permutation, validation_documents

_CHOOSE_FRACTION = 0.1
"""Share of the documents to fit on that are first used to choose the ridge penalty."""
_CHOOSE_STREAM, _MEASURE_STREAM = 1, 2
_MEASURE_SEQUENCES = 16
_BATCH_BYTES = 256 << 20


class Role(IntEnum):
    """What a token is used for."""

    MASKED = 0
    """Nothing: not kept."""
    FIT = 1
    """Fitting."""
    CHOOSE = 2
    """Choosing the ridge penalty, then fitting."""
    HELD_OUT = 3
    """Measuring only."""


Reader = Callable[[SequenceBatch], list[Tensor]]
"""The vectors of a batch."""


def roles(tokens: TokenTable, held_out_fraction: float, seed: int) -> np.ndarray:
    """The `Role` of each token, uint8 [T]. `IncompatibleError` if there are too few documents for all three roles."""
    n_documents = int(tokens.document.max()) + 1
    if n_documents < 3:
        raise IncompatibleError(
            f"a lens needs at least 3 documents (to fit on, to choose the penalty on, to measure on), found"
            f" {n_documents}: give more text, or text that is divided into documents (a .txt file is one)"
        )
    held_out = validation_documents(n_documents, held_out_fraction, seed)
    rest = np.flatnonzero(~held_out)
    n_choose = min(max(round(_CHOOSE_FRACTION * len(rest)), 1), len(rest) - 1)
    role = np.full(n_documents, Role.FIT, np.uint8)
    role[held_out] = Role.HELD_OUT
    role[rest[permutation(len(rest), seed, _CHOOSE_STREAM)[:n_choose]]] = Role.CHOOSE
    return np.where(tokens.keep, role[tokens.document], np.uint8(Role.MASKED))


def require_tokens(role: np.ndarray, d_model: int) -> None:
    """`IncompatibleError` if roles [T] leave too little for a regression, or nothing to choose or measure on."""
    for kind, least, what in (
        (Role.FIT, 2 * d_model, "to fit on"),
        (Role.CHOOSE, 1, "to choose the penalty on"),
        (Role.HELD_OUT, 1, "to measure on"),
    ):
        found = int((role == kind).sum())
        if found < least:
            reason = f"d_model {d_model} needs at least {least}; give more documents, or raise --max-tokens"
            raise IncompatibleError(f"too little text: {found} kept tokens {what}, {reason}")


def measured_tokens(position: np.ndarray, held_out: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Which of the held-out tokens (bool [T]) to measure on, bool [T]: `wanted` of them (or all), drawn at random, an
    equal number from each of 16 sequences if possible; from few sequences, because each must be run."""
    tokens = np.flatnonzero(held_out)
    tokens = tokens[permutation(len(tokens), seed, _MEASURE_STREAM)]
    sequence = np.cumsum(position == 0)[tokens]
    rank = np.empty(len(tokens), np.int64)  # Each token's rank within its sequence, in the random order.
    for number in np.unique(sequence):
        rank[sequence == number] = np.arange((sequence == number).sum())
    shuffled_sequence = permutation(int(sequence.max()) + 1, seed, _MEASURE_STREAM, 1)[sequence]
    share = -(-wanted // _MEASURE_SEQUENCES)
    found = np.zeros(len(position), bool)
    found[tokens[np.lexsort((shuffled_sequence, rank // share))[:wanted]]] = True
    return found


def tokens_in_batch(n_layers: int, d_model: int) -> int:
    """Number of tokens in a batch: their vectors take 256 MiB."""
    return max(_BATCH_BYTES // ((n_layers + 1) * d_model * 4), 1)


def model_reader(model: LoadedModel, token_id: np.ndarray, store: ActivationStore | None = None) -> Reader:
    """A reader that runs the model on token ids int32 [T]; with a store, which must have all layers, block outputs come
    from there, and the model only computes the first block's input."""
    recorder = ResidualRecorder(model)

    def read(batch: SequenceBatch) -> list[Tensor]:
        ids, first = torch.from_numpy(token_ids(token_id, batch)), list[Tensor]()

        def keep(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            """Take the first block's input, [B, N, D]; with a store, end the pass."""
            first.append(arguments[0] if arguments else keywords["hidden_states"])
            if store is not None:
                raise EndOfPass

        with model.blocks[0].register_forward_pre_hook(keep, with_kwargs=True):
            if store is None:
                outputs = recorder.record(ids)
            else:
                with torch.inference_mode(), suppress(EndOfPass):
                    model.base(input_ids=ids.to(model.device), use_cache=False)
                outputs = torch.from_numpy(store.read(slice(batch.start, batch.stop))).to(model.device).unbind(1)
        vectors = (v.reshape(-1, model.d_model).float() for v in (*first, *outputs))
        # Copies, because autograd cannot use tensors made in inference mode.
        return [v.clone() if v.is_inference() else v for v in vectors]

    return read


def shuffled(
    read: Reader, batches: list[SequenceBatch], chosen: np.ndarray, *, per_step: int, steps: int, seed: int, window: int
) -> Iterator[list[Tensor]]:
    """Vectors of `per_step` chosen tokens (bool [T]) for each of `steps` steps, in random order: batches are read in
    random order, their chosen tokens collected until there are `window`, then shuffled and yielded; what remains joins
    the next window. Starts over when the text ends."""
    pool: list[Tensor] = []
    served, epoch = 0, 0
    while served < steps:
        order = permutation(len(batches), seed, epoch)
        for number, index in enumerate(order.tolist()):
            vectors = chosen_vectors(read, batches[index], chosen)
            if vectors:
                pool = [torch.cat(pair) for pair in zip(pool, vectors, strict=True)] if pool else vectors
            n = len(pool[0]) if pool else 0
            if n < max(window, per_step) and (number + 1 < len(order) or n < per_step):
                continue
            mixed = torch.from_numpy(permutation(n, seed, epoch, number))
            pool = [v[mixed.to(v.device)] for v in pool]
            taken = 0
            while served < steps and taken + per_step <= n:
                yield [v[taken : taken + per_step] for v in pool]
                taken, served = taken + per_step, served + 1
            pool = [v[taken:].clone() for v in pool]
            if served == steps:
                return
        epoch += 1


def chosen_vectors(read: Reader, batch: SequenceBatch, chosen: np.ndarray) -> list[Tensor] | None:
    """The vectors of a batch's chosen tokens (bool [T]); None, without reading, if there are none."""
    rows = torch.from_numpy(np.flatnonzero(chosen[batch.start : batch.stop]))
    return [v[rows.to(v.device)] for v in read(batch)] if len(rows) else None
