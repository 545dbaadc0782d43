"""What the report shows of an opened latent (examples, histogram, neighbours), packed so that a page opens at once.

Blocks of `PER_BLOCK` live latents, each base64 of deflated JSON, which report.js unpacks when a latent of it is opened.
Where all would take more than `BUDGET`, less is kept, by the first of `PLANS` that fits, and the page says what.

One more block is the index of the search: for each word, in lower case, the rows of the latents that promote it or have
a shown example at it.

Content of a latent, empty keys left out: `histogram` (for each layer: its number, the first bin with a count, counts
from there on), `near` (latent and cosine of its neighbours), `promoted`, `suppressed`, and

    texts      [text, lengths, index of its token]: a window; one character per token, whose code is its length plus 48
    examples   columns layer, rank, activation, text (its number) and levels: one digit per token, base 36, for its
               activation: 0 to 35, where 35 is the latent's strongest example, rounded up

A window is shown from `BEFORE` characters before its token to `AFTER` after it, whole tokens only. A token that only
continues a character has length 0 and is shown with the token that begins it.

Shapes: R rows, W tokens of all their windows.
"""

import base64
import json
import zlib
from dataclasses import dataclass, field
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


PER_BLOCK = 64
"""Live latents in a block."""

BUDGET = 12_600_000
"""Characters that all blocks together may take: with the rest of a page of 10,000 latents, below 15 MB."""

_SAMPLED = 16
"""One block in so many is packed first, to see whether a plan can fit."""


class Plan(NamedTuple):
    """How much of each latent is kept."""

    layers: int
    """Layers whose strongest example is kept: those at which the latent is most active."""
    more: int
    """Layers, of these, of which the other examples are kept too."""
    histogram: bool


EVERY = 10**6
PLANS = (
    *(Plan(EVERY, 2, True), Plan(EVERY, 1, True), Plan(EVERY, 0, True), Plan(18, 1, True), Plan(12, 1, True)),
    *(Plan(6, 0, True), Plan(6, 0, False), Plan(3, 0, False), Plan(1, 0, False)),
)
"""Tried in turn until the blocks fit; the last is used even if it does not."""


@dataclass
class _Found:
    """Everything about one latent that the first plan keeps."""

    examples: list[Example]
    histogram: list[list[int]] = field(default_factory=list)
    rest: dict[str, Any] = field(default_factory=dict)


def example_blocks(folder: Path, latents: np.ndarray) -> str:
    """The blocks as HTML, by `latents` [J] (ascending), after one of a note and the edges; empty with none to show."""
    examples = read_examples(folder / "examples.parquet", PLANS[0].more)
    of = {latent: _Found(examples.get(latent, [])) for latent in latents.tolist()}
    edges = _add_histograms(folder / "histograms.parquet", of)
    _add_neighbours(folder / "latents.parquet", of)
    if (tokens := folder / "latent_logits.parquet").is_file():
        for row in pq.read_table(tokens, columns=["latent", "promoted", "suppressed"]).to_pylist():
            of[row.pop("latent")].rest |= row
    found = list(of.values())
    if not any(one.examples or one.histogram or one.rest for one in found):
        return ""
    blocks, plan = _fitting(found)
    note = f'<script type="text/plain" id="latent-note" data-edges="{json.dumps(edges)}">{_note(plan, found)}</script>'
    return "\n".join([note, *blocks])


def _fitting(found: list[_Found]) -> tuple[list[str], Plan]:
    """The blocks by the first plan that fits."""
    groups = [found[start : start + PER_BLOCK] for start in range(0, len(found), PER_BLOCK)]
    sample = groups[_SAMPLED // 2 :: _SAMPLED]
    for plan in PLANS:
        last = plan is PLANS[-1]
        size = sum(len(_packed("latent-block-0", [_content(one, plan) for one in group])) for group in sample)
        if not last and size * len(groups) > 0.98 * BUDGET * max(1, len(sample)):
            continue
        contents = [[_content(one, plan) for one in group] for group in groups]
        blocks = [_packed(f"latent-block-{i}", content) for i, content in enumerate(contents)]
        blocks.append(_packed("latent-words", _rows_of_words([latent for content in contents for latent in content])))
        if last or sum(map(len, blocks)) <= BUDGET:
            return blocks, plan
    raise AssertionError("the last plan always returns")


def _packed(block_id: str, content: Any) -> str:
    data = zlib.compress(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(), 6)
    return f'<script type="text/plain" id="{block_id}">{base64.b64encode(data).decode()}</script>'


def _rows_of_words(contents: list[dict[str, Any]]) -> dict[str, list[int]]:
    """By word, the first row of its latents, then each next one's distance: small numbers deflate well."""
    rows: dict[str, list[int]] = {}
    for row, content in enumerate(contents):
        words = {word.lower() for word in content.get("promoted", ())}
        words |= {marked_token(*window).lower() for window in content.get("texts", ())}
        for word in words:
            rows.setdefault(word, []).append(row)
    return {word: np.diff(of, prepend=0).tolist() for word, of in sorted(rows.items())}


def _content(one: _Found, plan: Plan) -> dict[str, Any]:
    examples = [e for e in one.examples if e.strength < (plan.layers if e.rank == 0 else min(plan.layers, plan.more))]
    content = add_texts(examples) | one.rest
    return content | {"histogram": one.histogram} if plan.histogram and one.histogram else content


def _note(plan: Plan, found: list[_Found]) -> str:
    """What is left out, in one sentence; empty where nothing is."""
    left = []
    n_layers = max((1 + max((e.strength for e in one.examples), default=-1) for one in found), default=0)
    if plan.layers < n_layers:
        left.append(f"the strongest example of the {plan.layers} layers at which a latent is most active")
    if any(e.rank for one in found for e in one.examples) and n_layers > plan.more:
        layers = "1 layer" if plan.more == 1 else f"{plan.more} layers"
        left.append(f"further examples of {layers}" if plan.more else "no further examples")
    if any(one.histogram for one in found) and not plan.histogram:
        left.append("no histogram")
    return f"To keep this page small: {', '.join(left)}; the parquet files hold all." if left else ""


def _add_histograms(path: Path, of: dict[int, _Found]) -> list[float]:
    """Counts by layer, without the empty bins at either end; returns the bins' edges."""
    if not path.is_file() or (table := pq.read_table(path)).num_rows == 0:
        return []
    lists: Any = table["counts"].combine_chunks()
    counts = np.asarray(lists.flatten()).reshape(table.num_rows, -1)  # [R, B]
    some = counts > 0
    first, stop = some.argmax(axis=1), some.shape[1] - some[:, ::-1].argmax(axis=1)
    columns = (table["latent"].to_pylist(), table["layer"].to_pylist(), first.tolist(), stop.tolist(), counts.tolist())
    for latent, layer, low, high, numbers in zip(*columns, strict=True):
        of[latent].histogram.append([layer, low, *numbers[low:high]])
    edges = json.loads((table.schema.metadata or {}).get(b"edges", b"[]"))
    return [float(f"{edge:.4g}") for edge in edges]


def _add_neighbours(path: Path, of: dict[int, _Found]) -> None:
    """Those that latents.parquet has; older ones have none."""
    names = ["latent", "neighbours", "neighbour_cosines"]
    if not set(names) <= set(pq.read_schema(path).names):
        return
    table = pq.read_table(path, columns=names)
    for latent, others, cosines in zip(*(table[name].to_pylist() for name in names), strict=True):
        if others and latent in of:
            near = [[other, float(f"{cosine:.3g}")] for other, cosine in zip(others, cosines, strict=True)]
            of[latent].rest["near"] = near
