"""The maximally activating examples of every latent at every layer, with their context.

How: one pass over the sparse codes keeps, per latent and layer, the n most active tokens, of different documents as far
as there are so many; what is kept does not depend on how tokens are grouped, so parts merge in any way. A second pass
reads the codes of the windows' tokens, for the latent's activation at each of them. A window is the tokens around an
example that the model saw together: of the same document and the same sequence. Text comes whole, with no character cut
(`analysis.token_text`). Not here: encoding (`analysis.latents`), and what a latent does to the output
(`analysis.latent_logits`).

Memory: 12 bytes for each of M * L * n examples while they are sought, about 4 W more for each that was found, and the
text around each token that is among them; all bounded by the number of examples, not of tokens.

Shapes: T tokens, L layers, k active latents a vector, M n_latents, n examples per latent and layer, R examples found, W
tokens of a window.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from analysis import compiled_examples
from analysis.latents import CodeTile, Encoder
from analysis.measure import tiles
from analysis.sequences import sequence_bounds
from analysis.token_text import TokenBytes, continues_character, texts_of
from store.activations import ActivationStore
from store.arrays import TokenTable

PER_LAYER = 3
"""Examples of each latent at each layer."""

MAX_EXAMPLES = 2**20
"""With so many latents and layers that there would be more, fewer are kept of each, at least one."""

REACH = 12
"""Tokens before and after an example in its window."""

_ROWS_AT_ONCE = 2**15
"""Rows made and written together."""

COLUMNS = pa.schema(
    [
        ("latent", pa.int64()),
        ("layer", pa.int64()),
        ("rank", pa.int64()),
        ("activation", pa.float32()),
        ("document", pa.int64()),
        ("token", pa.int64()),
        ("text_before", pa.string()),
        ("text_token", pa.string()),
        ("text_after", pa.string()),
        ("marked", pa.int64()),
        ("texts", pa.list_(pa.string())),
        ("activations", pa.list_(pa.float32())),
    ]
)
"""examples.parquet: sorted by latent, layer and rank; layer as the model counts, rank 0 the most active, token its
place in the store. texts and activations: of each token of the window, `marked` being the example's place among them;
an activation is null where the token was not analysed."""


CodesOf = Callable[[NDArray[np.bool_]], Iterable[CodeTile]]
"""codes(needed [tokens of the store]) -> their codes, in order."""


@dataclass(frozen=True, kw_only=True)
class TopExamples:
    """The most active tokens of each latent at each layer, in no order."""

    activation: NDArray[np.float32]
    """[M, L, n]"""

    token: NDArray[np.int32]
    """[M, L, n] place in the store, -1 where there is none."""

    document: NDArray[np.int32]
    """[M, L, n]"""

    @classmethod
    def zeros(cls, n_latents: int, n_layers: int, n: int) -> "TopExamples":
        """None yet."""
        shape = (n_latents, n_layers, n)
        return cls(
            activation=np.zeros(shape, np.float32),
            token=np.full(shape, -1, np.int32),
            document=np.zeros(shape, np.int32),
        )

    def add(self, codes: CodeTile, document: NDArray[np.integer]) -> None:
        """Offer tokens, in place; document: [T] theirs. A token must be offered once."""
        compiled_examples.insert(
            np.ascontiguousarray(codes.values),
            np.ascontiguousarray(codes.indices),
            codes.token,
            document.astype(np.int64),
            self.activation,
            self.token,
            self.document,
        )

    @staticmethod
    def merged(parts: Sequence["TopExamples"]) -> "TopExamples":
        """The examples of all tokens of `parts`, whatever the grouping."""
        first, *others = parts
        total = TopExamples(
            activation=first.activation.copy(), token=first.token.copy(), document=first.document.copy()
        )
        for part in others:
            compiled_examples.insert_examples(
                part.activation, part.token, part.document, total.activation, total.token, total.document
            )
        return total

    def found(self) -> "Examples":
        """What is there, sorted by latent, layer and rank: by activation, then by token."""
        latent, layer, place = np.nonzero(self.token >= 0)
        activation, token = self.activation[latent, layer, place], self.token[latent, layer, place]
        order = np.lexsort((token, -activation, layer, latent))
        latent, layer = latent[order], layer[order]
        first = np.flatnonzero(np.r_[True, (latent[1:] != latent[:-1]) | (layer[1:] != layer[:-1])][: len(order)])
        rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
        return Examples(
            latent=latent,
            layer=layer,
            rank=rank,
            activation=activation[order],
            token=token[order].astype(np.int64),
            document=self.document[self.token >= 0][order].astype(np.int64),
        )


class Examples(NamedTuple):
    """A table of examples."""

    latent: NDArray[np.int64]
    """[R]"""

    layer: NDArray[np.int64]
    """[R] index into the analysed layers."""

    rank: NDArray[np.int64]
    """[R] 0 is the most active of its latent and layer."""

    activation: NDArray[np.float32]
    """[R]"""

    token: NDArray[np.int64]
    """[R] place in the store."""

    document: NDArray[np.int64]
    """[R]"""


def examples_per_layer(n_latents: int, n_layers: int) -> int:
    """How many are kept of each latent at each layer: `PER_LAYER`, or fewer where that would be above
    `MAX_EXAMPLES`."""
    return max(1, min(PER_LAYER, MAX_EXAMPLES // (n_latents * n_layers)))


def code_tiles(
    store: ActivationStore, encoder: Encoder, layers: tuple[int, ...], needed: NDArray[np.bool_]
) -> Iterator[CodeTile]:
    """The codes of the needed tokens [tokens of the store] at `layers` (indices into the store's), encoded anew."""
    for token, x in tiles(store, layers, range(store.meta.n_shards), needed):
        vectors = encoder.standardize(torch.from_numpy(x).view(-1, x.shape[-1]))
        codes = encoder.decode(encoder.encode(vectors), vectors, len(layers))
        yield CodeTile(token, codes.values.numpy(), codes.indices.numpy())


def write_examples(
    path: Path,
    tokens: TokenTable,
    tokenizer: Any,
    codes: CodesOf,
    analysed: NDArray[np.bool_],
    *,
    layer_numbers: Sequence[int],
    n_latents: int,
    n: int | None = None,
) -> int:
    """Seek the examples among the analysed tokens [tokens of the store] and write examples.parquet; the number of rows.

    layer_numbers: [L] the model's block indices of the codes' layers. n: examples per latent and layer, default
    `examples_per_layer`. `codes` is called twice.
    """
    top = TopExamples.zeros(n_latents, len(layer_numbers), n or examples_per_layer(n_latents, len(layer_numbers)))
    for tile in codes(analysed):
        top.add(tile, tokens.document[tile.token])
    return write_found(path, top.found(), tokens, tokenizer, codes, analysed, layer_numbers)


def write_found(
    path: Path,
    found: Examples,
    tokens: TokenTable,
    tokenizer: Any,
    codes: CodesOf,
    analysed: NDArray[np.bool_],
    layer_numbers: Sequence[int],
) -> int:
    """Write examples.parquet of examples that were found; the number of rows. As `write_examples`."""
    start, stop = window_bounds(tokens, found.token)
    activations = window_activations(found, start, stop, codes, analysed)
    shown, place = np.unique(found.token, return_inverse=True)
    contexts = list(contexts_of(tokens, tokenizer, shown))
    numbers = np.asarray(layer_numbers, np.int64)
    with pq.ParquetWriter(path, COLUMNS, compression="zstd") as writer:
        for low in range(0, len(found.latent), _ROWS_AT_ONCE):
            rows = slice(low, low + _ROWS_AT_ONCE)
            context = [contexts[i] for i in place[rows]]
            inside = np.arange(activations.shape[1]) < (stop - start)[rows, None]
            values = activations[rows][inside]
            offsets = np.concatenate([[0], np.cumsum(inside.sum(axis=1))]).astype(np.int32)
            columns = [
                found.latent[rows],
                numbers[found.layer[rows]],
                found.rank[rows],
                found.activation[rows],
                found.document[rows],
                found.token[rows],
                [c.before for c in context],
                [c.token for c in context],
                [c.after for c in context],
                (found.token - start)[rows],
                [c.texts for c in context],
                pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, mask=np.isnan(values))),
            ]
            writer.write_table(pa.table(dict(zip(COLUMNS.names, columns, strict=True)), schema=COLUMNS))
    return len(found.latent)


