"""What a lens is fitted on: the vectors of the tokens of a table, at every layer, from a model or from a store.

How: the table's sequences are grouped into spans of equal lengths (`spans`), each one forward pass or one read. Whole
documents have one part each (`Part`): most are fitted on, some choose the ridge penalty, and those that `train` holds
out for validation, with the same seed and share, are only measured on. A store does not hold what enters the first
block, which the model gives for next to nothing. What it does not do: fit, or measure.

Shapes: T tokens of the table, n tokens of a span, L = n_layers, D = d_model. The vectors of a span are L + 1 tensors
[n, D] in float32 on the model's device: the inputs of blocks 0 to L - 1, each the output of the block before it, and
the last block's output.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harvest.model.load import LoadedModel
from harvest.residual import ResidualRecorder
from residscope.errors import IncompatibleError
from store.activations import ActivationStore
from store.arrays import TokenTable
from store.shuffle import permutation, validation_documents

CHOOSE_FRACTION = 0.1
"""Share of the documents to fit on that choose the ridge penalty first."""
_CHOOSE_STREAM, _MEASURE_STREAM = 1, 2
_MEASURE_SEQUENCES = 16
_SPAN_BYTES = 256 << 20


class Part(IntEnum):
    """What a token is for."""

    MASKED = 0
    """Nothing: not kept."""
    FIT = 1
    """To fit on."""
    CHOOSE = 2
    """To choose the ridge penalty on, then to fit on."""
    HELD_OUT = 3
    """To measure on."""


class Span(NamedTuple):
    """Neighbouring sequences of one length."""

    start: int
    """First token."""
    stop: int
    """One past the last token."""
    length: int
    """Tokens in each sequence."""


Reader = Callable[[Span], list[Tensor]]
"""The vectors of a span."""


def parts(tokens: TokenTable, held_out_fraction: float, seed: int) -> np.ndarray:
    """The `Part` of each token, uint8 [T]. `IncompatibleError` where there are too few documents for all three."""
    n_documents = int(tokens.document.max()) + 1
    if n_documents < 3:
        raise IncompatibleError(
            f"a lens needs at least 3 documents (to fit on, to choose the penalty on, to measure on), found"
            f" {n_documents}: give more text, or text that is cut into documents (a .txt file is one)"
        )
    held_out = validation_documents(n_documents, held_out_fraction, seed)
    rest = np.flatnonzero(~held_out)
    n_choose = min(max(round(CHOOSE_FRACTION * len(rest)), 1), len(rest) - 1)
    part = np.full(n_documents, Part.FIT, np.uint8)
    part[held_out] = Part.HELD_OUT
    part[rest[permutation(len(rest), seed, _CHOOSE_STREAM)[:n_choose]]] = Part.CHOOSE
    return np.where(tokens.keep, part[tokens.document], np.uint8(Part.MASKED))


def spans(position: np.ndarray, max_tokens: int) -> list[Span]:
    """All sequences of a table, in order: as many neighbours of one length as `max_tokens` hold, at least one, go
    together. position: [T], 0 where a sequence begins."""
    starts = np.flatnonzero(position == 0).tolist()
    found: list[Span] = []
    for start, stop in zip(starts, [*starts[1:], len(position)], strict=True):
        length = stop - start
        last = found[-1] if found else None
        if last and last.length == length and stop - last.start <= max_tokens:
            found[-1] = Span(last.start, stop, length)
        else:
            found.append(Span(start, stop, length))
    return found


def measured_tokens(position: np.ndarray, held_out: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Which of the held-out tokens (bool [T]) to measure on, bool [T]: `wanted` of them or all, drawn at random, an
    equal number from each of 16 sequences as far as there are so many; few sequences, so that few must be run."""
    tokens = np.flatnonzero(held_out)
    tokens = tokens[permutation(len(tokens), seed, _MEASURE_STREAM)]
    sequence = np.cumsum(position == 0)[tokens]
    rank = np.empty(len(tokens), np.int64)  # Of each token among those of its sequence, in the random order.
    for one in np.unique(sequence):
        rank[sequence == one] = np.arange((sequence == one).sum())
    shuffled_sequence = permutation(int(sequence.max()) + 1, seed, _MEASURE_STREAM, 1)[sequence]
    share = -(-wanted // _MEASURE_SEQUENCES)
    found = np.zeros(len(position), bool)
    found[tokens[np.lexsort((shuffled_sequence, rank // share))[:wanted]]] = True
    return found


def span_tokens(n_layers: int, d_model: int) -> int:
    """Tokens of a span whose vectors take 256 MiB."""
    return max(_SPAN_BYTES // ((n_layers + 1) * d_model * 4), 1)


def model_reader(model: LoadedModel, token_id: np.ndarray) -> Reader:
    """Reads by running the model on token ids int32 [T]."""
    recorder = ResidualRecorder(model)

    def read(span: Span) -> list[Tensor]:
        first: list[Tensor] = []
        with _first_input(model, first):
            outputs = recorder.record(_ids(token_id, span))
        # Copies, because tensors made in inference mode take no part in autograd.
        return [vectors.reshape(-1, model.d_model).float().clone() for vectors in (*first, *outputs)]

    return read


def store_reader(store: ActivationStore, model: LoadedModel) -> Reader:
    """Reads block outputs from a store of all layers, and has the model give what enters the first block."""

    def read(span: Span) -> list[Tensor]:
        first: list[Tensor] = []
        with _first_input(model, first, stop=True), torch.inference_mode(), suppress(_Enough):
            model.base(input_ids=_ids(store.tokens.token_id, span).to(model.device), use_cache=False)
        stored = torch.from_numpy(store.read(slice(span.start, span.stop)))  # [n, L, D]
        outputs = [stored[:, layer].to(model.device) for layer in range(model.n_layers)]
        return [first[0].reshape(-1, model.d_model).float().clone(), *outputs]

    return read


def shuffled(
    read: Reader, all_spans: list[Span], chosen: np.ndarray, *, batch: int, steps: int, seed: int, window: int
) -> Iterator[list[Tensor]]:
    """`steps` batches of `batch` chosen tokens in random order: spans in a random order, their chosen tokens (bool
    [T]) gathered until there are `window`, those mixed and handed out; what is left joins the next window. Begins
    again when the text ends."""
    pool: list[Tensor] = []
    served, epoch = 0, 0
    while served < steps:
        order = permutation(len(all_spans), seed, epoch)
        for number, index in enumerate(order.tolist()):
            span = all_spans[index]
            rows = torch.from_numpy(np.flatnonzero(chosen[span.start : span.stop]))
            if len(rows):
                vectors = [v[rows.to(v.device)] for v in read(span)]
                pool = [torch.cat(pair) for pair in zip(pool, vectors, strict=True)] if pool else vectors
            n = len(pool[0]) if pool else 0
            if n < max(window, batch) and (number + 1 < len(order) or n < batch):
                continue
            mixed = torch.from_numpy(permutation(n, seed, epoch, number))
            pool = [v[mixed.to(v.device)] for v in pool]
            taken = 0
            while served < steps and taken + batch <= n:
                yield [v[taken : taken + batch] for v in pool]
                taken, served = taken + batch, served + 1
            pool = [v[taken:].clone() for v in pool]
            if served == steps:
                return
        epoch += 1


@contextmanager
def _first_input(model: LoadedModel, found: list[Tensor], *, stop: bool = False) -> Iterator[None]:
    """While this lasts, a forward pass puts what enters the first block, [B, N, D], into `found`; with `stop` it then
    ends by `_Enough`."""

    def hook(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(arguments[0] if arguments else keywords["hidden_states"])
        if stop:
            raise _Enough

    handle = model.blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Enough(BaseException):
    """Ends a forward pass whose rest nobody needs; no Exception, so that no model code swallows it."""


def _ids(token_id: np.ndarray, span: Span) -> Tensor:
    return torch.from_numpy(token_id[span.start : span.stop].astype(np.int64)).view(-1, span.length)
