"""Documents to token ids: all that are wanted, in order, and no more text than they need."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvest.model.tokenizer import Tokenizer
from harvest.text.encode import encode_documents
from tests.support.models import tiny_tokenizer

TOKENIZER: Any = tiny_tokenizer(bos=True)


@given(texts=st.lists(st.text(st.characters(max_codepoint=255), max_size=30), max_size=10), wanted=st.integers(1, 100))
def test_encoding_stops_at_what_is_wanted(texts: list[str], wanted: int) -> None:
    tokenizer = TOKENIZER
    whole = [ids for text in texts if (ids := tokenizer(text, add_special_tokens=False)["input_ids"])]
    flat = [t for ids in whole for t in ids][:wanted]
    found = list(encode_documents(texts, Tokenizer(tokenizer), wanted))
    assert [int(t) for ids in found for t in ids] == flat
    assert all(len(ids) for ids in found)


def test_a_long_text_is_tokenised_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0

    class Counting:
        all_special_ids = ()

        def __call__(self, texts: list[str], **options: Any) -> Any:
            nonlocal longest
            longest = max([longest, *map(len, texts)])
            return TOKENIZER(texts, **options)

    text = "abcdefg " * 100_000
    (ids,) = encode_documents([text], Tokenizer(Counting()), 50)
    np.testing.assert_array_equal(ids, TOKENIZER(text[:50], add_special_tokens=False)["input_ids"])
    assert longest < 10_000


def test_encoding_takes_the_beginning_of_each_document() -> None:
    texts = ["abcdef", "", "gh", "ijklmnop"]
    found = list(encode_documents(texts, Tokenizer(TOKENIZER), 9, longest=4))
    whole = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [ids.tolist() for ids in found] == [whole[0][:4], whole[2], whole[3][:3]]
