"""What a harvest is asked to do: one frozen dataclass, from which the command line is generated.

Checked once, when made, as far as that needs neither the model nor the text. What it does not do: resolve anything
(aliases, "auto", defaults that depend on the model); `harvest.run` does, and the store records what came of it. Chat
templates are out of scope: text goes in as it is.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from residscope.errors import UsageError

DEFAULT_SPLIT = "train"
DEFAULT_COLUMN = "text"
_MOST_LAYERS = 100_000
"""A range of more is a typing error, and would fill the memory before the model is asked how many it has."""
_FOR_EACH_TEXT = ("dataset_config", "dataset_revision", "split", "text_column")


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Options of `harvest`; see the text under each field."""

    model: str
    """Model: a short name (pythia-1b, gpt2, smollm2-135m, gemma-2-2b, llama-3.2-3b, qwen3-0.6b, ...), a hub id
    (owner/name), a local folder, or a GGUF file."""
    out: Path
    """Store to make, or to continue: a folder that ends in .zarr by custom."""
    dataset: tuple[str, ...] = ("monology/pile-uncopyrighted",)
    """Text, one or several: a hub data set (streamed), a local .txt, .jsonl (.gz, .zst) or .parquet file, a folder or
    "glob*" of such files, pydoc (Python's documentation) or stdlib (its library's source), both offline. NAME:WEIGHT
    sets a text's share of the tokens, by default alike (pydoc:2 logs.jsonl:1). A .txt file is one document."""
    dataset_config: tuple[str, ...] = ()
    """Configuration (subset) of a hub data set that has several. This and the next three: one for all texts, or one
    for each, with "" for the default."""
    dataset_revision: tuple[str, ...] = ()
    """Branch, tag or commit of a hub data set; default its newest."""
    split: tuple[str, ...] = (DEFAULT_SPLIT,)
    """Split of a hub data set; local files have none."""
    text_column: tuple[str, ...] = (DEFAULT_COLUMN,)
    """Column that holds the text."""
    shuffle_documents: int | None = None
    """Seed of a random order of each text's documents; default the order they are in. Local text is shuffled whole
    (a copy goes to a temporary file); of a hub data set, its files and 10,000 documents at a time."""
    pack: bool = True
    """Pack documents one after another into sequences of full length. Without it each sequence holds the beginning of
    one document, cut at the context length, and no separator."""
    max_tokens: int = 1_000_000
    """Tokens to store, those that no later step looks at (BOS, separators, first positions) included; fewer when the
    text runs out."""
    context_length: int | None = None
    """Tokens in a packed sequence; default 2048, or the model's longest if that is less."""
    batch_size: int | None = None
    """Sequences in a forward pass; default as many as 256 MiB of stored vectors and 8192 tokens hold, or 1024 tokens
    on a CPU. Another size may change the last bits, so that it is part of what a store is; a store that is continued
    keeps its own."""
    layers: tuple[str, ...] = ()
    """Blocks to store, counted from 0, such as 0-5,11 (ranges include both ends); default all."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model's weights and of its forward pass, the residual stream included. auto: bfloat16 on
    CUDA, float32 on a CPU."""
    store_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format on the disk. float16 overflows on some models; then the run stops."""
    codec: Literal["none", "zstd"] = "none"
    """Compression of the store: zstd saves about a quarter of the disk and is slower to read."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; default its newest."""
    seed: int = 0
    """Seed of the weights of --random-init."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one. It may differ when a run is continued."""
    lens: str | None = None
    """Tuned lens to apply before storing: a local folder, the model's id in the published collection, or auto for the
    one published for the model."""
    lens_indexing: Literal["tuned-lens", "mlsae-compat"] = "tuned-lens"
    """Which translator a block's output takes: the one trained on it (block l takes translator l + 1, the last none),
    or translator l as the reference implementation does."""
    random_init: bool = False
    """Harvest the same architecture with random weights: the control."""
    keep_first_position: bool = False
    """Also train on and analyse position 0 of each sequence, where norms can be a hundred times the median; without
    it they are stored but masked."""
    document_separator: str | None = None
    """Text put after each document; default the model's end-of-text token. Give "" for none."""
    overwrite: bool = False
    """Remove the store that is at --out and start anew."""
    dry_run: bool = False
    """Say bytes, tokens and time, the latter from a short measured run; write nothing."""
    json: bool = False
    """Print one JSON line on stdout."""

    def __post_init__(self) -> None:
        """Refuse what can never work, with `UsageError`."""
        for name in ("max_tokens", "context_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} should be at least 1, found {value}")
        if self.context_length == 1 and not self.keep_first_position:
            raise UsageError(
                "--context-length 1 leaves no position but the first, which is masked: use 2 or more, or"
                " --keep-first-position"
            )
        for name in ("dataset", *_FOR_EACH_TEXT):
            value = getattr(self, name)
            if value is None or isinstance(value, str):  # One text needs no tuple.
                object.__setattr__(self, name, () if value is None else (value,))
        if not self.model.strip():
            raise UsageError("--model is empty")
        if self.shuffle_documents is not None and self.shuffle_documents < 0:
            raise UsageError(f"--shuffle-documents should be at least 0, found {self.shuffle_documents}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed should be at least 0 and below 2^63, found {self.seed}")
        if self.document_separator and not self.pack:
            raise UsageError("--document-separator: without packing (--no-pack) there is none; leave it out")
        text_choices(self)
        parse_layers(self.layers)


