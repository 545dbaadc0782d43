"""The maximally activating examples of every latent at every layer, with their context.

How: one pass over the sparse codes keeps the n most active tokens of each latent and layer, from different documents if
there are enough. What is kept does not depend on how tokens are grouped, so parts can be merged in any way. A second
pass reads the codes of the windows' tokens, for the latent's activation at each of them. In examples.parquet no
character is cut, and each token's text is made only once; without a tokenizer, token ids are written instead.

Memory: 12 bytes for each of M * L * n examples during the search, and about 4 W more for each that was found; bounded
by the number of examples, not of tokens.

Shapes: T tokens, L layers, k active latents a vector, M n_latents, n examples per latent and layer, R examples found, W
tokens of a window.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.loops import compiled
from analysis.model.sequences import sequence_bounds
from analysis.results.tables import CHECKED
from analysis.tiles import CodeTile
from harvest.model.tokenizer import PARTIAL, Tokenizer
from store.arrays import TokenTable

PER_LAYER = 3
"""Examples of each latent at each layer."""

MAX_EXAMPLES = 2**20
"""Most examples in all: with many latents and layers, fewer than `PER_LAYER` are kept, but at least one."""

REACH = 12
"""Tokens before and after an example in its window."""

CodesOf = Callable[[NDArray[np.bool_]], Iterable[CodeTile]]
"""codes(needed, bool [tokens of the store]) -> the codes of these tokens, in order."""


@dataclass(frozen=True, kw_only=True)
class TopExamples:
    """The most active tokens of each latent at each layer, unsorted; each array [M, L, n]."""

    activation: NDArray[np.float32]
    token: NDArray[np.int64]
    """Position in the store; -1 for an empty place."""
    document: NDArray[np.int32]

    @classmethod
    def zeros(cls, n_latents: int, n_layers: int, n: int) -> "TopExamples":
        none = np.zeros((n_latents, n_layers, n), np.int32)
        return cls(activation=none.astype(np.float32), token=none.astype(np.int64) - 1, document=none)

    def add(self, codes: CodeTile, document: NDArray[np.integer]) -> None:
        """Take more tokens into account, in place; each token only once. document: [T], their documents."""
        values, indices = np.ascontiguousarray(codes.values), np.ascontiguousarray(codes.indices)
        best = (self.activation, self.token, self.document)
        _insert(values, indices, codes.token, document.astype(np.int64), *best)

    def found(self) -> "Examples":
        """The examples, sorted by latent, layer and rank (by activation, then by token)."""
        latent, layer, place = np.nonzero(self.token >= 0)
        activation, token = self.activation[latent, layer, place], self.token[latent, layer, place]
        order = np.lexsort((token, -activation, layer, latent))
        latent, layer = latent[order], layer[order]
        first = np.flatnonzero(np.r_[True, (latent[1:] != latent[:-1]) | (layer[1:] != layer[:-1])][: len(order)])
        rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
        document = self.document[self.token >= 0]
        token, document = (column[order].astype(np.int64) for column in (token, document))
        return Examples(latent, layer, rank, activation[order], token, document)


class Examples(NamedTuple):
    """A table of examples, each column [R]."""

    latent: NDArray[np.int64]
    layer: NDArray[np.int64]
    """Index into the analysed layers."""
    rank: NDArray[np.int64]
    """0 for the most active of its latent and layer."""
    activation: NDArray[np.float32]
    token: NDArray[np.int64]
    """Position in the store."""
    document: NDArray[np.int64]


class Windows(NamedTuple):
    """The tokens around each of R examples."""

    start: NDArray[np.int64]  # [R]
    stop: NDArray[np.int64]  # [R] one past the last token
    activations: NDArray[np.float32]  # [R, W] of its latent and layer; NaN outside and for tokens not analysed

    def rows(self, some: slice) -> "Windows":
        """The windows of some examples."""
        return Windows(self.start[some], self.stop[some], self.activations[some])


def examples_per_layer(n_latents: int, n_layers: int) -> int:
    """How many examples of each latent are kept at each layer."""
    return max(1, min(PER_LAYER, MAX_EXAMPLES // (n_latents * n_layers)))


def window_bounds(tokens: TokenTable, token: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The window [start, stop) of each of `token` [R]: `REACH` tokens on both sides, in its document and sequence."""
    starts, _ = sequence_bounds(tokens.position)
    starts = np.union1d(starts, np.flatnonzero(np.diff(tokens.document)) + 1)
    run = np.searchsorted(starts, token, side="right") - 1
    stops = np.append(starts[1:], len(tokens.document))
    return np.maximum(token - REACH, starts[run]), np.minimum(token + REACH + 1, stops[run])


