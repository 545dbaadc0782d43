"""Tokenizers of many kinds, each of a few hundred tokens: such as models have, and what misleads who reads names."""

from collections.abc import Callable
from typing import Any, NamedTuple

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

END = "<|endoftext|>"
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?()'-\n"
_BYTES = [f"<0x{i:02X}>" for i in range(256)]


class Kind(NamedTuple):
    """A tokenizer and what is true of it; tokens by name."""

    make: Callable[[], Any]
    opening: tuple[str, ...] = ()
    separator: str | None = None
    special: frozenset[str] = frozenset()
    """All of its special tokens."""


def _byte_level(special: list[Any] | None = None, merges: list[tuple[str, str]] | None = None) -> Tokenizer:
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges or [])]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges or []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special or [])
    return core


def _opened(core: Tokenizer, template: str, names: list[str]) -> Tokenizer:
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, core.token_to_id(name)) for name in names]
    )
    return core


def _fast(core: Tokenizer, **names: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)


def _llama3() -> Any:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"]
    core = _opened(_byte_level(names), f"{names[0]} $A", names[:1])
    return _fast(core, bos_token=names[0], eos_token=names[2])


def _glm() -> Any:
    core = _opened(_byte_level([END, "[gMASK]", "<sop>"]), "[gMASK] <sop> $A", ["[gMASK]", "<sop>"])
    return _fast(core, eos_token=END, pad_token=END)


def _xglm() -> Any:
    core = _opened(_byte_level(["<s>", "<pad>", "</s>"]), "</s> $A", ["</s>"])
    return _fast(core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _gpt2() -> Any:
    return _fast(_byte_level([END], [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("Ã", "©")]), eos_token=END, bos_token=END)


def _pieces(normalizer: Any, decoder: list[Any], *, added: tuple[str, ...] = ()) -> Tokenizer:
    """As SentencePiece has it: U+2581 for a space, and bytes for what has no piece."""
    names = ["<pad>", "</s>", "<s>", "<unk>", *_BYTES, "▁", *_LETTERS, "he", "▁t", "▁the", "▁▁", "▁▁▁▁", "é"]
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("▁", "▁"), ("▁▁", "▁▁")]
    core = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)}, merges=merges, byte_fallback=True, unk_token="<unk>"
        )
    )
    core.normalizer = normalizer
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *decoder])
    core.add_special_tokens(names[:4])
    core.add_tokens([AddedToken(name, normalized=False) for name in added])
    return core


def _llama2() -> Any:
    steps = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core = _opened(_pieces(steps, [decoders.Strip(" ", 1, 0)]), "<s> $A", ["<s>"])
    return _fast(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _no_prefix() -> Any:
    return _fast(_pieces(normalizers.Replace(" ", "▁"), []), eos_token="</s>", unk_token="<unk>")


def _gemma() -> Any:
    core = _opened(_pieces(normalizers.Replace(" ", "▁"), [], added=("▁▁", "▁▁▁▁", "\n\n")), "<s> $A", ["<s>"])
    return _fast(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def _metaspace_first() -> Any:
    core = _pieces(None, [])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return _fast(core, eos_token="</s>", unk_token="<unk>")


def _unigram() -> Any:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((sign, -9.0) for sign in "▁" + _LETTERS), ("▁the", -3.0), ("he", -4.0)]
    core = Tokenizer(models.Unigram(pieces, 0, False))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["<unk>", "</s>"])
    return _fast(_opened(core, "$A </s>", ["</s>"]), unk_token="<unk>", eos_token="</s>")


def _word_pieces() -> Any:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_LETTERS, *(f"##{sign}" for sign in _LETTERS), "the", "##he"]
    core = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.add_special_tokens(names[:4])
    core = _opened(core, "[CLS] $A [SEP]", ["[CLS]", "[SEP]"])
    return _fast(core, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


def _clip() -> Any:
    names = [*_LETTERS, *(f"{sign}</w>" for sign in _LETTERS), "th", "the</w>", "<start>", "<end>", "<unk>"]
    merges = [("t", "h"), ("th", "e</w>")]
    core = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=merges,
            end_of_word_suffix="</w>",
            unk_token="<unk>",
        )
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.BPEDecoder(suffix="</w>")
    core.add_special_tokens(["<start>", "<end>", "<unk>"])
    core = _opened(core, "<start> $A <end>", ["<start>", "<end>"])
    return _fast(core, bos_token="<start>", eos_token="<end>", unk_token="<unk>")


