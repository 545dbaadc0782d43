"""Text of tokens: no character is cut, none is lost, and joined texts are what the tokenizer itself decodes."""

from itertools import pairwise
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from analysis.model.token_text import TokenBytes, continues_character, texts_of
from tests.support.models import BOS, EOS, tiny_tokenizer

TEXTS = ("plain text", "naïve café", "日本語 text", "🙂🙃 and 👩‍👩‍👧", "\ttabs\nand lines\r\n", "")


def sentencepiece_tokenizer() -> Any:
    """Pieces with a sign for the space, and single bytes for what no piece covers."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "te"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("t", "e")], unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tiny_tokenizer(bos=False) if request.param == "bytes" else sentencepiece_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_joined_texts_are_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = texts_of(TokenBytes(tokenizer).get(ids))
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_belongs_to_the_token_of_its_first_byte() -> None:
    ids = tiny_tokenizer(bos=False)("aé日🙂b", add_special_tokens=False)["input_ids"]
    data = TokenBytes(tiny_tokenizer(bos=False)).get(ids)
    assert texts_of(data) == ["a", "é", "", "日", "", "", "🙂", "", "", "", "b"]
    assert [continues_character(part) for part in data] == [text == "" for text in texts_of(data)]


@given(st.text(max_size=30), st.lists(st.integers(0, 60), max_size=8))
def test_any_cut_of_any_text_comes_back_whole(text: str, cuts: list[int]) -> None:
    data = text.encode(errors="ignore")
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    parts = [data[a:b] for a, b in pairwise(places)]
    assert "".join(texts_of(parts)) == data.decode()


def test_special_tokens_are_named_and_unknown_ids_are_empty() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    known = TokenBytes(tokenizer)
    ids = [tokenizer.eos_token_id, tokenizer.bos_token_id, 5000]
    assert known.get(ids) == [EOS.encode(), BOS.encode(), b""]
    assert known.get([]) == []


def test_what_is_no_text_does_not_stop_it() -> None:
    assert texts_of([]) == []
    assert texts_of([b"\xa9", b"x"]) == ["", "x"]  # cut off before the character's first byte
    assert texts_of([b"\xc3", b"x"]) == ["\ufffd", "x"]
    assert texts_of([b"a", b"\xe6\x97"]) == ["a", "\ufffd"]
    assert texts_of([b"", b"a", b""]) == ["", "a", ""]
