"""The rows of examples.parquet as the report packs them: each window's text once, and activations as digits.

    texts      [text, lengths, index of its token]: a window; one character per token, whose code is its length plus 48
    examples   columns layer, rank, activation, text (its number) and levels: one digit per token, base 36, for its
               activation: 0 to 35, where 35 is the latent's strongest example, rounded up

A window is shown from `BEFORE` characters before its token to `AFTER` after it, whole tokens only. A token that only
continues a character has length 0 and is shown with the token that begins it.

Shapes: R rows, W tokens of all their windows. Tested in tests/analysis/report/test_examples.py.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BEFORE, AFTER = 36, 26
"""Characters shown around an example's token, at most."""

LEVELS = 36
"""Levels of an activation, including 0."""

_ROWS_AT_ONCE = 2**16
_DIGITS = np.frombuffer(b"0123456789abcdefghijklmnopqrstuvwxyz", np.uint8).astype("<u4")


class Example(NamedTuple):
    """One example of a latent, ready to be packed."""

    strength: int
    """0 for the layer at which the latent's strongest example is its most active, 1 for the next, ..."""
    layer: int
    rank: int
    activation: float
    window: tuple[str, str, int]
    """Text, lengths, index of the token."""
    levels: str


def read_examples(path: Path, more: int) -> dict[int, list[Example]]:
    """By latent the strongest example at each layer, all at the `more` strongest, by layer and rank; none, no file."""
    found: dict[int, list[Example]] = {}
    if not path.is_file():
        return found
    numbers = pq.read_table(path, columns=["latent", "layer", "rank", "activation"])
    latent, layer, rank, activation = (np.asarray(numbers[name].to_numpy()) for name in numbers.column_names)
    if not len(latent):
        return found
    strength = strengths(latent, rank, activation)
    top = pd.Series(activation).groupby(latent).transform("max").to_numpy()
    keep = (rank == 0) | (strength < more)
    columns = ["text_token", "marked", "texts", "activations"]
    start = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
        rows = start + np.flatnonzero(keep[start : start + batch.num_rows])
        shown = _windows(batch.filter(pa.array(keep[start : start + batch.num_rows])), top[rows])
        values = (of[rows].tolist() for of in (latent, strength, layer, rank, activation))
        for who, s, la, ra, a, (window, levels) in zip(*values, shown, strict=True):
            found.setdefault(who, []).append(Example(s, la, ra, float(f"{a:.3g}"), window, levels))
        start += batch.num_rows
    return found


def strengths(latent: np.ndarray, rank: np.ndarray, activation: np.ndarray) -> np.ndarray:
    """[R] the rank, from 0, of a row's layer among its latent's layers, by their strongest examples.

    Rows are sorted by latent, layer, rank."""
    first = rank == 0
    strongest = pd.Series(activation[first]).groupby(latent[first])
    place = strongest.rank(method="first", ascending=False).to_numpy(np.int64) - 1
    return place[np.cumsum(first) - 1]


def add_texts(examples: list[Example]) -> dict[str, Any]:
    """`texts` and `examples` of a latent, as columns because they compress better; {} without any."""
    if not examples:
        return {}
    number: dict[tuple[str, str, int], int] = {}
    texts = [number.setdefault(e.window, len(number)) for e in examples]
    columns = {name: [getattr(e, name) for e in examples] for name in ("layer", "rank", "activation")}
    levels = [e.levels for e in examples]
    return {"texts": list(number), "examples": {**columns, "text": texts, "levels": levels}}


def marked_token(text: str, lengths: str, place: int) -> str:
    """The example's own token in a packed window."""
    sizes = [ord(sign) - 48 for sign in lengths[: place + 1]]
    start = sum(sizes[:-1])
    return text[start : start + sizes[-1]]


def _windows(batch: pa.RecordBatch, top: np.ndarray) -> list[tuple[tuple[str, str, int], str]]:
    """Window and levels of each row, as shown. top: [R] activation of level 35."""
    lists, activations = batch["texts"], batch["activations"]
    if not batch.num_rows:
        return []
    sizes = np.asarray(pc.list_value_length(lists))  # pyright: ignore[reportAttributeAccessIssue]
    starts = np.cumsum(sizes) - sizes  # [R] of each row's window among all W tokens
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
    values = np.asarray(activations.flatten().fill_null(0.0), np.float32)
    level = np.ceil(values / np.repeat(top, sizes) * (LEVELS - 1) - 1e-4).clip(0, LEVELS - 1).astype(np.int64)
    length_signs = (lengths + 48).astype("<u4").tobytes().decode("utf-32-le")
    level_signs = _DIGITS[level].tobytes().decode("utf-32-le")
    low, high = begins[first] - begins[starts], ends[stop - 1] - begins[starts]
    places = (of.tolist() for of in (first, stop, marked - first, low, high))
    return [
        ((text[low:high], length_signs[i:j], place), level_signs[i:j])
        for text, i, j, place, low, high in zip(texts, *places, strict=True)
    ]