class TextChoice(NamedTuple):
    """One text of those that are asked for, with its own options; "" for what is left to the default."""

    name: str
    """Its name, as given, without the weight."""
    weight: float
    """Its share of the tokens, against the other texts' weights."""
    config: str
    split: str
    column: str
    revision: str


def text_choices(config: HarvestConfig) -> tuple[TextChoice, ...]:
    """The texts that are asked for. `UsageError` for a weight, or a number of options, that makes no sense."""
    n = len(config.dataset)
    for name in _FOR_EACH_TEXT:
        if len(values := getattr(config, name)) not in ((0, 1, n) if name.startswith("dataset") else (1, n)):
            raise UsageError(
                f"--{name.replace('_', '-')} should be one for all texts or one for each of the {n} of --dataset, found"
                f" {len(values)}"
            )
    choices = []
    for i, word in enumerate(config.dataset):
        name, weight = _name_and_weight(word)
        own = {
            key: (values[i] if len(values) == n else values[0]) if (values := getattr(config, key)) else ""
            for key in _FOR_EACH_TEXT
        }
        choices.append(
            TextChoice(
                name,
                weight,
                own["dataset_config"].strip(),
                own["split"].strip() or DEFAULT_SPLIT,
                own["text_column"].strip() or DEFAULT_COLUMN,
                own["dataset_revision"].strip(),
            )
        )
    if not choices:
        raise UsageError("--dataset is empty")
    without_weights = [choice._replace(weight=1.0) for choice in choices]
    for i, choice in enumerate(without_weights):
        if choice in without_weights[:i]:
            raise UsageError(f"--dataset: {choice.name} is there twice; give it once, with a larger weight")
    return tuple(choices)


def _name_and_weight(word: str) -> tuple[str, float]:
    """A number after the last colon is the weight; a file whose own name ends so needs another one behind it."""
    name, _, number = word.strip().rpartition(":")
    try:
        weight = float(number) if name else 1.0
    except ValueError:
        # A path may have a colon in it; no other name has.
        if not any(sign in number for sign in "/\\*?[") and not Path(word.strip()).expanduser().exists():
            raise UsageError(
                f"--dataset {word}: the weight after the colon should be a number, found {number!r}"
            ) from None
        weight = 1.0
        name = ""
    if not 0 < weight < math.inf:
        raise UsageError(f"--dataset {word}: a weight should be a number above 0, found {number}")
    name = name or word.strip()
    if not name:
        raise UsageError("--dataset is empty")
    return name, weight


def parse_layers(words: tuple[str, ...]) -> tuple[int, ...] | None:
    """Block indices, ascending, of words such as ("0-5,11", "14"); None (all blocks) for no words. `UsageError` for
    anything else."""
    chosen: set[int] = set()
    for part in ",".join(str(word) for word in words).split(","):
        if not words:
            return None
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or (dash and int(first) > int(last)):
            raise UsageError(f"--layers should be block indices and ranges such as 0-5,11, found {part.strip()!r}")
        if int(last or first) >= _MOST_LAYERS:
            raise UsageError(f"--layers: no model has a block {last or first}")
        chosen.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(chosen))
