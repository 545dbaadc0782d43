"""The text of tokens, so that no character is garbled.

A byte-level or byte-fallback tokenizer may cut a character into several tokens, each of which decodes to nonsense
alone. So tokens are turned into bytes, bytes of consecutive tokens are joined, and a character belongs whole to the
token that holds its first byte; a token that only continues a character has no text of its own.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a space."""


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""The characters by which byte-level tokenizers name bytes (Radford et al. 2019, the GPT-2 encoder): printable Latin-1
for itself, the rest in order from U+0100."""


class TokenBytes:
    """The bytes of each token of a tokenizer; `get(ids)` looks them up."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): text.encode() for text, i in tokenizer.get_added_vocab().items()}
        self._kind = _kind(tokenizer)
        self._known: dict[int, bytes] = {}

    def get(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of each of `ids`; none for an id that the tokenizer does not have."""
        ids = [int(i) for i in ids]
        new = sorted(set(ids) - self._known.keys())
        for i, name in zip(new, self._tokenizer.convert_ids_to_tokens(new), strict=True):
            self._known[i] = self._bytes(i, name)
        return [self._known[i] for i in ids]

    def _bytes(self, i: int, name: str | None) -> bytes:
        if i in self._added:
            return self._added[i]
        if name is None:
            return b""
        if self._kind == "bytes":
            return b"".join(bytes([_BYTE_OF[sign]]) if sign in _BYTE_OF else sign.encode() for sign in name)
        if self._kind == "pieces":
            if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
                return bytes([int(name[3:5], 16)])
            return name.replace(_SPACE, " ").encode()
        return self._tokenizer.decode([i]).encode()


def _kind(tokenizer: Any) -> str:
    """How the tokenizer names its tokens: by bytes, by pieces of text with a sign for the space, or in a way of its
    own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "bytes" if hasattr(tokenizer, "byte_decoder") else "pieces"
    decoder = bytes(backend.decoder.__getstate__()).decode() if backend.decoder else ""
    if '"ByteLevel"' in decoder:
        return "bytes"
    return "pieces" if any(word in decoder for word in ('"ByteFallback"', '"Metaspace"', _SPACE, r"\u2581")) else "own"


def texts_of(token_bytes: Sequence[bytes]) -> list[str]:
    """The text of each of some consecutive tokens; joined it is their text. Bytes before the first whole character
    belong to no token, and bytes that are not UTF-8 become U+FFFD."""
    data = b"".join(token_bytes)
    signs = np.frombuffer(data, np.uint8)
    first = np.append(np.flatnonzero(signs & 0xC0 != 0x80), len(data))  # first bytes of characters
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in token_bytes], dtype=np.int64)])
    cuts = first[np.minimum(np.searchsorted(first, offsets), len(first) - 1)].tolist()
    return [data[start:stop].decode(errors="replace") for start, stop in pairwise(cuts)]


def continues_character(token_bytes: bytes) -> bool:
    """Whether a token holds nothing but later bytes of a character."""
    return bool(token_bytes) and all(byte & 0xC0 == 0x80 for byte in token_bytes)
