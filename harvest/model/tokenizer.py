"""Finds out what a tokenizer does by using it: its ids and special ids, the tokens that it puts around a text, the
token that ends a document, and the text of each token.

How: names and classes differ between tokenizers, so nothing depends on them. The tokens around a text are what encoding
with special tokens adds to encoding without. The text of a token is what decoding adds when the token is appended. A
byte-level tokenizer may cut a character into several tokens, and some decoders change the end of a text when it
continues; so the texts of consecutive tokens are compared to what the tokenizer decodes them to together.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from residscope.errors import IncompatibleError, UsageError
from residscope.reading import reading

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
"""Preferred to `eos_token`, which in a chat model ends a turn."""
_PROBES = ("a", "b c", "The 1.")
_WINDOW, _AROUND = 16, 4
_MOST_AT_ONCE = 2048
PARTIAL = "\N{REPLACEMENT CHARACTER}"
"""What a part of a character decodes to."""


class Tokenizer:
    """A tokenizer of any kind; `backend` is transformers' tokenizer."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._after_another: dict[int, str] = {}

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids by name; lacks some ids if two share a name."""
        with reading("the tokenizer's vocabulary is damaged"):
            return {name: int(i) for name, i in self.backend.get_vocab().items()}

    @cached_property
    def ids(self) -> frozenset[int]:
        """All ids. There may be gaps, and more or fewer ids than rows of the model's embedding."""
        found = set(self.vocabulary.values())
        if len(found) < len(self.backend):
            unknown = getattr(self.backend, "unk_token", None)
            for i in set(range(len(self.backend))) - found:
                with contextlib.suppress(Exception):  # Each backend has its own way to report an unknown id.
                    if self.backend.convert_ids_to_tokens(i) not in (None, unknown):
                        found.add(i)
        return frozenset(map(int, found))

    @cached_property
    def _edges(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Opening and closing of a text, and the part of the opening that is added even without special tokens."""
        plain, full = (self._call(list(_PROBES), add_special_tokens=special) for special in (False, True))
        always = tuple(self._call([""], add_special_tokens=False)[0])
        if not (self._declared.issuperset(always) and all(tuple(ids[: len(always)]) == always for ids in plain)):
            always = ()
        inner = [ids[len(always) :] for ids in plain]
        places = [{at for at in range(len(b)) if b[at : at + len(a)] == a} for a, b in zip(inner, full, strict=True)]
        if not (common := set.intersection(*places)):
            found = "with special tokens the tokenizer encodes a text differently"
            raise IncompatibleError(f"the tokens that open a sequence cannot be determined: {found}")
        at = min(common)
        return tuple(full[0][:at]), tuple(full[0][at + len(inner[0]) :]), always

    @property
    def opening(self) -> tuple[int, ...]:
        """Ids that encoding puts before a text."""
        return self._edges[0]

    @cached_property
    def _declared(self) -> set[int]:
        """Ids that the tokenizer says are special."""
        with reading("the tokenizer's special tokens are damaged"):
            found = {int(i) for i in self.backend.all_special_ids if i is not None}
        with contextlib.suppress(NotImplementedError, AttributeError, TypeError):  # not of every backend
            found.update(i for i, token in self.backend.added_tokens_decoder.items() if token.special)
        return found

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are not text: those that the tokenizer says are special, and those that it puts around a text."""
        return frozenset(map(int, self._declared.union(*self._edges)))

    @cached_property
    def end_of_text(self) -> str | None:
        """Name of the token that ends a document: a well-known name that is special here, or `eos_token`, or None."""
        known = [name for name in _END_OF_TEXT if self.vocabulary.get(name) in self.special_ids]
        names = (name for name in (*known, self.backend.eos_token) if isinstance(name, str))
        return next((name for name in names if name in self.vocabulary), None)

    def separator_ids(self, separator: str) -> tuple[int, ...]:
        """Ids of a text between documents. `UsageError` if the tokenizer has none for it."""
        i = self.vocabulary.get(separator)
        # A name may stand for other text: byte-level tokenizers name the byte 0xE9 as é.
        if i is not None and (i in self.special_ids or self.text([i]) == [separator]):
            return (i,)
        (ids,) = self.encode([separator])
        if separator and (not ids or getattr(self.backend, "unk_token_id", None) in ids):
            raise UsageError(f"--document-separator {separator!r}: the tokenizer has no token for it")
        return tuple(ids)

    def masked_ids(self, separator: str) -> frozenset[int]:
        """The special ids, and a separator's single id if encoding text does not produce it."""
        ids = self.separator_ids(separator) if separator else ()
        return self.special_ids.union(ids if len(ids) == 1 and self.encode([separator]) != [list(ids)] else ())

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without tokens around it."""
        always = self._edges[2]
        return [ids[len(always) :] if always else ids for ids in self._call(texts, add_special_tokens=False)]

    def _call(self, texts: list[str], **arguments: bool) -> list[list[int]]:
        # add_special_tokens is the only keyword that all backends accept.
        with reading("the tokenizer cannot encode a text"):
            return self.backend(texts, **arguments)["input_ids"] if texts else []

    def _decode(self, sequences: list[list[int]]) -> list[str]:
        with reading("the tokenizer cannot decode its tokens"):
            return self.backend.batch_decode(sequences, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def text(self, ids: Iterable[int]) -> list[str]:
        """The text of each of `ids` by itself, as it reads after another token; U+FFFD for a part of a character."""
        ids = [int(i) for i in ids]
        new = set(ids) - self._after_another.keys()
        self._after_another |= {i: f"<token {i}>" for i in new.difference(self.ids)}
        if new := sorted(new & self.ids):
            before = (self.encode(["a"])[0] or sorted(self.ids))[-1]
            (start,) = self._decode([[before]])
            for i, pair in zip(new, self._decode([[before, i] for i in new]), strict=True):
                self._after_another[i] = pair[len(start) :] if pair.startswith(start) else self._decode([[i]])[0]
        return [self._after_another[i] for i in ids]

    def texts(self, ids: Iterable[int]) -> list[str]:
        """The texts of consecutive tokens; joined, they are what the tokens decode to. A character belongs to the token
        that begins it; a token that only continues one has "". An id that the tokenizer lacks becomes <token id>."""
        ids = [int(i) for i in ids]
        known = [i for i in ids if i in self.ids]
        if len(known) < len(ids):
            found = iter(self.texts(known))
            return [next(found) if i in self.ids else self.text([i])[0] for i in ids]
        if not ids:
            return []
        whole, first = self._decode([ids, ids[:1]])
        texts = [first, *self.text(ids[1:])]  # Right for most tokens, and fast.
        if "".join(texts) != whole:
            texts = list(self._one_by_one(ids, _WINDOW))
        if "".join(texts) != whole and len(ids) <= _MOST_AT_ONCE:
            texts = list(self._one_by_one(ids, len(ids)))
        return texts

    def _one_by_one(self, ids: list[int], size: int) -> Iterator[str]:
        """The texts of tokens from what decoding adds with each, in windows of about `size` tokens. A decoder may
        garble a whole window that begins or ends within a character, so windows begin and end between characters."""
        alone = self.text(ids)
        low = start = 0  # where the window begins, and the tokens whose text is not known yet
        while start < len(ids):
            stop = min(start + size, len(ids))
            if start and not any(PARTIAL in text for text in alone[start:stop]):
                before, after = self._decode([ids[low:start], ids[low : stop + _AROUND]])
                if after.startswith(before + "".join(alone[start:stop])):
                    yield from alone[start:stop]
                    low, start = max(low, stop - _AROUND), stop
                    continue
            heads = self._decode([ids[low : i + 1] for i in range(low, stop)])
            last = low + len(heads) == len(ids)
            whole = heads[-1] if last else min(heads[-_AROUND:], key=lambda head: head.count(PARTIAL))
            closed = [low + i + 1 for i, head in enumerate(heads) if whole.startswith(head) and head != whole]
            stop = len(ids) if last else closed[-1] if closed else 0
            if stop <= start:
                size *= 2
                continue
            cuts = [0, *_ends(heads, whole)]
            if last:
                cuts[-1] = len(whole)
            yield from (whole[a:b] for a, b in itertools.pairwise(cuts[start - low : stop - low + 1]))
            low, start = max([i for i in closed if i <= stop - _AROUND], default=low), stop


def _ends(heads: Sequence[str], whole: str) -> Iterator[int]:
    """Where each token's part of the text `whole` ends, given what the tokens up to each decode to."""
    settled = end = 0
    for head in heads:
        equal = (a == b for a, b in zip(head, whole, strict=False))
        same = sum(itertools.takewhile(bool, equal))
        settled = max(settled, same)
        begun = head.startswith(PARTIAL, same)  # An incomplete character belongs to this token.
        end = max(end, min(settled + begun, len(whole)))
        yield end
