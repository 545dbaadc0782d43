"""The result of a harvest, and how it is printed: a few lines, or one JSON line. Tested in test_cli.py."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from harvest.fill import Filled
from residscope.console import counted, human_bytes, human_seconds, ranges
from store.activations import ActivationStore


class HarvestResult(NamedTuple):
    out: str
    """The store."""
    model: str
    architecture: str
    tokens: int
    kept: int
    """Tokens that are trained on and analysed."""
    documents: int
    layers: list[int]
    d_model: int
    bytes: int
    """Bytes of the vectors, before compression."""
    shards: int
    shards_written: int
    """Shards written by this command; the others existed before."""
    seconds: float
    """Time of this command."""
    tokens_per_second: float | None
    """Speed of filling; None if nothing was missing."""
    content_hash: str
    """Identifies the data."""

    @classmethod
    def of(cls, out: Path, store: ActivationStore, filled: Filled, seconds: float) -> "HarvestResult":
        """The result of a command that took `seconds` and wrote what `filled` says."""
        meta, tokens = store.meta, store.tokens
        return cls(
            out=str(out),
            model=meta.provenance["model"],
            architecture=meta.provenance["architecture"],
            tokens=meta.n_tokens,
            kept=int(tokens.keep.sum()),
            documents=int(tokens.document.max()) + 1,
            layers=list(meta.layers),
            d_model=meta.d_model,
            bytes=meta.n_tokens * meta.bytes_per_token,
            shards=meta.n_shards,
            shards_written=filled.shards,
            seconds=seconds,
            tokens_per_second=filled.tokens / filled.seconds if filled.seconds else None,
            content_hash=store.content_hash,
        )

    def rows(self) -> list[tuple[str, str]]:
        """Heading and text of each line."""
        written = f"nothing to do: the store is complete, {counted(self.shards, 'shard')}"
        if self.shards_written:
            speed = f" (filling: {self.tokens_per_second:,.0f} tokens/s)" if self.tokens_per_second else ""
            took = human_seconds(self.seconds)
            written = f"{self.shards_written} of {counted(self.shards, 'shard')} in {took}{speed}"
        documents = counted(self.documents, "document")
        return [
            ("store", f"{self.out} ({human_bytes(self.bytes)})"),
            ("model", f"{self.model} ({self.architecture}), layers {ranges(self.layers)}, d_model {self.d_model}"),
            ("tokens", f"{self.tokens:,} of {documents}; {self.kept:,} kept for training and analysis"),
            ("written", written),
        ]


def print_result(result: Any, *, dry_run: bool, as_json: bool) -> None:
    """Print a `HarvestResult` or an `Estimate` on stdout; as JSON, its fields and "dry_run" are the keys."""
    if as_json:
        print(json.dumps({"dry_run": dry_run, **result._asdict()}))
        return
    rows = result.rows()
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
