"""What the report shows of an opened latent (contexts, histogram, neighbours), packed so that a page opens at once.

Blocks of `PER_BLOCK` live latents, each base64 of deflated JSON, which report.js unpacks when a latent of it is opened,
or all of them when a text is searched for. Where all would take more than there is room for, less is kept, by the first
of `PLANS` that fits, and the page says what. One more block has the words that each latent fires on, for the table.

Content of a latent, empty keys left out: `histogram` (for each layer: its number, the first bin with a count, counts
from there on), `near` (latent and cosine of its neighbours), `promoted`, `suppressed` (only where nearer to a token
than random directions are), `explained` (layer, text, scores), and of its contexts (`analysis.latents.windows`)
`texts` (text, lengths, place) and `contexts` (columns layer, layers, activation, levels; `foremost`: how many, the
first, are the strongest of a layer).
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
BUDGET = 12_600_000  # characters of all blocks together, if there is room in the page
MAX_CONTEXTS = 2**19  # read of all latents
_SAMPLED = 16  # one block in so many is packed first, to see whether a plan can fit


class Plan(NamedTuple):
    """How much of each latent is kept."""

    contexts: int
    histogram: bool
    neighbours: int
    share: float = 1.0  # of the latents, those that fire most, that have any of these


PLANS = (
    *(Plan(CONTEXTS, True, 5), Plan(12, True, 5), Plan(8, True, 5), Plan(6, False, 5)),
    *(Plan(4, False, 3), Plan(2, False, 1), Plan(1, False, 1), Plan(1, False, 0)),
    *(Plan(1, False, 0, share) for share in (0.75, 0.5, 0.25, 0.1, 0.0)),
)
"""Tried in turn until the blocks fit; the last is used even if it does not."""


@dataclass
class _Found:
    """Everything about one latent that the first plan keeps."""

    contexts: list[Context]
    order: int  # its place among the latents, the one that fires most first
    words: list[str] = field(default_factory=list)
    histogram: list[list[int]] = field(default_factory=list)
    near: list[list[float]] = field(default_factory=list)
    tokens: dict[str, Any] = field(default_factory=dict)


def example_blocks(
    folder: Path, latents: np.ndarray, fired: np.ndarray, *, chance: float | None = None, budget: int = BUDGET
) -> str:
    """The blocks as HTML, by `latents` [J] (ascending), after one of a note and the edges; empty with none to show.

    fired: [J] how often. chance: cosine to a token's logit above which tokens are told. budget: characters at most.
    """
    contexts = read_contexts(folder / "examples.parquet", max(1, min(CONTEXTS, MAX_CONTEXTS // max(1, len(latents)))))
    order = np.argsort(np.argsort(-fired, kind="stable"), kind="stable").tolist()
    of = {j: _Found(contexts.get(j, []), order[i]) for i, j in enumerate(latents.tolist())}
    edges = _add_histograms(folder / "histograms.parquet", of)
    _add_columns(folder / "latents.parquet", of)
    told = _add_tokens(folder / "latent_logits.parquet", of, chance)
    for j, rows in read_explanations(folder / "explanations.parquet").items():
        if j in of:
            of[j].tokens |= {"explained": [(row["where"], row["explanation"] or "-", row["said"]) for row in rows]}
    found = list(of.values())
    if not any(one.contexts or one.histogram or one.near or one.tokens for one in found):
        return ""
    blocks, plan = _fitting(found, min(budget, BUDGET))
    data = f'data-edges="{json.dumps(edges)}"' + (f' data-chance="{chance:.3g}"' if told and chance else "")
    return "\n".join([f'<script type="text/plain" id="latent-note" {data}>{_note(plan, found)}</script>', *blocks])


def _fitting(found: list[_Found], budget: int) -> tuple[list[str], Plan]:
    groups = [found[start : start + PER_BLOCK] for start in range(0, len(found), PER_BLOCK)]
    sample = groups[_SAMPLED // 2 :: _SAMPLED]
    words = [_packed("latent-words", [one.words for one in found])] if any(one.words for one in found) else []
    budget -= sum(map(len, words))
    for plan in PLANS:
        kept, last = round(plan.share * len(found)), plan is PLANS[-1]
        size = sum(len(_packed("latent-block-0", [_content(one, plan, kept) for one in group])) for group in sample)
        if not last and size * len(groups) > 0.98 * budget * max(1, len(sample)):
            continue
        contents = ([_content(one, plan, kept) for one in group] for group in groups)
        blocks = [_packed(f"latent-block-{i}", content) for i, content in enumerate(contents)]
        if last or sum(map(len, blocks)) <= budget:
            return [*words, *blocks], plan
    raise AssertionError("the last plan always returns")


def _packed(block_id: str, content: Any) -> str:
    data = zlib.compress(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(), 6)
    return f'<script type="text/plain" id="{block_id}">{base64.b64encode(data).decode()}</script>'


def _content(one: _Found, plan: Plan, kept: int) -> dict[str, Any]:
    """What a plan keeps of a latent; of those from place `kept` on, only its tokens."""
    content: dict[str, Any] = dict(one.tokens)
    own, near = one.contexts[: plan.contexts], one.near[: plan.neighbours]
    if one.order >= kept:
        return content
    if own:
        content["texts"] = [context[:3] for context in own]
        columns = {name: [getattr(context, name) for context in own] for name in ("layer", "activation", "levels")}
        columns["layers"] = [ranges(context.layers, ", ") for context in own]
        content["contexts"] = columns | {"foremost": sum(context.foremost for context in own)}
    if near:
        content["near"] = near
    return content | {"histogram": one.histogram} if plan.histogram and one.histogram else content


def _note(plan: Plan, found: list[_Found]) -> str:
    """What is left out, in one sentence; empty where nothing is."""
    left = []
    if any(len(one.contexts) > plan.contexts for one in found):
        left.append(f"{plan.contexts} context{'s' * (plan.contexts != 1)} of a latent")
    if plan.share < 1:
        left.append(f"of the {round(plan.share * len(found)):,} latents that fire most only")
    if any(one.histogram for one in found) and not plan.histogram:
        left.append("no histogram")
    if any(len(one.near) > plan.neighbours for one in found):
        left.append(f"{plan.neighbours or 'no'} neighbour{'s' * (plan.neighbours != 1)}")
    return f"To keep this page small: {', '.join(left)}; the parquet files hold all." if left else ""


def _add_histograms(path: Path, of: dict[int, _Found]) -> list[float]:
    """Counts by layer, without the empty bins at either end; returns the bins' edges."""
    if not path.is_file() or (table := read_table(path)).num_rows == 0:
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


def _add_columns(path: Path, of: dict[int, _Found]) -> None:
    known = set(pq.read_schema(path).names)
    names = [name for name in ("neighbours", "neighbour_cosines", "fires_on") if name in known]
    for row in read_table(path, columns=["latent", *names]).to_pylist():
        if one := of.get(row["latent"]):
            pairs = zip(row.get("neighbours") or (), row.get("neighbour_cosines") or (), strict=True)
            one.near = [[other, float(f"{cosine:.3g}")] for other, cosine in pairs]
            one.words = row.get("fires_on") or []


def _add_tokens(path: Path, of: dict[int, _Found], chance: float | None) -> bool:
    """Tokens that latents promote and suppress, of those nearer to one than chance; whether there is such a file."""
    if not path.is_file():
        return False
    for row in read_table(path, columns=["latent", "promoted", "suppressed", "unembedding_cosine"]).to_pylist():
        cosine = row.pop("unembedding_cosine")
        if (one := of.get(row.pop("latent"))) and (chance is None or cosine > chance):
            one.tokens = row
    return True
