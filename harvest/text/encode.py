"""Tokenises documents in batches, without special tokens around them, and no more text than is needed."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from harvest.model.tokenizer import Tokenizer

Document = str | np.ndarray
"""A text, or its token ids (int32)."""

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 512
# A token is rarely longer; a document that turns out to need more characters is tokenised whole.
_CHARACTERS_PER_TOKEN = 24


def encode_documents(
    texts: Iterable[Document], tokenizer: Tokenizer, n_tokens: int, longest: int | None = None
) -> Iterator[np.ndarray]:
    """Ids (int32) of each non-empty document, cut to `longest`, in order, until there are `n_tokens` in all."""
    wanted = n_tokens
    texts = iter(texts)
    while wanted > 0 and (batch := _next_batch(texts, wanted)):
        for ids in _encode(tokenizer, batch, wanted if longest is None else min(wanted, longest)):
            if wanted > 0 and ids.size:
                part = ids[: wanted if longest is None else min(wanted, longest)]
                yield part
                wanted -= part.size


def _next_batch(texts: Iterator[Document], wanted: int) -> list[Document]:
    """Some texts, not many more than `wanted` tokens need."""
    enough = min(_BATCH_CHARACTERS, _CHARACTERS_PER_TOKEN * wanted)
    batch: list[Document] = []
    characters = 0
    for text in itertools.islice(texts, _BATCH_DOCUMENTS):
        batch.append(text)
        characters += len(text)
        if characters >= enough:
            break
    return batch


def _encode(tokenizer: Tokenizer, documents: list[Document], wanted: int) -> Iterator[np.ndarray]:
    """Token ids of each text. If a text is much longer than `wanted` tokens need, only its beginning is tokenised."""
    yield from (ids for ids in documents if isinstance(ids, np.ndarray))  # A source gives one kind or the other.
    texts = [text for text in documents if isinstance(text, str)]
    limit = _CHARACTERS_PER_TOKEN * wanted + 1000
    for text, ids in zip(texts, tokenizer.encode([text[:limit] for text in texts]), strict=True):
        # Tokens next to the cut may differ from those of the whole text, and must not be used.
        if len(text) > limit and len(ids) < wanted + 64:
            (ids,) = tokenizer.encode([text])
        yield np.array(ids, np.int32)
