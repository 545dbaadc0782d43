"""Options of `harvest`, one frozen dataclass for each component; the command line is generated from them.

Checked when made, as far as possible without the model and the text. `harvest.settings` resolves "auto" and the
defaults that depend on the model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from harvest.text.config import TextConfig
from residscope.console import parse_bytes
from residscope.errors import UsageError
from residscope.options import require_at_least, require_seed, require_workers
from residscope.urls import URL

_MOST_LAYERS = 100_000
"""A larger index is a typing error, and its range would fill the memory before the model's layers are known."""


def parse_layers(words: tuple[str, ...]) -> tuple[int, ...] | None:
    """Ascending block indices from words such as ("0-5,11", "14"); None (all) for no words; else `UsageError`."""
    if not words:
        return None
    chosen: set[int] = set()
    for part in ",".join(str(word) for word in words).split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or (dash and int(first) > int(last)):
            raise UsageError(f"--layers should be block indices and ranges such as 0-5,11, found {part.strip()!r}")
        if int(last or first) >= _MOST_LAYERS:
            raise UsageError(f"--layers: no model has a block {last or first}")
        chosen.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(chosen))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how to run it."""

    model: str
    """Model: a short name (pythia-1b, gpt2, smollm2-135m, gemma-2-2b, llama-3.2-3b, qwen3-0.6b, ...), a hub id
    (owner/name), a local folder, or a GGUF file."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; default its newest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model's weights and of its forward pass, including the residual stream. auto: bfloat16 on
    CUDA, float32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto uses CUDA if available. It may differ when a run is continued."""

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise UsageError("--model is empty")


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Length and separators of sequences, and their first position."""

    context_length: int | None = None
    """Tokens in a packed sequence; default 2048, or the model's longest if that is less."""
    document_separator: str | None = None
    """Text put after each document; default the model's end-of-text token. Give "" for none."""
    keep_first_position: bool = False
    """Also train on and analyse position 0 of each sequence, where norms can be a hundred times the median. Without
    this flag these tokens are stored but masked."""

    def __post_init__(self) -> None:
        require_at_least(1, context_length=self.context_length)
        if self.context_length == 1 and not self.keep_first_position:
            way_out = "use 2 or more, or --keep-first-position"
            raise UsageError(f"--context-length 1 leaves only the first position, which is masked: {way_out}")


