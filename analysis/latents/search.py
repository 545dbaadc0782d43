"""Search for latents by the text that they fire on, ranked by how specific they are to it.

A query is one or more terms separated by commas: words, parts of words or phrases. A latent's score is the share of its
contexts (`analysis.latents.windows`) that match the query, weighted by activation, as if it had `DOUBT` more that do
not: 1 of 1 contexts is weaker evidence than 20 of 22. Definition: docs/method.md. report.html ranks by the same rule
(analysis/report/assets/search.js): change both.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from analysis.latents.windows import Context

DOUBT = 2
SHOWN = {"\n": "\N{RETURN SYMBOL}", "\t": "\N{RIGHTWARDS ARROW}", "\r": " "}  # visible signs for invisible characters
_TABLE = str.maketrans(SHOWN)


class Hit(NamedTuple):
    """A latent found by a query."""

    latent: int
    score: float  # 0 to 1
    times: float  # score / mean score of all latents
    hits: int  # contexts that match
    contexts: int  # contexts in all

    @property
    def why(self) -> str:
        hits = f"{self.hits} of its {self.contexts} strongest contexts"
        return f"fires on it in {hits}, {self.times:.3g} times as specific to it as the average latent"


def search(contexts: Mapping[int, Sequence[Context]], query: str, limit: int | None = None) -> list[Hit]:
    """Latents with contexts that match the query, most specific first. contexts: by latent, from `read_contexts`."""
    wanted, found, total = terms(query), [], 0.0
    for latent, own in contexts.items():
        top = max((context.activation for context in own), default=0.0)
        shares = [(context.activation / top, strength(context, wanted)) for context in own]
        if hits := sum(h > 0 for _, h in shares):
            score = sum(r * h for r, h in shares) / (sum(r for r, _ in shares) + DOUBT)
            total += score
            found.append((latent, score, hits, len(own)))
    found.sort(key=lambda one: (-one[1], one[0]))
    mean = total / max(1, len(contexts))
    return [Hit(latent, score, score / mean, hits, n) for latent, score, hits, n in found[:limit]]


def terms(query: str) -> list[str]:
    """The terms of a query, folded like the text to search. A line end may be written as \\n."""
    parts = folded(query.replace("\\n", "\n")).split(",")
    return [term for part in parts if (term := " ".join(part.split()))]


def folded(text: str) -> str:
    """Text in lower case, with the replacements of `SHOWN`; its length does not change."""
    if text.isascii():
        return text.lower().translate(_TABLE)
    small = (SHOWN.get(sign) or sign.lower() for sign in text)
    return "".join(low if len(low) == 1 else sign for low, sign in zip(small, text, strict=True))


def strength(context: Context, wanted: Sequence[str]) -> float:
    """h_c of docs/method.md: 0, 1/2 or 1."""
    text, best = folded(context.text), 0.0
    for term in wanted:
        if term not in text:
            continue
        edges = {*accumulate(ord(sign) - 48 for sign in context.lengths)}  # of tokens, and of words
        edges.update(found.start() for found in re.finditer(r"(?<!\w)|(?!\w)", text))
        low, high = context.span
        for found in re.finditer(f"(?={re.escape(term)})", text):
            start, end = found.start(), found.start() + len(term)
            if start < high and end > low and start in edges:
                best = max(best, 1.0 if end in edges else 0.5)
    return best
