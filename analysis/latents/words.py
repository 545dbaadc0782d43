"""The most distinctive words of each latent: what it fires on in its top contexts, compared with all analysed tokens.

Weighted log-odds with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, "Fightin' Words"), each latent
against the corpus; the formula is in docs/method.md. A word is a token's text without the space around it, so that
"return" and " return" are the same. Each position in the store at which the latent fires in its examples' windows
counts once, with its highest activation divided by the latent's. A rare word is far more frequent at any one position
than in the corpus, so words at a single position are left out if others occur at two.

Shapes: R examples, W tokens of a window, M latents, V words.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.latents.examples import Examples, Windows
from harvest.model.tokenizer import PARTIAL, Tokenizer
from store.arrays import TokenTable

MOST_WORDS = 5
PRIOR = 10.0  # tokens
LEAST_Z = 1.96  # standard errors above the corpus
LEAST_SHARE = 0.05  # of what the latent fires on, so that one that fires on everything has no words

_ROWS_AT_ONCE = 2**15
_TOKENS_AT_ONCE = 2**24


class LatentWords(NamedTuple):
    """Lists for each latent [M], its most distinctive word first; empty if it fires on nothing in particular."""

    words: list[list[str]]
    layers: list[list[list[int]]]  # for each word, the model's numbers of the layers with it in their top contexts


def find_words(
    found: Examples,
    windows: Windows,
    tokens: TokenTable,
    analysed: NDArray[np.bool_],
    tokenizer: Tokenizer | None,
    layer_numbers: Sequence[int],
    n_latents: int,
) -> LatentWords:
    """The words of each latent, from its top contexts among the analysed tokens (bool [tokens of the store]). Without a
    tokenizer, words are token ids. layer_numbers: [L] the model's block indices."""
    counts = np.zeros(int(tokens.token_id.max(initial=0)) + 1, np.int64)
    for start in range(0, len(analysed), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        counts += np.bincount(tokens.token_id[part][analysed[part]], minlength=len(counts))
    ids = np.flatnonzero(counts)
    texts = [str(i) for i in ids] if tokenizer is None else [text.strip() or text for text in tokenizer.text(ids)]
    texts = [f"{text} ({i})" if PARTIAL in text else text for text, i in zip(texts, ids.tolist(), strict=True)]
    names, member = np.unique(np.array(texts, object), return_inverse=True)
    word_of_id = np.full(len(counts), -1, np.int64)
    word_of_id[ids] = member
    corpus = np.bincount(member, counts[ids], len(names))  # [V]
    result = LatentWords([[] for _ in range(n_latents)], [[] for _ in range(n_latents)])
    low = 0
    while low < len(found.latent):  # several latents at a time, never a part of one; rows are sorted by latent
        last = found.latent[min(low + _ROWS_AT_ONCE, len(found.latent)) - 1]
        rows = slice(low, int(np.searchsorted(found.latent, last, side="right")))
        row, column = np.nonzero(windows.activations[rows] > 0)
        place = windows.start[rows][row] + column
        cells = pd.DataFrame({"latent": found.latent[rows][row], "word": word_of_id[tokens.token_id[place]]})
        cells["place"], cells["layer"] = place, np.asarray(layer_numbers)[found.layer[rows][row]]
        cells["value"] = windows.activations[rows][row, column].astype(np.float64)
        chosen = _apart(cells, corpus)
        layers: Any = cells.merge(chosen).groupby(_WORD)["layer"].unique()
        for j, w in chosen.itertuples(index=False):
            result.words[j].append(str(names[w]))
            result.layers[j].append(sorted(layers[j, w].tolist()))
        low = rows.stop
    return result


_WORD = ["latent", "word"]


def _apart(cells: pd.DataFrame, corpus: NDArray[Any]) -> pd.DataFrame:
    """Latents and their words, in order. cells: the activations above zero in windows."""
    cells["weight"] = cells["value"] / cells.groupby("latent")["value"].transform("max")
    places: Any = cells.groupby([*_WORD, "place"])["weight"].max()
    found: Any = places.groupby(level=_WORD).agg(["sum", "count"]).reset_index()
    y, of_latent = found["sum"], found.groupby("latent")
    n, c, total = of_latent["sum"].transform("sum"), corpus[found["word"]], corpus.sum()
    prior = PRIOR * c / total
    # In a corpus of a single word there is no other.
    rest, others = np.maximum(n + PRIOR - y - prior, 1e-9), np.maximum(total + PRIOR - c - prior, 1e-9)
    odds = np.log((y + prior) / rest) - np.log((c + prior) / others)
    found["z"] = odds / np.sqrt(1 / (y + prior) + 1 / (c + prior))
    several = of_latent["count"].transform("max") > 1
    kept = found[(found["z"] > LEAST_Z) & (y >= LEAST_SHARE * n) & ((found["count"] > 1) | ~several)]
    ordered = kept.sort_values(["latent", "z", "word"], ascending=[True, False, True])
    return ordered.groupby("latent").head(MOST_WORDS)[_WORD]
