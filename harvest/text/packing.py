"""The tokens that separate documents and open a sequence, and its length. Tested in tests/harvest/test_table.py."""

from typing import NamedTuple

import numpy as np

from harvest.model.tokenizer import Tokenizer
from residscope.errors import UsageError

_SORTED_DOCUMENTS = 4096


class Packing(NamedTuple):
    """How sequences are made from documents."""

    separator: str
    """Text put after each document; empty for none."""
    separator_ids: tuple[int, ...]
    """Its tokens."""
    opening: tuple[int, ...]
    """Tokens that begin every sequence, as the tokenizer begins a text: BOS, often none."""
    special_ids: tuple[int, ...]
    """Tokens that are neither trained on nor analysed."""
    context_length: int
    """Tokens in a sequence, including its opening."""
    keep_first_position: bool
    """Whether position 0 is trained on and analysed."""
    packed: bool = True
    """Whether a sequence may hold several documents; else it is the beginning of one."""

    @property
    def document_extra(self) -> int:
        """Tokens added for each document: its separator, or without packing, the opening of its sequence."""
        return len(self.separator_ids if self.packed else self.opening)

    @property
    def longest_document(self) -> int | None:
        """Tokens taken from a document at most; None for all."""
        return None if self.packed else self.stream_per_sequence

    @property
    def stream_per_sequence(self) -> int:
        """Tokens of the stream in a full sequence."""
        return self.context_length - len(self.opening)

    def stream_length(self, n_tokens: int) -> int:
        """Tokens of the stream that a table of at most `n_tokens` holds."""
        if not self.packed:
            return n_tokens
        full, rest = divmod(n_tokens, self.context_length)
        return full * self.stream_per_sequence + max(rest - len(self.opening), 0)


def make_packing(
    tokenizer: Tokenizer,
    *,
    context_length: int,
    separator: str | None = None,
    keep_first_position: bool = False,
    packed: bool = True,
) -> Packing:
    """The packing for this tokenizer's model.

    separator: None for the model's end-of-text token; not used without packing. Raises `UsageError` if there is no
    such token, or if the separator or the context length is invalid.
    """
    if not packed:
        separator = ""
    if separator is None:
        separator = tokenizer.end_of_text
    if separator is None:
        raise UsageError(
            "the tokenizer has no end-of-text token to put between documents; give one with --document-separator, or"
            ' "" for none'
        )
    ids, opening = tokenizer.separator_ids(separator), tokenizer.opening
    if context_length <= len(opening):
        raise UsageError(
            f"--context-length {context_length} leaves no room after the tokens that the tokenizer puts before a text;"
            f" use at least {len(opening) + 1}"
        )
    special = tuple(sorted(tokenizer.masked_ids(separator)))
    return Packing(separator, ids, opening, special, context_length, keep_first_position, packed)


def sequences(documents: list[np.ndarray], packing: Packing, n_tokens: int) -> list[np.ndarray]:
    """Each document (token ids, int32) as its own sequence, with the opening; `n_tokens` in all: the last is cut. Of
    every 4,096 the longest come first."""
    rows = [np.concatenate([np.array(packing.opening, np.int32), ids]) for ids in documents]
    rows[-1] = rows[-1][: n_tokens - sum(map(len, rows[:-1]))]
    return [
        row
        for start in range(0, len(rows), _SORTED_DOCUMENTS)
        for row in sorted(rows[start : start + _SORTED_DOCUMENTS], key=len, reverse=True)  # Stable.
    ]
