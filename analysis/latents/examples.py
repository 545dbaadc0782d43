"""The maximally activating examples of every latent at every layer, with their context.

How: one pass over the sparse codes keeps, per latent and layer, the n most active tokens, of different documents as far
as there are so many; what is kept does not depend on how tokens are grouped, so parts merge in any way. A second pass
reads the codes of the windows' tokens, for the latent's activation at each of them. A window is the tokens around an
example that the model saw together: of the same document and the same sequence. Not here: encoding
(`analysis.encoder`), their text and their file (`analysis.latents.example_rows`).

Memory: 12 bytes for each of M * L * n examples while they are sought, and about 4 W more for each that was found;
bounded by the number of examples, not of tokens.

Shapes: T tokens, L layers, k active latents a vector, M n_latents, n examples per latent and layer, R examples found, W
tokens of a window.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.encoder import CodeTile
from analysis.latents import example_loops as compiled_examples
from analysis.model.sequences import sequence_bounds
from store.arrays import TokenTable

PER_LAYER = 3
"""Examples of each latent at each layer."""

MAX_EXAMPLES = 2**20
"""With so many latents and layers that there would be more, fewer are kept of each, at least one."""

REACH = 12
"""Tokens before and after an example in its window."""

CodesOf = Callable[[NDArray[np.bool_]], Iterable[CodeTile]]
"""codes(needed [tokens of the store]) -> their codes, in order."""


@dataclass(frozen=True, kw_only=True)
class TopExamples:
    """The most active tokens of each latent at each layer, in no order."""

    activation: NDArray[np.float32]
    """[M, L, n]"""

    token: NDArray[np.int32]
    """[M, L, n] place in the store, -1 where there is none."""

    document: NDArray[np.int32]
    """[M, L, n]"""

    @classmethod
    def zeros(cls, n_latents: int, n_layers: int, n: int) -> "TopExamples":
        """None yet."""
        shape = (n_latents, n_layers, n)
        return cls(
            activation=np.zeros(shape, np.float32),
            token=np.full(shape, -1, np.int32),
            document=np.zeros(shape, np.int32),
        )

    def add(self, codes: CodeTile, document: NDArray[np.integer]) -> None:
        """Offer tokens, in place; document: [T] theirs. A token must be offered once."""
        compiled_examples.insert(
            np.ascontiguousarray(codes.values),
            np.ascontiguousarray(codes.indices),
            codes.token,
            document.astype(np.int64),
            self.activation,
            self.token,
            self.document,
        )

    @staticmethod
    def merged(parts: Sequence["TopExamples"]) -> "TopExamples":
        """The examples of all tokens of `parts`, whatever the grouping."""
        first, *others = parts
        total = TopExamples(
            activation=first.activation.copy(), token=first.token.copy(), document=first.document.copy()
        )
        for part in others:
            compiled_examples.insert_examples(
                part.activation, part.token, part.document, total.activation, total.token, total.document
            )
        return total

    def found(self) -> "Examples":
        """What is there, sorted by latent, layer and rank: by activation, then by token."""
        latent, layer, place = np.nonzero(self.token >= 0)
        activation, token = self.activation[latent, layer, place], self.token[latent, layer, place]
        order = np.lexsort((token, -activation, layer, latent))
        latent, layer = latent[order], layer[order]
        first = np.flatnonzero(np.r_[True, (latent[1:] != latent[:-1]) | (layer[1:] != layer[:-1])][: len(order)])
        rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
        return Examples(
            latent=latent,
            layer=layer,
            rank=rank,
            activation=activation[order],
            token=token[order].astype(np.int64),
            document=self.document[self.token >= 0][order].astype(np.int64),
        )


class Examples(NamedTuple):
    """A table of examples."""

    latent: NDArray[np.int64]
    """[R]"""

    layer: NDArray[np.int64]
    """[R] index into the analysed layers."""

    rank: NDArray[np.int64]
    """[R] 0 is the most active of its latent and layer."""

    activation: NDArray[np.float32]
    """[R]"""

    token: NDArray[np.int64]
    """[R] place in the store."""

    document: NDArray[np.int64]
    """[R]"""


def examples_per_layer(n_latents: int, n_layers: int) -> int:
    """How many are kept of each latent at each layer: `PER_LAYER`, or fewer where that would be above
    `MAX_EXAMPLES`."""
    return max(1, min(PER_LAYER, MAX_EXAMPLES // (n_latents * n_layers)))


def window_bounds(
    tokens: TokenTable, token: NDArray[np.int64], reach: int = REACH
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First token of the window of each of `token` [R], and one past its last: `reach` tokens on both sides, of the
    same document and the same sequence."""
    starts, _ = sequence_bounds(tokens.position)
    starts = np.union1d(starts, np.flatnonzero(np.diff(tokens.document)) + 1)
    run = np.searchsorted(starts, token, side="right") - 1
    stops = np.append(starts[1:], len(tokens.document))
    return np.maximum(token - reach, starts[run]), np.minimum(token + reach + 1, stops[run])


def window_activations(
    found: Examples,
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    codes: CodesOf,
    analysed: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """[R, W] activation of each example's latent, at its layer, at the tokens of its window [start, stop); NaN beyond,
    and where a token was not analysed."""
    order = np.argsort(found.token, kind="stable")
    width = int((stop - start).max(initial=0))
    out = np.full((len(order), width), np.nan, np.float32)
    edges = np.bincount(start, minlength=len(analysed) + 1) - np.bincount(stop, minlength=len(analysed) + 1)
    needed = analysed & (np.cumsum(edges)[: len(analysed)] > 0)
    latent, layer, low, high = (column[order] for column in (found.latent, found.layer, start, stop))
    for tile in codes(needed):
        first, last = int(tile.token[0]), int(tile.token[-1])
        row_of_token = np.full(last + 1 - first, -1, np.int64)
        row_of_token[tile.token - first] = np.arange(len(tile.token))
        # Sorted by token, windows begin and end in order too.
        rows = slice(np.searchsorted(high, first, side="right"), np.searchsorted(low, last, side="right"))
        compiled_examples.fill_windows(
            np.ascontiguousarray(tile.values),
            np.ascontiguousarray(tile.indices),
            first,
            row_of_token,
            latent[rows],
            layer[rows],
            low[rows],
            high[rows],
            out[rows],
        )
    activations = np.empty_like(out)
    activations[order] = out
    return activations
