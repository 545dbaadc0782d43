"""examples.parquet: the maximally activating examples as text, each with the tokens around it.

Text comes whole, with no character cut; without a tokenizer token ids stand in its place.
Each token's text is made once, however many windows it is in.

Shapes: R examples, W tokens of a window.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.latents.examples import CodesOf, Examples, window_activations, window_bounds
from harvest.model.tokenizer import PARTIAL, Tokenizer
from store.arrays import TokenTable

_ROWS_AT_ONCE = 2**16
"""Rows made and written together."""

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
"""Sorted by latent, layer and rank; layer as the model counts, rank 0 the most active, token its place in the store.
texts and activations: of each token of the window, `marked` being the example's place among them; an activation is null
where the token was not analysed."""


class Contexts(NamedTuple):
    """Text of some tokens and of what is around them."""

    before: pa.StringArray
    """Text of a token's window before it."""
    token: pa.StringArray
    """Its text; of a token that only continues a character, that whole character."""
    after: pa.StringArray
    """Text of the window after it."""
    texts: pa.StringArray
    """Text of each token of the store in a window, others null; empty for one that only continues a character."""


def write_found(
    path: Path,
    found: Examples,
    tokens: TokenTable,
    tokenizer: Tokenizer | None,
    codes: CodesOf,
    analysed: NDArray[np.bool_],
    layer_numbers: Sequence[int],
) -> int:
    """Write examples.parquet of examples that were found among the analysed tokens [tokens of the store]; the number of
    rows. tokenizer: None where there is none. layer_numbers: [L] the model's block indices of the codes' layers.
    `codes` is called once."""
    start, stop = window_bounds(tokens, found.token)
    activations = window_activations(found, start, stop, codes, analysed)
    shown, place = np.unique(found.token, return_inverse=True)
    contexts = contexts_of(tokens, tokenizer, shown)
    numbers = np.asarray(layer_numbers, np.int64)
    metadata = {"texts": "tokens" if tokenizer is not None else "ids"}
    with pq.ParquetWriter(path, COLUMNS.with_metadata(metadata), compression="zstd") as writer:
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
    """The contexts of `token` [R], ascending places in the store; a document at a time."""
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
            rows.append((before, shown, "".join(texts[t + 1 : high])))
    before, shown, after = (pa.array([row[i] for row in rows], pa.string()) for i in range(3))
    return Contexts(before, shown, after, pa.array(all_texts, pa.string()))