def windows_of(found: Examples, tokens: TokenTable, codes: CodesOf, analysed: NDArray[np.bool_]) -> Windows:
    """The windows of examples among the analysed tokens [tokens of the store]; `codes` is called once."""
    start, stop = window_bounds(tokens, found.token)
    order = np.argsort(found.token, kind="stable")
    width = int((stop - start).max(initial=0))
    out = np.full((len(order), width), np.nan, np.float32)
    edges = np.bincount(start, minlength=len(analysed) + 1) - np.bincount(stop, minlength=len(analysed) + 1)
    needed = analysed & (np.cumsum(edges)[: len(analysed)] > 0)
    latent, layer, low, high = (column[order] for column in (found.latent, found.layer, start, stop))
    for tile in codes(needed):
        first, last = int(tile.token[0]), int(tile.token[-1])
        row_of_token = np.full(last + 1 - first, -1, np.int64)
        row_of_token[tile.token - first] = np.arange(len(tile.token))
        # Because tokens are sorted, so are the windows' starts and ends.
        rows = slice(np.searchsorted(high, first, side="right"), np.searchsorted(low, last, side="right"))
        values, indices = np.ascontiguousarray(tile.values), np.ascontiguousarray(tile.indices)
        examples = (latent[rows], layer[rows], low[rows], high[rows], out[rows])
        _fill_windows(values, indices, first, row_of_token, *examples)
    activations = np.empty_like(out)
    activations[order] = out
    return Windows(start, stop, activations)


@compiled()
def _insert(values, indices, token, document, best, best_token, best_document):
    """Take the positive activations of T tokens into the examples of their (latent, layer).

    values float32 or float64 [T, L, k]; indices int64 [T, L, k]; token, document int64 [T]. Changed in place: best
    float32, best_token int64 (-1: none), best_document int32, each [M, L, n].
    """
    n_tokens, n_layers, k = values.shape
    floor = np.empty(best.shape[:2], np.float32)  # most activations are below it, and need only this comparison
    for j in range(len(best)):
        for layer in range(n_layers):
            floor[j, layer] = _floor(best[j, layer], best_token[j, layer], best_document[j, layer])
    for t in range(n_tokens):
        for layer in range(n_layers):
            for i in range(k):
                value = np.float32(values[t, layer, i])
                j = indices[t, layer, i]
                if value > 0 and value >= floor[j, layer]:
                    _offer(best[j, layer], best_token[j, layer], best_document[j, layer], value, token[t], document[t])
                    floor[j, layer] = _floor(best[j, layer], best_token[j, layer], best_document[j, layer])


@compiled()
def _floor(best, best_token, best_document):
    """Values below this are not kept: the smallest one kept, once there are n from different documents."""
    n = len(best)
    least = best[0]
    for i in range(n):
        if best_token[i] < 0:
            return np.float32(0)
        least = min(least, best[i])
        for other in range(i):
            if best_document[i] == best_document[other]:
                return np.float32(0)
    return least


@compiled()
def _offer(best, best_token, best_document, value, token, document):
    """Keep n of the n kept and a new one, in this order: the best of each document first, then the more active, then
    the earlier ones."""
    n = len(best)
    for i in range(n):
        if best_token[i] < 0:
            best[i], best_token[i], best_document[i] = value, token, document
            return
    last = n  # n stands for the new one
    last_value, last_token, last_again = value, token, False
    for i in range(n):
        if best_document[i] == document and (best[i] > value or (best[i] == value and best_token[i] < token)):
            last_again = True
    for i in range(n):
        again = best_document[i] == document and (value > best[i] or (value == best[i] and token < best_token[i]))
        for other in range(n):
            if best_document[other] == best_document[i] and (
                best[other] > best[i] or (best[other] == best[i] and best_token[other] < best_token[i])
            ):
                again = True
        if again != last_again:
            later = again
        else:
            later = best[i] < last_value or (best[i] == last_value and best_token[i] > last_token)
        if later:
            last, last_value, last_token, last_again = i, best[i], best_token[i], again
    if last < n:
        best[last], best_token[last], best_document[last] = value, token, document


@compiled()
def _fill_windows(values, indices, first, row_of_token, latent, layer, start, stop, out):
    """Write the activations of the examples' latents at those tokens of their windows that are in this tile.

    values [T, L, k], indices int64 [T, L, k]; row_of_token int64: row of token first + i, or -1. latent, layer (an
    index into L), start, stop: int64 [R]. Written in place: out float32 [R, W], token start + i in column i.
    """
    k = values.shape[2]
    end = first + len(row_of_token)
    for r in range(len(latent)):
        for token in range(max(start[r], first), min(stop[r], end)):
            row = row_of_token[token - first]
            if row >= 0:
                found = np.float32(0)
                for i in range(k):
                    # Empty places have index 0.
                    if indices[row, layer[r], i] == latent[r] and values[row, layer[r], i] > 0:
                        found = np.float32(values[row, layer[r], i])
                out[r, token - start[r]] = found


