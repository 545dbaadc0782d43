"""From documents to packed sequences: the token table of a store.

How: each document's tokens, then a separator, make one long stream, which is cut into sequences of exactly
`context_length` tokens (the last may be shorter), so that what is left of a document opens the next sequence. BOS
opens every sequence where the tokenizer puts one. Text is tokenised without special tokens, in batches. What it does
not do: pad, or put one document into each sequence.

Shapes: T tokens of the table, n tokens of the stream (T without BOS).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from store.arrays import TokenTable
from store.errors import ResidscopeError, UsageError

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 512
# A token is rarely longer; where a document turns out to need more, it is tokenised whole.
_CHARACTERS_PER_TOKEN = 24
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


class Packing(NamedTuple):
    """How sequences are made of documents."""

    separator: str
    """Text put after each document; empty for none."""
    separator_ids: tuple[int, ...]
    """Its tokens."""
    bos_id: int | None
    """Token that opens every sequence, or None."""
    special_ids: tuple[int, ...]
    """Tokens that are neither trained on nor analysed."""
    context_length: int
    """Tokens in a sequence, BOS included."""
    keep_first_position: bool
    """Whether position 0 is trained on and analysed."""

    @property
    def stream_per_sequence(self) -> int:
        """Tokens of the stream in a full sequence."""
        return self.context_length - (self.bos_id is not None)

    def stream_length(self, n_tokens: int) -> int:
        """Tokens of the stream that a table of at most `n_tokens` holds."""
        full, rest = divmod(n_tokens, self.context_length)
        return full * self.stream_per_sequence + max(rest - (self.bos_id is not None), 0)


def make_packing(
    tokenizer: Any, *, context_length: int, separator: str | None = None, keep_first_position: bool = False
) -> Packing:
    """How this tokenizer's model wants its sequences.

    separator: None for the model's end-of-text token. Raises `UsageError` where there is none, or where the separator
    or the context makes no sense.
    """
    if separator is None:
        separator = _end_of_text(tokenizer)
    ids = tuple(_separator_ids(tokenizer, separator))
    special = set(tokenizer.all_special_ids)
    bos = tokenizer.bos_token_id
    opens = tokenizer("a")["input_ids"][:1]
    bos_id = (
        bos
        if bos is not None and opens == [bos] and tokenizer("a", add_special_tokens=False)["input_ids"][:1] != [bos]
        else None
    )
    if bos_id is not None and context_length < 2:
        raise UsageError("--context-length 1 has no room for a token beside the tokenizer's BOS")
    return Packing(separator, ids, bos_id, tuple(sorted(special)), context_length, keep_first_position)


def encode_documents(
    texts: Iterable[str], tokenizer: Any, n_tokens: int, watch: Callable[[int], object] = lambda n: None
) -> Iterator[np.ndarray]:
    """Token ids (int32, no special tokens) of each document that has any, in order, until there are `n_tokens` in
    all; the last may be cut.

    watch: called with the number of new tokens after each batch.
    """
    wanted = n_tokens
    texts = iter(texts)
    while wanted > 0 and (batch := _next_batch(texts, wanted)):
        before = wanted
        for ids in _encode(tokenizer, batch, wanted):
            if wanted > 0 and ids.size:
                yield ids[:wanted]
                wanted -= min(ids.size, wanted)
        watch(before - wanted)


def pack(documents: Iterable[np.ndarray], packing: Packing, max_tokens: int) -> TokenTable:
    """The table of at most `max_tokens` tokens, fewer where the documents run out. `ResidscopeError` where there is
    no text at all."""
    separator = np.array(packing.separator_ids, np.int32)
    limit = packing.stream_length(max_tokens)
    ids: list[np.ndarray] = []
    lengths: list[int] = []
    n = 0
    for document in documents:
        if n >= limit:
            break
        ids += [document, separator]
        lengths.append(len(document) + len(separator))
        n += lengths[-1]
    n = min(n, limit)
    if n == 0:
        raise ResidscopeError(
            "there is no text: every document is empty, or there is none; check --dataset, --split and --text-column,"
            " or raise --max-tokens"
        )
    stream = np.concatenate(ids)[:n]  # [n]
    owner = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[:n]  # [n]
    return _cut(stream, owner, packing)


def _cut(stream: np.ndarray, owner: np.ndarray, packing: Packing) -> TokenTable:
    """Cut a stream (token ids and document ids, int32 [n]) into sequences."""
    n, per_sequence = len(stream), packing.stream_per_sequence
    bos = packing.context_length - per_sequence
    n_sequences = -(-n // per_sequence)
    index = np.arange(n)
    place = index + bos * (index // per_sequence + 1)  # [n]: where each token of the stream goes
    starts = np.arange(n_sequences) * packing.context_length  # [sequences]
    n_tokens = n + bos * n_sequences
    token_id = np.empty(n_tokens, np.int32)
    document = np.empty(n_tokens, np.int32)
    if packing.bos_id is not None:
        token_id[starts] = packing.bos_id
        document[starts] = owner[starts // packing.context_length * per_sequence]
    token_id[place] = stream
    document[place] = owner
    position = (np.arange(n_tokens) % packing.context_length).astype(np.int32)
    keep = ~np.isin(token_id, packing.special_ids)
    if not packing.keep_first_position:
        keep &= position != 0
    return TokenTable(token_id, document, position, keep)


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
    for text, ids in zip(texts, _ids(tokenizer, [text[:limit] for text in texts]), strict=True):
        # Tokens next to the cut may differ from those of the whole text; none of them may be used.
        if len(text) > limit and len(ids) < wanted + 64:
            (ids,) = _ids(tokenizer, [text])
        yield np.array(ids, np.int32)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)[
        "input_ids"
    ]


def _end_of_text(tokenizer: Any) -> str:
    vocabulary = tokenizer.get_vocab()
    for token in (*_END_OF_TEXT, tokenizer.eos_token):
        if token is not None and token in vocabulary:
            return token
    raise UsageError(
        "the tokenizer has no end-of-text token to put between documents; name one with --document-separator, or give"
        ' "" for none'
    )


def _separator_ids(tokenizer: Any, separator: str) -> list[int]:
    if not separator:
        return []
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[separator]] if separator in vocabulary else _ids(tokenizer, [separator])[0]
    if not ids or (tokenizer.unk_token_id in ids and separator != tokenizer.unk_token):
        raise UsageError(f"--document-separator {separator!r}: the tokenizer has no token for it")
    return ids
