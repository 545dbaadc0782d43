"""The words that set a latent apart: what it fires on in its top contexts, against all analysed tokens.

Weighted log-odds with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, "Fightin' Words"), each latent
against the corpus. A word is a token's text without the space around it, so that "return" and " return" are one. With

    y_w    sum over the places in the latent's top contexts that hold w and at which it fires, each place once, of the
           place's highest activation over the latent's highest
    n      sum of y_w over words
    c_w, N the corpus: how often w stands among the analysed tokens, and all of these
    a_w    = PRIOR c_w / N, the prior: `PRIOR` tokens drawn from the corpus

    z_w = (log((y_w + a_w) / (n + PRIOR - y_w - a_w)) - log((c_w + a_w) / (N + PRIOR - c_w - a_w)))
          / sqrt(1 / (y_w + a_w) + 1 / (c_w + a_w))

The words of highest z, at most `MOST_WORDS`, of those with z above `LEAST_Z` and y_w of at least `LEAST_SHARE` of n, so
that a latent that fires on everything has none; where words stand at two places or more, those that stand at one are
left out, since any rare word is far more frequent there than in the corpus.

Shapes: R examples, W tokens of a window, M latents, V words.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.latents.examples import Examples, Windows
from harvest.model.tokenizer import Tokenizer
from store.arrays import TokenTable

MOST_WORDS = 5
PRIOR = 10.0
"""Tokens of the prior."""

LEAST_Z = 1.96
"""Standard errors above the corpus, from which on a word is said to set a latent apart."""

LEAST_SHARE = 0.05
"""Of what the latent fires on."""

_ROWS_AT_ONCE = 2**15
_TOKENS_AT_ONCE = 2**24


class LatentWords(NamedTuple):
    """Of each latent [M], the first of a list setting it apart most; empty lists for one that fires on nothing in
    particular, or never."""

    words: list[list[str]]
    layers: list[list[list[int]]]
    """For each of the words the layers, as the model counts, at whose top contexts it stands."""


def find_words(
    found: Examples,
    windows: Windows,
    tokens: TokenTable,
    analysed: NDArray[np.bool_],
    tokenizer: Tokenizer | None,
    layer_numbers: Sequence[int],
    n_latents: int,
) -> LatentWords:
    """The words of each latent, from its top contexts among the analysed tokens [tokens of the store]. Without a
    tokenizer token ids are the words. layer_numbers: [L] the model's block indices."""
    corpus = _corpus(tokens, analysed)
    ids = np.flatnonzero(corpus)
    texts = [str(i) for i in ids] if tokenizer is None else [text.strip() or text for text in tokenizer.text(ids)]
    names, member = np.unique(np.array(texts, object), return_inverse=True)
    word_of_id = np.full(len(corpus), -1, np.int64)
    word_of_id[ids] = member
    corpus = np.bincount(member, corpus[ids], len(names))  # [V]
    result = LatentWords([[] for _ in range(n_latents)], [[] for _ in range(n_latents)])
    low = 0
    while low < len(found.latent):  # some whole latents at a time, which are sorted
        last = found.latent[min(low + _ROWS_AT_ONCE, len(found.latent)) - 1]
        rows = slice(low, int(np.searchsorted(found.latent, last, side="right")))
        row, column = np.nonzero(windows.activations[rows] > 0)
        place = windows.start[rows][row] + column
        value = windows.activations[rows][row, column].astype(np.float64)
        latent, word = found.latent[rows][row], word_of_id[tokens.token_id[place]]
        chosen = _apart(latent, word, place, value, corpus)
        layers = np.asarray(layer_numbers)[found.layer[rows][row]]
        key, of = latent * len(names) + word, np.array([j * len(names) + w for j, w in chosen], np.int64)
        order = np.argsort(key, kind="stable")
        starts, stops = (np.searchsorted(key[order], of, side=side) for side in ("left", "right"))
        for (j, w), first, stop in zip(chosen, starts, stops, strict=True):
            result.words[j].append(str(names[w]))
            result.layers[j].append(np.unique(layers[order[first:stop]]).tolist())
        low = rows.stop
    return result


def _corpus(tokens: TokenTable, analysed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How often each token id stands among the analysed tokens."""
    counts = np.zeros(int(tokens.token_id.max(initial=0)) + 1, np.int64)
    for start in range(0, len(analysed), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        counts += np.bincount(tokens.token_id[part][analysed[part]], minlength=len(counts))
    return counts


def _apart(
    latent: NDArray[np.int64],
    word: NDArray[np.int64],
    place: NDArray[np.int64],
    value: NDArray[np.float64],
    corpus: NDArray[np.float64],
) -> list[tuple[int, int]]:
    """Latents and their words, in order, of cells of windows: [n] each, activations above zero."""
    if not len(latent):
        return []
    order = np.lexsort((place, latent))
    latent, word, place, value = latent[order], word[order], place[order], value[order]
    of_latent = np.flatnonzero(np.r_[True, np.diff(latent) != 0])
    peak = np.repeat(np.maximum.reduceat(value, of_latent), np.diff(np.append(of_latent, len(latent))))
    once = np.flatnonzero(np.r_[True, (np.diff(latent) != 0) | (np.diff(place) != 0)])
    weight = np.maximum.reduceat(value, once) / peak[once]
    latent, word = latent[once], word[once]
    order = np.lexsort((word, latent))
    latent, word, weight = latent[order], word[order], weight[order]
    first = np.flatnonzero(np.r_[True, (np.diff(latent) != 0) | (np.diff(word) != 0)])
    places = np.diff(np.append(first, len(latent)))
    y, latent, word = np.add.reduceat(weight, first), latent[first], word[first]
    _, member = np.unique(latent, return_inverse=True)
    n = np.bincount(member, y)[member]
    z = log_odds(y, n, corpus[word], float(corpus.sum()))
    twice = np.maximum.reduceat(places, np.flatnonzero(np.r_[True, np.diff(latent) != 0]))[member] > 1
    order = np.lexsort((word, -z, latent))
    kept = (z > LEAST_Z) & (y >= LEAST_SHARE * n) & ((places > 1) | ~twice)
    order = order[kept[order]]
    latent, word = latent[order], word[order]
    kept = np.arange(len(latent)) - np.searchsorted(latent, latent) < MOST_WORDS
    return list(zip(latent[kept].tolist(), word[kept].tolist(), strict=True))


def log_odds(
    y: NDArray[np.float64], n: NDArray[np.float64], c: NDArray[np.float64], total: float
) -> NDArray[np.float64]:
    """z_w of counts y of n and c of the corpus's total, with the prior of the module's text."""
    prior = PRIOR * c / total
    ours, theirs = y + prior, c + prior
    # A corpus of a single word leaves nothing beside it.
    rest, others = np.maximum(n + PRIOR - ours, 1e-9), np.maximum(total + PRIOR - theirs, 1e-9)
    return (np.log(ours / rest) - np.log(theirs / others)) / np.sqrt(1 / ours + 1 / theirs)