_ROWS_AT_ONCE = 2**16
"""Rows written at once."""

COLUMNS = pa.schema(
    [
        *((name, pa.int64()) for name in ("latent", "layer", "rank")),
        ("activation", pa.float32()),
        *((name, pa.int64()) for name in ("document", "token")),
        *((name, pa.string()) for name in ("text_before", "text_token", "text_after")),
        ("marked", pa.int64()),
        ("texts", pa.list_(pa.string())),
        ("activations", pa.list_(pa.float32())),
    ]
)
"""Sorted by latent, layer and rank. layer: the model's block index; rank 0: the most active; token: its position in the
store. texts, activations: of each token of the window, in which the example is at index `marked`; an activation is null
if the token was not analysed."""


class Contexts(NamedTuple):
    """The texts of some tokens and around them."""

    place: NDArray[np.int64]
    """The tokens' positions in the store, ascending."""
    before: pa.StringArray
    """Text of the window before the token."""
    token: pa.StringArray
    """Its text; if it only continues a character, that whole character."""
    after: pa.StringArray
    """Text of the window after the token."""
    texts: pa.StringArray
    """For each token of the store, its text if it is in a window, else null; empty if it only continues a character."""


def write_found(
    path: Path,
    found: Examples,
    windows: Windows,
    contexts: Contexts,
    kind: str,
    layer_numbers: Sequence[int],
) -> int:
    """Write examples.parquet; returns its number of rows. contexts: for all tokens of `found`. kind: "tokens", or "ids"
    if there are ids in place of texts. layer_numbers: [L] the model's block indices of the codes' layers."""
    start, stop, activations = windows
    place, numbers = np.searchsorted(contexts.place, found.token), np.asarray(layer_numbers, np.int64)
    with pq.ParquetWriter(path, COLUMNS.with_metadata({"texts": kind}), **CHECKED) as writer:
        for low in range(0, len(found.latent), _ROWS_AT_ONCE):
            rows = slice(low, low + _ROWS_AT_ONCE)
            inside = np.arange(activations.shape[1]) < (stop - start)[rows, None]  # [rows, W]
            values = activations[rows][inside]
            at = (start[rows, None] + np.arange(activations.shape[1]))[inside]
            offsets = pa.array(np.concatenate([[0], np.cumsum(inside.sum(axis=1))]).astype(np.int32))
            of_row = pa.array(place[rows])
            columns = [
                found.latent[rows],
                numbers[found.layer[rows]],
                found.rank[rows],
                found.activation[rows],
                found.document[rows],
                found.token[rows],
                contexts.before.take(of_row),
                contexts.token.take(of_row),
                contexts.after.take(of_row),
                (found.token - start)[rows],
                pa.ListArray.from_arrays(offsets, contexts.texts.take(pa.array(at))),
                pa.ListArray.from_arrays(offsets, pa.array(values, mask=np.isnan(values))),
            ]
            writer.write_table(pa.table(dict(zip(COLUMNS.names, columns, strict=True)), schema=writer.schema))
    return len(found.latent)


def contexts_of(tokens: TokenTable, tokenizer: Tokenizer | None, token: NDArray[np.int64]) -> Contexts:
    """The contexts of `token` [R], ascending positions in the store; computed a document at a time."""
    all_texts, rows = np.full(len(tokens.token_id), None, object), []
    start, stop = window_bounds(tokens, token)
    documents = np.append(np.flatnonzero(np.diff(tokens.document, prepend=-1)), len(tokens.document))
    for first, last in pairwise(documents):
        here = slice(np.searchsorted(token, first), np.searchsorted(token, last))
        if here.start == here.stop:
            continue
        ids = tokens.token_id[first:last].tolist()
        texts = [f" {i}" for i in ids] if tokenizer is None else tokenizer.texts(ids)
        all_texts[first:last] = texts
        for t, low, high in zip(token[here] - first, start[here] - first, stop[here] - first, strict=True):
            owner = t
            while tokenizer and owner > 0 and not texts[owner] and PARTIAL in tokenizer.text([ids[owner]])[0]:
                owner -= 1
            before, shown = "".join(texts[low:owner]), texts[t]
            if owner < t and texts[owner]:
                shown = texts[owner][-1]
                before += texts[owner][:-1] if owner >= low else ""
            elif tokenizer and not shown:  # the space that the tokenizer puts in front of a text
                shown = tokenizer.text([ids[t]])[0]
            rows.append((before, shown, "".join(texts[t + 1 : high])))
    before, shown, after = (pa.array([row[i] for row in rows], pa.string()) for i in range(3))
    return Contexts(token, before, shown, after, pa.array(all_texts, pa.string()))