@dataclass(frozen=True, kw_only=True)
class DocumentConfig:
    """Order and packing of documents."""

    shuffle_documents: int | None = None
    """Seed for shuffling each text's documents; default: their own order. Local text is shuffled completely
    (in a temporary copy); of a hub data set, first the files, then documents in a buffer of 10,000."""
    pack: bool = True
    """Pack documents one after another into sequences of full length. Without packing, each sequence holds the
    beginning of one document, cut at the context length, and no separator."""

    def __post_init__(self) -> None:
        require_at_least(0, shuffle_documents=self.shuffle_documents)


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """What is stored, and in which number format."""

    layers: tuple[str, ...] = ()
    """Blocks to store, counted from 0, such as 0-5,11 (ranges include both ends); default all."""
    lens: str | None = None
    """Tuned lens to apply before storing: a local folder, the model's id in the published collection, or auto for the
    one published for the model."""
    lens_indexing: Literal["tuned-lens", "mlsae-compat"] = "tuned-lens"
    """Which translator is applied to a block's output: the one trained on it (l + 1 for block l, none for the last), or
    translator l, as in the reference implementation."""
    store_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format on the disk. float16 overflows with some models; then the run stops."""
    codec: Literal["none", "zstd"] = "none"
    """Compression of the store: zstd saves about a quarter of the space and is slower to read."""
    rolling: str | None = None
    """Maximum size of the store, such as 50GB: it is filled part by part, and a part is removed once all trainers that
    run alongside (`train --follow`) have used it."""

    def __post_init__(self) -> None:
        parse_layers(self.layers)
        if self.rolling is not None and not parse_bytes(self.rolling):
            raise UsageError(f"--rolling should be a size such as 50GB, found {self.rolling!r}")


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """A control with random weights."""

    random_init: bool = False
    """Harvest the same architecture with random weights, as a control."""
    seed: int = 0
    """Seed of the random weights."""

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Processes that fill the store. Which of them fills a shard does not change its bytes; their thread count may."""

    n_workers: int | None = None
    """Number of processes on this machine that fill shards at once, each with its share of the cores and, if there are
    several GPUs, one of them. Default: this process alone, or with --scheduler, that scheduler's workers."""
    scheduler: str | None = None
    """Address of a Dask scheduler (tcp://HOST:8786) whose workers fill the shards; they must see the same paths."""

    def __post_init__(self) -> None:
        require_workers(n_workers=None if self.scheduler else self.n_workers)
        require_at_least(1, n_workers=self.n_workers)
        if self.scheduler is not None and ":" not in self.scheduler:
            raise UsageError(f"--scheduler should be an address such as tcp://HOST:8786, found {self.scheduler!r}")


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Options of `harvest`."""

    FIRST_FLAGS: ClassVar = (
        *("model", "out", "dataset", "max_tokens", "context_length", "layers", "lens", "store_dtype", "device"),
        "dry_run",
    )

    weights: ModelConfig
    out: Path
    """Store to make or continue: a folder whose name ends in .zarr by convention."""
    text: TextConfig = field(default_factory=TextConfig)
    documents: DocumentConfig = DocumentConfig()
    max_tokens: int = 1_000_000
    """Tokens to store, including those that are never trained on (BOS, separators, first positions); fewer if there is
    less text."""
    sequences: SequenceConfig = SequenceConfig()
    storage: StorageConfig = StorageConfig()
    control: ControlConfig = ControlConfig()
    workers: WorkerConfig = WorkerConfig()
    mask_norm: float | None = None
    """Do not train on or analyse tokens whose norm, at any stored layer, exceeds this many times that layer's median:
    attention sinks in mid-sequence. Runs the model twice. A usual value is 10."""
    batch_size: int | None = None
    """Sequences in a forward pass; default: as many as fit in 256 MiB of stored vectors and in 8192 tokens (1024
    on a CPU), at least one. The size may change the last bits, so it is recorded, and a continued store keeps it."""
    device_map: Literal["auto"] | None = None
    """auto: spread a model that is larger than one GPU over all GPUs, and the rest over memory and disk (slow). Needs
    accelerate."""
    overwrite: bool = False
    """Remove the store at --out and start again."""
    dry_run: bool = False
    """Print bytes, tokens and time (from a short measured run); write nothing."""
    json: bool = False
    """Print one JSON line on stdout."""

    def __post_init__(self) -> None:
        require_at_least(1, max_tokens=self.max_tokens, batch_size=self.batch_size)
        if self.mask_norm is not None and not 1 < self.mask_norm < float("inf"):
            raise UsageError(f"--mask-norm should be above 1, in medians of a layer's norms, found {self.mask_norm}")
        if self.device_map and self.workers != WorkerConfig():
            raise UsageError("--device-map spreads one model over all GPUs: leave --n-workers and --scheduler out")
        if self.sequences.document_separator and not self.documents.pack:
            raise UsageError("--document-separator has no effect with --no-pack; leave it out")
        if isinstance(self.out, URL) and (self.storage.rolling or self.workers != WorkerConfig()):
            raise UsageError(
                f"--out {self.out}: workers and --rolling need a store on a disk: give a path, or leave them out"
            )
        if self.storage.rolling and (self.workers != WorkerConfig() or not self.documents.pack):
            raise UsageError(
                "--rolling fills the store in this process and packs documents: leave --n-workers,"
                " --scheduler and --no-pack out"
            )
