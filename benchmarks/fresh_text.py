"""Text to measure on that neither an autoencoder nor a lens was fitted on, and a check of that by the tokens.

How: openings of documents, in the order given; one is left out that is short, or that has a line in common with what
was read before or with an opening already taken. Documentation repeats itself: two topics may be one text, and a long
one may hold a short one whole, so that another document need not be other text. What it does not do: see a paraphrase.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

MIN_LINE = 20
"""Characters; shorter lines (headings, "See also") are in common without the texts being so."""


def fresh_openings(documents: Iterable[str], seen: Iterable[str], *, shortest: int, longest: int) -> Iterator[str]:
    """The opening of each document that is fresh: whole lines, from `shortest` to `longest` characters of them."""
    known = {line for text in seen for line in _lines(text)}
    for text in documents:
        opening = text if len(text) <= longest else text[: text.rfind("\n", 0, longest) + 1]
        lines = _lines(opening)
        if len(opening) >= shortest and not lines & known:
            known |= lines
            yield opening


def share_in_common(tokens: NDArray[np.integer], seen: NDArray[np.integer], n: int) -> float:
    """Share of `tokens` [T] that lie in a run of `n` tokens which `seen` [S] has too."""
    runs = np.lib.stride_tricks.sliding_window_view
    known = {row.tobytes() for row in runs(seen.astype(np.int64), n)}
    common = np.array([row.tobytes() in known for row in runs(tokens.astype(np.int64), n)])
    inside = np.zeros(len(tokens), bool)
    for shift in range(n):
        inside[shift : shift + len(common)] |= common
    return float(inside.mean())


def _lines(text: str) -> set[str]:
    lines = (" ".join(line.split()) for line in text.splitlines())
    return {line for line in lines if len(line) >= MIN_LINE}