def _holes() -> Any:
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={name: 3 * i + 7 for i, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([END])
    return _fast(core, eos_token=END)


def _both_ends() -> Any:
    core = _opened(_byte_level(["<bos>", "<eos>"]), "<bos> $A <eos>", ["<bos>", "<eos>"])
    return _fast(core, bos_token="<bos>", eos_token="<eos>")


def _ordinary_end() -> Any:
    """END is in the vocabulary, and nothing says that it is special."""
    core = _byte_level(["<eos>"])
    core.add_tokens([AddedToken(END, normalized=False, special=False)])
    return _fast(core, eos_token="<eos>")


def _added() -> Any:
    core = _byte_level([END])
    core.add_tokens(
        [AddedToken("<mask>", lstrip=True), AddedToken("[x]", rstrip=True), AddedToken("tool", single_word=True)]
    )
    return _fast(core, eos_token=END)


class _Words(transformers.PreTrainedTokenizer):
    """A slow tokenizer of words cut into letters, all but a word's last with `@@`."""

    def __init__(self, **names: Any) -> None:
        signs = [*_LETTERS, *(f"{sign}@@" for sign in _LETTERS)]
        self._ids = {sign: i for i, sign in enumerate(["<unk>", "</s>", *signs, "the"])}
        self._names = {i: sign for sign, i in self._ids.items()}
        super().__init__(unk_token="<unk>", eos_token="</s>", **names)

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        found = []
        for word in text.split():
            found += [word] if word == "the" else [*(f"{sign}@@" for sign in word[:-1]), word[-1]]
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._names.get(index, "<unk>")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace("@@ ", "")

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        return [1, *token_ids_0]


class _Stub:
    """As the mistral-common backend: no keyword that it does not know, names that say too little, no added tokens."""

    all_special_ids = (1, 2)
    eos_token, bos_token, unk_token = "</s>", "<s>", None

    def __init__(self) -> None:
        self._core = _opened(_byte_level(["<s>", "</s>"]), "<s> $A", ["<s>"])

    def _out(self, i: int) -> int:
        return i + 3 if i < 256 else i - 255

    def _in(self, i: int) -> int:
        return i - 3 if i > 2 else i + 255

    def __len__(self) -> int:
        return 259

    def get_vocab(self) -> dict[str, int]:
        return {"<s>": 1, "</s>": 2, **{chr(i): self._out(self._core.token_to_id(chr(i)) or 0) for i in range(33, 127)}}

    def convert_ids_to_tokens(self, i: int) -> str:
        if not 0 < i < 259:
            raise IndexError(i)
        return self._core.decode([self._in(i)], skip_special_tokens=False)

    @property
    def added_tokens_decoder(self) -> Any:
        raise NotImplementedError

    def __call__(self, text: list[str], add_special_tokens: bool = True, **others: Any) -> dict[str, Any]:
        if others:
            raise ValueError(f"Kwargs {list(others)} are not supported")
        found = self._core.encode_batch(text, add_special_tokens=add_special_tokens)
        return {"input_ids": [[self._out(i) for i in one.ids] for one in found]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return self._core.decode([self._in(i) for i in ids], skip_special_tokens=False)

    def batch_decode(
        self, sequences: list[list[int]], skip_special_tokens: bool, clean_up_tokenization_spaces: Any
    ) -> Any:
        return [self.decode(ids) for ids in sequences]


def _of(*names: str) -> frozenset[str]:
    return frozenset(names)


KINDS = {
    "llama-3": Kind(
        _llama3,
        ("<|begin_of_text|>",),
        "<|end_of_text|>",
        _of("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"),
    ),
    "glm": Kind(_glm, ("[gMASK]", "<sop>"), END, _of(END, "[gMASK]", "<sop>")),
    "xglm": Kind(_xglm, ("</s>",), "</s>", _of("<s>", "</s>", "<pad>")),
    "gpt-2": Kind(_gpt2, (), END, _of(END)),
    "llama-2": Kind(_llama2, ("<s>",), "</s>", _of("<s>", "</s>", "<unk>", "<pad>")),
    "no-prefix": Kind(_no_prefix, (), "</s>", _of("<s>", "</s>", "<unk>", "<pad>")),
    "gemma": Kind(_gemma, ("<s>",), "</s>", _of("<s>", "</s>", "<unk>", "<pad>")),
    "metaspace-first": Kind(_metaspace_first, (), "</s>", _of("<s>", "</s>", "<unk>", "<pad>")),
    "unigram": Kind(_unigram, (), "</s>", _of("<unk>", "</s>")),
    "word-pieces": Kind(_word_pieces, ("[CLS]",), None, _of("[PAD]", "[UNK]", "[CLS]", "[SEP]")),
    "clip": Kind(_clip, ("<start>",), "<end>", _of("<start>", "<end>", "<unk>")),
    "holes": Kind(_holes, (), END, _of(END)),
    "both-ends": Kind(_both_ends, ("<bos>",), "<eos>", _of("<bos>", "<eos>")),
    "ordinary-end": Kind(_ordinary_end, (), "<eos>", _of("<eos>")),
    "added": Kind(_added, (), END, _of(END)),
    "slow": Kind(_Words, ("</s>",), "</s>", _of("<unk>", "</s>")),
    "stub": Kind(_Stub, ("<s>",), "</s>", _of("<s>", "</s>")),
}
"""By what they are like."""
