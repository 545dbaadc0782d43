"""Estimates what a harvest would cost, without writing anything: bytes, tokens, and time from a short measured run.

How: tokenises a sample of the text, and times forward passes at the run's batch size, including the recording but not
the writing, which overlaps with them. The whole text is not read, so the number of available tokens is an estimate, or
unknown. Tested in tests/harvest/test_run.py.
"""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from harvest.config import HarvestConfig
from harvest.destination import disk_bytes
from harvest.fill import BatchRunner
from harvest.filling.rolling import Rolling, cut
from harvest.settings import Settings, load_weights, require_in_vocabulary, resolve
from harvest.table import pack
from harvest.text.encode import Document, encode_documents
from harvest.text.sources import TextSource, open_sources, require_local_texts
from residscope.console import human_bytes, human_seconds, ranges
from residscope.destinations import nearest_folder
from residscope.urls import URL

_SAMPLE_CHARACTERS = 200_000
_MEASURE_SECONDS = 2.0
_WARM_UP_TOKENS = 64


class Estimate(NamedTuple):
    """What a harvest would cost."""

    model: str
    architecture: str
    layers: list[int]
    d_model: int
    device: str
    dtype: str
    """Number format of the computation."""
    store_dtype: str
    context_length: int
    batch_size: int
    """Sequences in a forward pass."""
    workers: int | str
    """Processes that would fill the store, or the address of their scheduler; the speed is that of one process."""
    tokens: int
    """Tokens that would be stored: --max-tokens, or the estimate of the text's tokens if that is less."""
    tokens_available: int | None
    """Estimate of the text's tokens; None if unknown."""
    bytes_per_token: int
    """Bytes of one token at all layers."""
    bytes: int
    """Bytes of the store's vectors, before compression."""
    disk_bytes: int
    """Bytes that the whole store takes at once: everything in it, or at most --rolling."""
    free_bytes: int | None
    """Free bytes on the disk of --out; None for a bucket, which has no limit."""
    fits: bool
    tokens_per_second: float
    seconds: float
    """Time for the store at that speed, without loading."""

    def rows(self) -> list[tuple[str, str]]:
        """Heading and text of each line."""
        available = "unknown" if self.tokens_available is None else f"about {self.tokens_available:,}"
        verdict = (
            "fits"
            if self.fits
            else "DOES NOT FIT: fewer --max-tokens, fewer --layers, --codec zstd, less --rolling, or another disk"
        )
        room = "a bucket, not checked" if self.free_bytes is None else f"{human_bytes(self.free_bytes)} free: {verdict}"
        room = f"at most {human_bytes(self.disk_bytes)} at once; {room}"
        stored = f"{self.tokens:,} tokens x {self.bytes_per_token:,} bytes ({self.store_dtype})"
        return [
            ("model", f"{self.model} ({self.architecture}), layers {ranges(self.layers)}, d_model {self.d_model}"),
            ("compute", f"{self.dtype} on {self.device}, {self.batch_size} x {self.context_length} tokens a batch"),
            ("workers", str(self.workers)),
            ("text", f"tokens available: {available}"),
            ("store", f"{stored} = {human_bytes(self.bytes)}"),
            ("disk", room),
            ("time", f"about {human_seconds(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s (measured)"),
            ("", "nothing was written"),
        ]


def estimate(config: HarvestConfig) -> Estimate:
    """Measure; raises as `harvest` does for a model, text or option that cannot work. Writes nothing."""
    require_local_texts(config.text)
    settings = resolve(config)
    sources = open_sources(config.text, known=settings.known_ids)  # Not shuffled, which would read all of them.
    for note in settings.notes:
        print(note, file=sys.stderr)
    sample, available = _sample(settings, sources)
    model = load_weights(settings)
    speed = _measure(BatchRunner(model, settings), settings, sample)
    tokens = config.max_tokens if available is None else min(config.max_tokens, available)
    n_bytes, needed = tokens * settings.bytes_per_token, disk_bytes(settings, tokens)
    if rolling := Rolling.of(config, settings):
        cut(tokens, math.ceil(tokens * rolling.fraction), rolling, *settings.chunk_and_shard(tokens))
        needed = min(needed, rolling.size)
    free = None if isinstance(config.out, URL) else shutil.disk_usage(nearest_folder(config.out.absolute())).free
    return Estimate(
        model=settings.spec.name,
        architecture=model.architecture,
        layers=list(settings.layers),
        d_model=settings.d_model,
        device=str(settings.device),
        dtype=settings.dtype,
        store_dtype=settings.store_dtype,
        context_length=settings.packing.context_length,
        batch_size=settings.batch_size,
        workers=config.workers.scheduler or config.workers.n_workers or 1,
        tokens=tokens,
        tokens_available=available,
        bytes_per_token=settings.bytes_per_token,
        bytes=n_bytes,
        disk_bytes=needed,
        free_bytes=free,
        fits=free is None or needed < free,
        tokens_per_second=speed,
        seconds=tokens / speed * (2 if config.mask_norm else 1),
    )


def _sample(settings: Settings, sources: Sequence[TextSource]) -> tuple[np.ndarray, int | None]:
    """Token ids (int32) of 200,000 characters, shared among the texts, and about how many tokens all texts have."""
    samples = [_beginning(settings, source, _SAMPLE_CHARACTERS // len(sources)) for source in sources]
    ids = np.concatenate([sample for sample, _ in samples])
    available = [n for _, n in samples if n is not None]
    return ids, sum(available) if len(available) == len(samples) else None


def _beginning(settings: Settings, source: TextSource, n_characters: int) -> tuple[np.ndarray, int | None]:
    """Token ids (int32) of a text's first characters, packed, and about how many tokens the whole text packs into."""
    texts: list[Document] = []
    read, ended = 0, True
    for text in source.documents():
        texts.append(text[: n_characters - read])
        read += len(texts[-1])
        if read >= n_characters:
            ended = False
            break
    packing = settings.packing
    limit = n_characters * 8  # More tokens than the sample can have: nothing is cut off.
    documents = encode_documents(texts, settings.tokenizer, limit, packing.longest_document)
    table = pack(documents, packing, limit)
    require_in_vocabulary(settings, table.token_id)
    n_tokens = len(table.token_id)
    characters = read if ended else source.characters()
    return table.token_id, None if characters is None else max(round(n_tokens * characters / read), n_tokens)


def _measure(runner: BatchRunner, settings: Settings, sample: np.ndarray) -> float:
    """Tokens per second of forward passes with recording at the run's batch size; a short sample is repeated."""
    batch, length = settings.batch_size, settings.packing.context_length
    ids = torch.from_numpy(np.resize(sample, (batch, length)).astype(np.int64))
    buffer = runner.buffer(batch * length)
    runner.run(ids[:1, :_WARM_UP_TOKENS], buffer)
    buffer.wait()
    begin, done = time.perf_counter(), 0
    while not done or time.perf_counter() - begin < _MEASURE_SECONDS:
        runner.run(ids, buffer)
        buffer.wait()
        done += batch * length
    if not bool(buffer.finite.all()):
        raise runner.explain_not_finite(ids, 0)
    return done / (time.perf_counter() - begin)
