"""What a tokenizer does, over kinds that mislead whoever reads names and counts."""

from functools import cache

import numpy as np
import pytest

from harvest.model.tokenizer import Tokenizer
from residscope.errors import IncompatibleError, UsageError
from tests.support.models import tiny_tokenizer
from tests.support.tokenizers import END, KINDS

TEXTS = (
    "the cat, the hat: if x:\n    return the_thing",
    "naïve café",
    "日本語 text 日本",
    "🙂🙃 and 👩‍👩‍👧",
    " two  spaces\n\n\tand tabs ",
    "don't say 'the' .",
    f"before {END} after <mask> and [x] tool\n\n",
    "",
)


@cache
def made(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind].make())


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_special_what_opens_and_what_separates(kind: str) -> None:
    tokenizer, right = made(kind), KINDS[kind]
    vocabulary = tokenizer.vocabulary
    assert tokenizer.opening == tuple(vocabulary[name] for name in right.opening)
    assert tokenizer.special_ids == {vocabulary[name] for name in right.special}
    assert tokenizer.end_of_text == right.separator
    if right.separator is not None:
        assert tokenizer.separator_ids(right.separator) == (vocabulary[right.separator],)
    for text in TEXTS:
        (ids,) = tokenizer.encode([text])
        assert ids == tokenizer.backend([text], add_special_tokens=False)["input_ids"][0]
        assert set(ids) <= tokenizer.ids


@pytest.mark.parametrize("kind", KINDS)
def test_joined_texts_are_what_the_tokenizer_decodes(kind: str) -> None:
    tokenizer = made(kind)
    for text in TEXTS:
        for ids in (tokenizer.encode([text])[0], tokenizer.backend([text])["input_ids"][0]):
            texts = tokenizer.texts(ids)
            assert len(texts) == len(ids)
            assert "".join(texts) == decode(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_whole_vocabularies_in_random_order(kind: str) -> None:
    tokenizer = made(kind)
    draw = np.random.default_rng(0)
    for n in (2, 5, 40, len(tokenizer.ids)):
        ids = draw.choice(sorted(tokenizer.ids), n, replace=n < len(tokenizer.ids)).tolist()
        texts = tokenizer.texts(ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == decode(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_has_the_text_that_it_adds(kind: str) -> None:
    tokenizer = made(kind)
    for text in ("the cat the hat, the cab", "aé日b 日本語日🙂b"):
        (ids,) = tokenizer.encode([text])
        whole, place = decode(tokenizer, ids), 0
        for i, own in enumerate(tokenizer.texts(ids)):
            head = decode(tokenizer, ids[: i + 1])
            place += len(own)
            if whole.startswith(
                head
            ):  # no part of a character at its end, nor anything that goes when the text goes on
                assert place == len(head), (text, i)


@pytest.mark.parametrize("kind", ["gpt-2", "llama-2", "gemma", "stub"])
def test_a_character_is_with_the_token_that_begins_it(kind: str) -> None:
    tokenizer = made(kind)
    (ids,) = tokenizer.encode(["日日🙂b"])
    texts = tokenizer.texts(ids)
    assert [text for text in texts[-11:] if text] == ["日", "日", "🙂", "b"]
    assert texts[-11:] == ["日", "", "", "日", "", "", "🙂", "", "", "", "b"]
    assert "".join(tokenizer.texts(ids[-10:])) == decode(tokenizer, ids[-10:])  # begins within a character


def test_texts_of_words_and_of_spaces() -> None:
    def texts(kind: str, text: str) -> list[str]:
        return made(kind).texts(made(kind).encode([text])[0])

    assert texts("gemma", "x:\n    the") == ["x", ":", "\n", "  ", " ", " the"]
    assert texts("llama-2", "the the") == ["the", " the"]
    assert texts("clip", "the the ab") == ["the", " the", " a", "b"]
    assert texts("slow", "the ab the") == ["the", " a", "b", " the"]
    assert texts("word-pieces", "the ab") == ["the", " a", "b"]
    assert texts("added", f"a <mask>b {END}") == ["a", "<mask>", "b", " ", END]
    assert made("llama-2").text(made("llama-2").encode(["the"])[0]) == [" the"]


def test_long_texts_are_cut_into_windows_without_a_seam() -> None:
    tokenizer = made("llama-2")
    text = "the é日 cat 🙂 " * 40
    ids = tokenizer.encode([text])[0]
    texts = tokenizer.texts(ids)
    assert "".join(texts) == text
    at = {"é": 0, "日": 0, "🙂": 0}
    for i, own in zip(ids, texts, strict=True):
        for sign in at:
            at[sign] += sign in own
            lead = f"<0x{sign.encode()[0]:02X}>"
            assert sign not in own or i in (tokenizer.vocabulary[lead], tokenizer.vocabulary.get(sign))
    assert set(at.values()) == {40}


def test_ids_that_are_not_there_are_named() -> None:
    tokenizer = made("holes")
    assert sorted(tokenizer.ids)[:3] == [7, 10, 13]
    a, b = tokenizer.encode(["ab"])[0]
    assert tokenizer.texts([a, 8, b, 10**6, -1]) == ["a", "<token 8>", "b", "<token 1000000>", "<token -1>"]
    assert tokenizer.text([8, a]) == ["<token 8>", "a"]
    assert tokenizer.texts([]) == []


def test_backends_that_hide_ids_behind_one_name_have_them_all() -> None:
    assert made("stub").ids == set(range(1, 259))


def test_separators_of_ones_own() -> None:
    tokenizer = made("ordinary-end")
    end = tokenizer.vocabulary[END]
    assert tokenizer.separator_ids(END) == (end,)
    assert end not in tokenizer.special_ids
    newline = tokenizer.separator_ids("\n")
    assert newline[0] not in tokenizer.masked_ids("\n")  # lines of the text are text
    assert len(tokenizer.separator_ids("é")) == 2  # and not the byte that is named so
    assert tokenizer.separator_ids("") == ()
    with pytest.raises(UsageError, match="document-separator"):
        made("unigram").separator_ids("\u65e5")


def test_a_separator_that_no_text_gives_is_masked() -> None:
    tokenizer = Tokenizer(tiny_tokenizer(bos=False))
    core = tokenizer.backend.backend_tokenizer
    assert tokenizer.masked_ids(END) == tokenizer.special_ids == {core.token_to_id(END), core.token_to_id("<|begin|>")}


class Damaged:
    """A tokenizer that loads, and raises where it is asked for anything."""

    all_special_ids = ("x",)
    eos_token = ("unhashable",)

    def __call__(self, *texts: object, **arguments: object) -> object:
        raise TypeError("argument 'ids'")

    batch_decode = get_vocab = __call__


def test_what_a_damaged_tokenizer_raises_is_one_line() -> None:
    tokenizer = Tokenizer(Damaged())
    for ask, what in (
        (lambda: tokenizer.encode(["a"]), "cannot encode a text"),
        (lambda: tokenizer._decode([[1]]), "cannot decode its tokens"),
        (lambda: tokenizer.vocabulary, "vocabulary is damaged"),
        (lambda: tokenizer._declared, "special tokens are damaged"),
    ):
        with pytest.raises(IncompatibleError, match=f"the tokenizer.*{what} \\("):
            ask()
