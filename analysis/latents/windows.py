"""The distinct contexts of each latent, as they are shown and searched: a token that is an example at several layers is
one context, with its layers.

Contexts that are the strongest of some layer come first, so that a few represent all layers; otherwise they are sorted
by highest activation, then by token. A window reaches from `BEFORE` characters before its token to `AFTER` after it,
in whole tokens. A token that only continues a character has length 0 and is shown with the token that begins it.

Shapes: R rows of examples.parquet, C contexts, W tokens of all windows. Tested in test_search.py.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.results.tables import read_file, read_table

CONTEXTS = 16  # most contexts of a latent
BEFORE, AFTER = 36, 26  # most characters shown before and after a token
LEVELS = 36  # levels of activation, including 0
_ROWS_AT_ONCE = 2**16
_DIGITS = np.frombuffer(b"0123456789abcdefghijklmnopqrstuvwxyz", np.uint8).astype("<u4")


class Context(NamedTuple):
    """A token at which a latent is strongly active, with the text around it."""

    text: str  # text of the window
    lengths: str  # one character per token of the window; its code is the token's length plus 48
    place: int  # index of the token in the window
    levels: str  # one base-36 digit per token for its activation, rounded up: 35 is the latent's highest
    activation: float  # the highest over the layers, to three digits
    layer: int  # the layer of that
    layers: list[int]  # layers at which the token is among the latent's examples, ascending
    foremost: bool  # whether it is the strongest example of some layer

    @property
    def span(self) -> tuple[int, int]:
        """First character of the token in the text, and one past its last."""
        start = sum(ord(sign) - 48 for sign in self.lengths[: self.place])
        return start, start + ord(self.lengths[self.place]) - 48


def read_contexts(path: Path, most: int = CONTEXTS) -> dict[int, list[Context]]:
    """The first `most` contexts of each latent, from examples.parquet; none without the file."""
    found: dict[int, list[Context]] = {}
    if not path.is_file() or not (table := read_table(path, columns=_NUMBERS)).num_rows:
        return found
    latent, layer, rank, activation, token = (np.asarray(table[name].to_numpy()) for name in _NUMBERS)
    order = np.lexsort((layer, -activation, token, latent))  # the rows of a context, the strongest first
    starts = np.flatnonzero(np.r_[True, (np.diff(latent[order]) != 0) | (np.diff(token[order]) != 0)])
    foremost = np.minimum.reduceat(rank[order], starts) == 0
    head = order[starts]  # [C] the row of each context at its strongest layer
    top = np.maximum.reduceat(activation, np.flatnonzero(np.r_[True, np.diff(latent) != 0]))
    top = np.repeat(top, np.diff(np.flatnonzero(np.r_[True, np.diff(latent) != 0, True])))  # [R]
    place = np.lexsort((token[head], -activation[head], ~foremost, latent[head]))
    number = np.arange(len(place)) - np.searchsorted(latent[head][place], latent[head][place])
    kept = place[number < most]
    layers = np.split(layer[order], starts[1:])
    windows = _windows_of_rows(path, head[kept], top)
    for at, (window, levels) in zip(kept.tolist(), windows, strict=True):
        row = head[at]
        size = float(f"{activation[row]:.3g}")
        context = Context(*window, levels, size, int(layer[row]), sorted(layers[at].tolist()), bool(foremost[at]))
        found.setdefault(int(latent[row]), []).append(context)
    return found


_NUMBERS = ["latent", "layer", "rank", "activation", "token"]
_Window = tuple[tuple[str, str, int], str]


def _windows_of_rows(path: Path, rows: np.ndarray, top: np.ndarray) -> list[_Window]:
    """The windows and levels of `rows`, in that order. top: [R] activation at the highest level."""
    wanted, back = np.unique(rows, return_inverse=True)
    found: list[_Window] = []
    columns, file, start = ["text_token", "marked", "texts", "activations"], read_file(path), 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
        here = wanted[slice(*np.searchsorted(wanted, [start, start + batch.num_rows]))]
        found += _windows(batch.take(pa.array(here - start)), top[here])
        start += batch.num_rows
    return [found[i] for i in back]


def _windows(batch: pa.RecordBatch, top: np.ndarray) -> list[_Window]:
    """The window and levels of each row, as shown. top: [R] activation at level 35."""
    lists, activations = batch["texts"], batch["activations"]
    if not batch.num_rows:
        return []
    sizes = np.asarray(pc.list_value_length(lists))  # pyright: ignore[reportAttributeAccessIssue]
    starts = np.cumsum(sizes) - sizes  # [R] start of each row's window among all W tokens
    marked = starts + np.asarray(batch["marked"])
    tokens = lists.flatten().fill_null("")
    lengths = np.asarray(pc.utf8_length(tokens)).astype(np.int64)  # [W]  # pyright: ignore[reportAttributeAccessIssue]
    texts: list[str] = []
    for i, row in enumerate(pc.binary_join(lists, "").to_pylist()):  # pyright: ignore[reportAttributeAccessIssue]
        if lengths[marked[i]] == 0:  # it continues a character: mark the token that begins it, or, if cut off, itself
            owner = next((j for j in range(marked[i], starts[i] - 1, -1) if lengths[j]), None)
            if owner is None:
                token = batch["text_token"][i].as_py()
                lengths[marked[i]] = len(token)
                row = token + row
            else:
                marked[i] = owner
        texts.append(row)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    first = np.maximum(starts, np.searchsorted(begins, begins[marked] - BEFORE))
    stop = np.minimum(starts + sizes, np.searchsorted(ends, ends[marked] + AFTER, side="right"))
    values = np.array(activations.flatten().fill_null(0.0), np.float32)
    heads = np.union1d(starts, np.flatnonzero(lengths))
    values[heads] = np.maximum.reduceat(values, heads)  # including tokens that continue its characters
    level = np.ceil(values / np.repeat(top, sizes) * (LEVELS - 1) - 1e-4).clip(0, LEVELS - 1).astype(np.int64)
    length_signs = (lengths + 48).astype("<u4").tobytes().decode("utf-32-le")
    level_signs = _DIGITS[level].tobytes().decode("utf-32-le")
    low, high = begins[first] - begins[starts], ends[stop - 1] - begins[starts]
    places = (of.tolist() for of in (first, stop, marked - first, low, high))
    return [
        ((text[low:high], length_signs[i:j], place), level_signs[i:j])
        for text, i, j, place, low, high in zip(texts, *places, strict=True)
    ]
