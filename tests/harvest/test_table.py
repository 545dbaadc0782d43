"""Packing: every token of every document once and in order, separators, BOS, masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvest.model.tokenizer import Tokenizer
from harvest.table import pack
from harvest.text.packing import Packing, make_packing
from residscope.errors import ResidscopeError, UsageError
from tests.support.models import BOS, EOS, tiny_tokenizer
from tests.support.tokenizers import KINDS

EOS_ID, BOS_ID = 256, 257


def packing(
    context: int, *, bos: bool = False, separators: tuple[int, ...] = (EOS_ID,), first: bool = False
) -> Packing:
    return Packing(EOS, separators, (BOS_ID,) if bos else (), (EOS_ID, BOS_ID), context, first)


def naive(documents: list[list[int]], how: Packing, max_tokens: int) -> list[tuple[int, int, int]]:
    """(token, document, position), one token at a time."""
    stream = [(t, d) for d, ids in enumerate(documents) for t in [*ids, *how.separator_ids]]
    rows: list[tuple[int, int, int]] = []
    while stream and len(rows) < max_tokens:
        position = len(rows) % how.context_length
        if position < len(how.opening):
            if max_tokens - len(rows) <= len(how.opening) - position:
                break
            rows.append((how.opening[position], stream[0][1], position))
        else:
            token, document = stream.pop(0)
            rows.append((token, document, position))
    return rows


@given(
    documents=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=12), min_size=1, max_size=8),
    context=st.integers(2, 9),
    bos=st.booleans(),
    separators=st.sampled_from([(), (EOS_ID,), (10, 11)]),
    max_tokens=st.integers(2, 70),
)
def test_packing_equals_one_token_at_a_time(
    documents: list[list[int]], context: int, bos: bool, separators: tuple[int, ...], max_tokens: int
) -> None:
    how = packing(context, bos=bos, separators=separators)
    table = pack((np.array(d, np.int32) for d in documents), how, max_tokens)
    rows = [tuple(map(int, row)) for row in zip(table.token_id, table.document, table.position, strict=True)]
    assert rows == naive(documents, how, max_tokens)
    assert all(column.dtype == np.int32 for column in table[:3])
    assert len(rows) <= max_tokens


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=10), context=st.integers(2, 20), bos=st.booleans())
def test_every_document_token_appears_once_and_in_order(lengths: list[int], context: int, bos: bool) -> None:
    documents = [np.arange(n, dtype=np.int32) % 256 for n in lengths]
    table = pack(iter(documents), packing(context, bos=bos), 10**6)
    text = ~np.isin(table.token_id, (EOS_ID, BOS_ID))
    np.testing.assert_array_equal(table.token_id[text], np.concatenate(documents))
    np.testing.assert_array_equal(np.bincount(table.document[text]), lengths)
    assert (table.token_id == EOS_ID).sum() == len(lengths)
    starts = np.flatnonzero(table.position == 0)
    np.testing.assert_array_equal(np.diff(starts), context)
    assert len(table.token_id) - starts[-1] <= context
    assert not bos or (table.token_id[starts] == BOS_ID).all()


@pytest.mark.parametrize("first", [False, True])
def test_the_mask_leaves_out_special_tokens_and_first_positions(first: bool) -> None:
    table = pack(iter([np.arange(5, dtype=np.int32), np.arange(3, dtype=np.int32)]), packing(4, first=first), 100)
    # 0 1 2 3 | 4 E 0 1 | 2 E
    expected = [first, 1, 1, 1, first, 0, 1, 1, first, 0]
    np.testing.assert_array_equal(table.keep, np.array(expected, bool))


def test_a_last_sequence_of_nothing_but_bos_is_left_out() -> None:
    table = pack(iter([np.arange(100, dtype=np.int32)]), packing(8, bos=True), 17)
    assert len(table.token_id) == 16


def test_no_text_is_refused() -> None:
    with pytest.raises(ResidscopeError, match="no text"):
        pack(iter([]), packing(8), 1)
    with pytest.raises(UsageError, match=r"^--max-tokens 1 leaves no room for text: raise it$"):
        pack(iter([np.arange(5, dtype=np.int32)]), packing(8, bos=True), 1)


@pytest.mark.parametrize("bos", [False, True])
def test_bos_opens_sequences_only_where_the_tokenizer_puts_one(bos: bool) -> None:
    how = make_packing(Tokenizer(tiny_tokenizer(bos=bos)), context_length=16)
    assert how.opening == ((BOS_ID,) if bos else ())
    assert how.separator == EOS
    assert how.separator_ids == (EOS_ID,)
    assert set(how.special_ids) == {EOS_ID, BOS_ID}  # BOS is added as special, whether or not it has the name


def test_a_separator_of_ones_own() -> None:
    tokenizer = Tokenizer(tiny_tokenizer(bos=False))
    assert make_packing(tokenizer, context_length=16, separator="").separator_ids == ()
    assert make_packing(tokenizer, context_length=16, separator=BOS).separator_ids == (BOS_ID,)
    two = make_packing(tokenizer, context_length=16, separator="\n\n").separator_ids
    assert len(two) == 2
    assert two[0] == two[1] == tokenizer.encode(["\n"])[0][0]


def test_a_tokenizer_without_end_of_text_says_so() -> None:
    with pytest.raises(UsageError, match="--document-separator"):
        make_packing(Tokenizer(KINDS["word-pieces"].make()), context_length=16)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    context=st.integers(2, 20),
    bos=st.booleans(),
    max_tokens=st.integers(3, 300),
)
def test_without_packing_each_sequence_is_the_beginning_of_one_document(
    lengths: list[int], context: int, bos: bool, max_tokens: int
) -> None:
    documents = [(np.arange(n) + 17 * i).astype(np.int32) % 256 for i, n in enumerate(lengths)]
    how = packing(context, bos=bos, separators=())._replace(packed=False)
    table = pack(iter(documents), how, max_tokens)
    room = context - bos
    expected: list[list[int]] = []
    for ids in documents:
        left = max_tokens - sum(map(len, expected))
        row = [BOS_ID] * bos + ids[:room].tolist()
        if left > bos:
            expected.append(row[:left])
    expected.sort(key=len, reverse=True)
    starts = np.flatnonzero(table.position == 0)
    found = [part.tolist() for part in np.split(table.token_id, starts[1:])]
    assert found == expected
    np.testing.assert_array_equal(table.document, np.repeat(np.arange(len(expected)), [len(row) for row in expected]))
    assert table.position.max() < context
    assert not table.keep[starts].any()
    assert len(table.token_id) <= max_tokens


def test_without_packing_there_is_no_separator() -> None:
    how = make_packing(Tokenizer(tiny_tokenizer(bos=True)), context_length=16, packed=False)
    assert (how.separator, how.separator_ids, how.longest_document, how.document_extra) == ("", (), 15, 1)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_special_token_nor_separator_is_kept(kind: str, packed: bool) -> None:
    tokenizer = Tokenizer(KINDS[kind].make())
    ends = "." if KINDS[kind].separator is None else None  # an ordinary token that separates
    how = make_packing(tokenizer, context_length=9, separator=ends, packed=packed, keep_first_position=True)
    documents = [np.array(ids, np.int32) for ids in tokenizer.encode(["the cat", "a", "a long text"])]
    special = np.array(sorted(tokenizer.special_ids), np.int32)
    documents.append(np.concatenate([documents[1], special, documents[1]]))
    table = pack(iter(documents), how, 1000)
    starts = np.flatnonzero(table.position == 0)
    for i, token in enumerate(how.opening):
        assert (table.token_id[starts + i] == token).all()
        assert not table.keep[starts + i].any()
    text = ~np.isin(table.token_id, special)
    assert table.keep.sum() == sum((~np.isin(ids, special)).sum() for ids in documents if packed) or not packed
    assert not (table.keep & ~text).any()
    if not packed:
        np.testing.assert_array_equal(table.keep, text)


def test_an_opening_of_several_tokens_is_masked_whatever_they_are() -> None:
    how = Packing("", (7,), (1, 2), (), 5, keep_first_position=True)
    table = pack(iter([np.array([1, 7, 2, 9], np.int32)]), how, 100)
    np.testing.assert_array_equal(table.token_id, [1, 2, 1, 7, 2, 1, 2, 9, 7])
    np.testing.assert_array_equal(table.keep, np.array([0, 0, 1, 1, 1, 0, 0, 1, 0], bool))


def test_a_context_that_the_opening_fills_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 3"):
        make_packing(Tokenizer(KINDS["glm"].make()), context_length=2)
