"""Documents to token ids: without special tokens, in batches, and no more text than the tokens that are wanted need."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 512
# A token is rarely longer; where a document turns out to need more, it is tokenised whole.
_CHARACTERS_PER_TOKEN = 24


def encode_documents(
    texts: Iterable[str], tokenizer: Any, n_tokens: int, longest: int | None = None
) -> Iterator[np.ndarray]:
    """Token ids (int32, no special tokens) of each document that has any, in order, until there are `n_tokens` in
    all; the last may be cut, and each is where it has more than `longest`."""
    wanted = n_tokens
    texts = iter(texts)
    while wanted > 0 and (batch := _next_batch(texts, wanted)):
        for ids in _encode(tokenizer, batch, wanted if longest is None else min(wanted, longest)):
            if wanted > 0 and ids.size:
                part = ids[: wanted if longest is None else min(wanted, longest)]
                yield part
                wanted -= part.size


def _next_batch(texts: Iterator[str], wanted: int) -> list[str]:
    """Some texts, not many more than `wanted` tokens need."""
    enough = min(_BATCH_CHARACTERS, _CHARACTERS_PER_TOKEN * wanted)
    batch: list[str] = []
    characters = 0
    for text in itertools.islice(texts, _BATCH_DOCUMENTS):
        batch.append(text)
        characters += len(text)
        if characters >= enough:
            break
    return batch


def _encode(tokenizer: Any, texts: list[str], wanted: int) -> Iterator[np.ndarray]:
    """Token ids of each text. Of a text much longer than `wanted` tokens need, only a beginning is tokenised."""
    limit = _CHARACTERS_PER_TOKEN * wanted + 1000
    for text, ids in zip(texts, plain_ids(tokenizer, [text[:limit] for text in texts]), strict=True):
        # Tokens next to the cut may differ from those of the whole text; none of them may be used.
        if len(text) > limit and len(ids) < wanted + 64:
            (ids,) = plain_ids(tokenizer, [text])
        yield np.array(ids, np.int32)


def plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)[
        "input_ids"
    ]
