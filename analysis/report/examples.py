"""What the report shows of an opened latent (contexts, histogram, neighbours), packed so that the page opens at once.

Live latents are packed `PER_BLOCK` to a block, as base64 of deflated JSON. latent.js unpacks a block when one of its
latents is opened, and all blocks to search for a text. Where there is not room for everything, the first of `PLANS`
that fits says what is kept, and the page notes it. One more block has the words that each latent fires on.

A latent's content, without empty keys: `histogram` (for each layer: its number, the first bin with a count, counts from
there on), `near` (latent and cosine of its neighbours), `promoted`, `suppressed` (only if nearer to a token than random
directions are), `explained` (layer, text, scores) and, for its contexts (`analysis.latents.windows`), `texts` (text,
lengths, place) and `contexts` (columns layer, layers, activation, levels; `foremost`: how many contexts, from the first
on, are the strongest of a layer).
"""

import base64
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from analysis.delphi.scores import read_explanations
from analysis.latents.windows import CONTEXTS, Context, read_contexts
from analysis.results.tables import read_table
from residscope.console import ranges

PER_BLOCK = 64  # live latents
BUDGET = 12_600_000  # characters of all blocks together, if the page has room
MAX_CONTEXTS = 2**19  # read for all latents together
_SAMPLED = 16  # one block in this many is packed first, to see whether a plan can fit


class Plan(NamedTuple):
    """How much of each latent is kept."""

    contexts: int
    histogram: bool
    neighbours: int
    share: float = 1.0  # share of the latents, those that fire most, that have any of these


PLANS = (
    *(Plan(CONTEXTS, True, 5), Plan(12, True, 5), Plan(8, True, 5), Plan(6, False, 5)),
    *(Plan(4, False, 3), Plan(2, False, 1), Plan(1, False, 1), Plan(1, False, 0)),
    *(Plan(1, False, 0, share) for share in (0.75, 0.5, 0.25, 0.1, 0.0)),
)
"""Tried in turn until the blocks fit; the last is used even if they do not."""


@dataclass
class _Latent:
    """Everything that the first plan keeps of a latent."""

    contexts: list[Context]
    order: int  # its rank by firings, 0 for the latent that fires most
    words: list[str] = field(default_factory=list)
    histogram: list[list[int]] = field(default_factory=list)
    near: list[list[float]] = field(default_factory=list)
    tokens: dict[str, Any] = field(default_factory=dict)


