"""What a harvest is asked to do: one frozen dataclass, from which the command line is generated.

Checked once, when made, as far as that needs neither the model nor the text. What it does not do: resolve anything
(aliases, "auto", defaults that depend on the model); `harvest.run` does, and the store records what came of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from store.errors import UsageError

DEFAULT_SPLIT = "train"


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Options of `harvest`; see the text under each field."""

    model: str
    """Model: a short name (pythia-1b, gpt2, smollm2-135m, gemma-2-2b, llama-3.2-3b, qwen3-0.6b, ...), a hub id
    (owner/name), a local folder, or a GGUF file."""
    out: Path
    """Store to make, or to continue: a folder that ends in .zarr by custom."""
    dataset: str = "monology/pile-uncopyrighted"
    """Text: a hub data set (streamed), a local .txt, .jsonl, .jsonl.zst or .parquet file, a folder or "glob*" of such
    files, or pydoc (Python's own documentation, offline). A .txt file is one document."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub data set that has several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set; default its newest."""
    split: str = DEFAULT_SPLIT
    """Split of a hub data set; local files have none."""
    text_column: str = "text"
    """Column that holds the text."""
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
        for name in ("model", "dataset", "split", "text_column"):
            if not getattr(self, name).strip():
                raise UsageError(f"--{name.replace('_', '-')} is empty")
        parse_layers(self.layers)


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
        chosen.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(chosen))
