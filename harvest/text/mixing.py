"""Mixes several streams of documents into one, by weight.

How: the next document is always taken from the stream that is furthest behind its share of the tokens so far (the
first, if several are equal), so that after every document each share is right to within one document, and the
order depends on documents and weights alone. If a stream runs out, the others keep their relative shares.
"""

from collections.abc import Iterator, Sequence

import numpy as np


class Mixture:
    """One pass over the documents (token ids, int32) of several streams; counts what came from each."""

    def __init__(
        self, streams: Sequence[Iterator[np.ndarray]], weights: Sequence[float], n_tokens: int, extra: int
    ) -> None:
        """n_tokens: in total; the last document is cut. extra: added tokens per document (separator, BOS) to count."""
        self._streams = streams
        self._weights = weights
        self._left = n_tokens
        self._extra = extra
        self.documents = [0] * len(streams)
        """Documents taken from each stream."""
        self.tokens = [0] * len(streams)
        """Tokens taken from each, including `extra`."""
        self.ran_out: list[int] = []
        """Streams that ended before the mixture did, in the order in which they ended."""

    def __iter__(self) -> Iterator[np.ndarray]:
        open_streams = list(range(len(self._streams)))
        while self._left > 0 and open_streams:
            at = min(open_streams, key=lambda i: self.tokens[i] / self._weights[i])
            if (ids := next(self._streams[at], None)) is None:
                open_streams.remove(at)
                self.ran_out.append(at)
                continue
            taken = min(len(ids) + self._extra, self._left)
            self.documents[at] += 1
            self.tokens[at] += taken
            self._left -= taken
            yield ids[:taken]

    def shortfalls(self, names: Sequence[str]) -> list[str]:
        """If there are several streams, a line for each that could not provide its share."""
        found = []
        for at in self.ran_out if len(names) > 1 else ():
            share, wanted = self.tokens[at] / sum(self.tokens), self._weights[at] / sum(self._weights)
            if share < 0.99 * wanted:
                ended = f"{names[at]} ran out after {self.tokens[at]:,} tokens"
                found.append(f"{ended}: its share is {share:.1%} instead of {wanted:.1%}")
        return found