def example_blocks(
    folder: Path, latents: np.ndarray, fired: np.ndarray, *, chance: float | None = None, budget: int = BUDGET
) -> str:
    """The blocks of `latents` [J] (ascending) as HTML, after one with the note and the edges; empty with none to show.

    fired: [J], firings. chance: cosine to a token's logit above which tokens are shown. budget: characters at most.
    """
    contexts = read_contexts(folder / "examples.parquet", max(1, min(CONTEXTS, MAX_CONTEXTS // max(1, len(latents)))))
    order = np.argsort(np.argsort(-fired, kind="stable"), kind="stable").tolist()
    by_number = {j: _Latent(contexts.get(j, []), order[i]) for i, j in enumerate(latents.tolist())}
    edges = _add_histograms(folder / "histograms.parquet", by_number)
    _add_columns(folder / "latents.parquet", by_number)
    has_tokens = _add_tokens(folder / "latent_logits.parquet", by_number, chance)
    for j, rows in read_explanations(folder / "explanations.parquet").items():
        if j in by_number:
            by_number[j].tokens["explained"] = [(row["where"], row["explanation"] or "-", row["said"]) for row in rows]
    live = list(by_number.values())
    if not any(latent.contexts or latent.histogram or latent.near or latent.tokens for latent in live):
        return ""
    blocks, plan = _fitting(live, min(budget, BUDGET))
    data = f'data-edges="{json.dumps(edges)}"' + (f' data-chance="{chance:.3g}"' if has_tokens and chance else "")
    return "\n".join([f'<script type="text/plain" id="latent-note" {data}>{_note(plan, live)}</script>', *blocks])


def _fitting(live: list[_Latent], budget: int) -> tuple[list[str], Plan]:
    groups = [live[start : start + PER_BLOCK] for start in range(0, len(live), PER_BLOCK)]
    sample = groups[_SAMPLED // 2 :: _SAMPLED]
    words = [_packed("latent-words", [latent.words for latent in live])] if any(latent.words for latent in live) else []
    budget -= sum(map(len, words))

    def pack(plan: Plan, groups: list[list[_Latent]]) -> list[str]:
        kept = round(plan.share * len(live))
        contents = ([_content(latent, plan, kept) for latent in group] for group in groups)
        return [_packed(f"latent-block-{i}", content) for i, content in enumerate(contents)]

    for plan in PLANS[:-1]:
        if sum(map(len, pack(plan, sample))) * len(groups) <= 0.98 * budget * max(1, len(sample)):
            blocks = pack(plan, groups)
            if sum(map(len, blocks)) <= budget:
                return [*words, *blocks], plan
    return [*words, *pack(PLANS[-1], groups)], PLANS[-1]


def _packed(block_id: str, content: Any) -> str:
    data = zlib.compress(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(), 6)
    return f'<script type="text/plain" id="{block_id}">{base64.b64encode(data).decode()}</script>'


def _content(latent: _Latent, plan: Plan, kept: int) -> dict[str, Any]:
    """What a plan keeps of a latent: only its tokens, if its rank is `kept` or more."""
    content: dict[str, Any] = dict(latent.tokens)
    if latent.order >= kept:
        return content
    if contexts := latent.contexts[: plan.contexts]:
        content["texts"] = [context[:3] for context in contexts]
        columns = {name: [getattr(context, name) for context in contexts] for name in ("layer", "activation", "levels")}
        columns["layers"] = [ranges(context.layers, ", ") for context in contexts]
        content["contexts"] = columns | {"foremost": sum(context.foremost for context in contexts)}
    if near := latent.near[: plan.neighbours]:
        content["near"] = near
    return content | {"histogram": latent.histogram} if plan.histogram and latent.histogram else content


def _note(plan: Plan, live: list[_Latent]) -> str:
    """What the page was limited to, in one sentence; empty if nothing is left out."""
    limits = []
    if any(len(latent.contexts) > plan.contexts for latent in live):
        limits.append(f"{plan.contexts} context{'s' * (plan.contexts != 1)} per latent")
    if plan.share < 1:
        limits.append(f"only for the {round(plan.share * len(live)):,} latents that fire most")
    if any(latent.histogram for latent in live) and not plan.histogram:
        limits.append("no histogram")
    if any(len(latent.near) > plan.neighbours for latent in live):
        limits.append(f"{plan.neighbours or 'no'} neighbour{'s' * (plan.neighbours != 1)}")
    return f"To keep this page small: {', '.join(limits)}; the parquet files have everything." if limits else ""


def _add_histograms(path: Path, by_number: dict[int, _Latent]) -> list[float]:
    """Counts by layer, without the empty bins at either end; returns the bins' edges."""
    if not path.is_file() or (table := read_table(path)).num_rows == 0:
        return []
    lists: Any = table["counts"].combine_chunks()
    counts = np.asarray(lists.flatten()).reshape(table.num_rows, -1)  # [R, B]
    some = counts > 0
    first, stop = some.argmax(axis=1), some.shape[1] - some[:, ::-1].argmax(axis=1)
    columns = (table["latent"].to_pylist(), table["layer"].to_pylist(), first.tolist(), stop.tolist(), counts.tolist())
    for latent, layer, low, high, numbers in zip(*columns, strict=True):
        by_number[latent].histogram.append([layer, low, *numbers[low:high]])
    edges = json.loads((table.schema.metadata or {}).get(b"edges", b"[]"))
    return [float(f"{edge:.4g}") for edge in edges]


def _add_columns(path: Path, by_number: dict[int, _Latent]) -> None:
    known = set(pq.read_schema(path).names)
    names = [name for name in ("neighbours", "neighbour_cosines", "fires_on") if name in known]
    for row in read_table(path, columns=["latent", *names]).to_pylist():
        if latent := by_number.get(row["latent"]):
            pairs = zip(row.get("neighbours") or (), row.get("neighbour_cosines") or (), strict=True)
            latent.near = [[other, float(f"{cosine:.3g}")] for other, cosine in pairs]
            latent.words = row.get("fires_on") or []


def _add_tokens(path: Path, by_number: dict[int, _Latent], chance: float | None) -> bool:
    """Tokens that latents promote and suppress, if their cosine is above chance; returns whether the file is there."""
    if not path.is_file():
        return False
    for row in read_table(path, columns=["latent", "promoted", "suppressed", "unembedding_cosine"]).to_pylist():
        cosine = row.pop("unembedding_cosine")
        latent = by_number.get(row.pop("latent"))
        if latent and (chance is None or cosine > chance):
            latent.tokens = row
    return True
