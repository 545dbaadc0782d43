"""What a harvest made, and how it is printed: a few lines for people, or one JSON line.

Tested in tests/harvest/test_cli.py.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from harvest.fill import Filled
from residscope.console import counted, human_bytes, human_seconds
from store.activations import ActivationStore


class HarvestResult(NamedTuple):
    """What a harvest made."""

    out: str
    """The store."""
    model: str
    architecture: str
    """Class of the model."""
    tokens: int
    """Tokens in the store."""
    kept: int
    """Those that are trained on and analysed."""
    documents: int
    """Documents that they come from."""
    layers: list[int]
    d_model: int
    bytes: int
    """Bytes of the vectors, before compression."""
    shards: int
    shards_written: int
    """Those written by this command; the others were there."""
    seconds: float
    """Time of this command."""
    tokens_per_second: float | None
    """Speed of filling, None where nothing was missing."""
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
        """Headings and texts, a line each."""
        written = f"nothing to do: the store was whole, {counted(self.shards, 'shard')}"
        if self.shards_written:
            speed = f", {self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""
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


def ranges(layers: list[int]) -> str:
    """Ascending indices as ranges: 0-5,11."""
    groups: list[list[int]] = []
    for layer in layers:
        if groups and layer == groups[-1][-1] + 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return ",".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)