def window_bounds(
    tokens: TokenTable, token: NDArray[np.int64], reach: int = REACH
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First token of the window of each of `token` [R], and one past its last: `reach` tokens on both sides, of the
    same document and the same sequence."""
    starts, _ = sequence_bounds(tokens.position)
    starts = np.union1d(starts, np.flatnonzero(np.diff(tokens.document)) + 1)
    run = np.searchsorted(starts, token, side="right") - 1
    stops = np.append(starts[1:], len(tokens.document))
    return np.maximum(token - reach, starts[run]), np.minimum(token + reach + 1, stops[run])


def window_activations(
    found: Examples,
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    codes: CodesOf,
    analysed: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """[R, W] activation of each example's latent, at its layer, at the tokens of its window [start, stop); NaN beyond,
    and where a token was not analysed."""
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
        # Sorted by token, windows begin and end in order too.
        rows = slice(np.searchsorted(high, first, side="right"), np.searchsorted(low, last, side="right"))
        compiled_examples.fill_windows(
            np.ascontiguousarray(tile.values),
            np.ascontiguousarray(tile.indices),
            first,
            row_of_token,
            latent[rows],
            layer[rows],
            low[rows],
            high[rows],
            out[rows],
        )
    activations = np.empty_like(out)
    activations[order] = out
    return activations


class Context(NamedTuple):
    """The text around a token."""

    before: str
    """Text of the window before the token."""

    token: str
    """The token's text; of a token that only continues a character, that whole character."""

    after: str
    """Text of the window after it."""

    texts: list[str]
    """Text of each token of the window; empty for one that only continues a character."""


def contexts_of(tokens: TokenTable, tokenizer: Any, token: NDArray[np.int64]) -> Iterator[Context]:
    """The context of each of `token` [R], ascending places in the store, a document at a time."""
    token_bytes = TokenBytes(tokenizer)
    start, stop = window_bounds(tokens, token)
    documents = np.append(np.flatnonzero(np.diff(tokens.document, prepend=-1)), len(tokens.document))
    for first, last in pairwise(documents):
        here = slice(np.searchsorted(token, first), np.searchsorted(token, last))
        if here.start == here.stop:
            continue
        data = token_bytes.get(tokens.token_id[first:last])
        texts = texts_of(data)
        for t, low, high in zip(token[here] - first, start[here] - first, stop[here] - first, strict=True):
            owner = t
            while owner > 0 and continues_character(data[owner]):
                owner -= 1
            before, shown = "".join(texts[low:owner]), texts[t]
            if owner < t and texts[owner]:
                shown = texts[owner][-1]
                before += texts[owner][:-1] if owner >= low else ""
            yield Context(before, shown, "".join(texts[t + 1 : high]), texts[low:high])
