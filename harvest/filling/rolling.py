"""`harvest --rolling SIZE`: a store that never takes more than SIZE of the disk, filled as fast as trainers use it.

Here: how a store is cut into parts for a size, and how the harvest waits for trainers. `store.care.ring` describes what
is on the disk when, and what a crash leaves.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from harvest.config import HarvestConfig
from harvest.settings import Settings
from residscope.console import counted, human_bytes, human_seconds, parse_bytes
from residscope.errors import UsageError
from store.activations import ActivationStore
from store.arrays import TokenTable
from store.care.ring import Readers, Ring
from store.shuffle import validation_documents

_HELD_OUT = 0.01
"""Share of the documents that is set aside; less if that would take more than an eighth of the size."""

_SHARDS = 64
"""Minimum number of shards that fit in the size, unless chunks are too large: parts of few shards mix badly."""

_POLL_SECONDS, _SAY_SECONDS = 0.02, 600
"""Seconds between checks of the trainers, and seconds of waiting after which the slowest trainer is named."""


class Rolling(NamedTuple):
    """The size of a rolling store, and the documents to set aside in it."""

    size: int
    """Bytes that the store may take."""
    fraction: float
    seed: int
    """Seed for the choice of documents to set aside (`fraction` of them) and for the order of the shards."""
    batch: int
    """Tokens of a forward pass."""
    token_bytes: int
    """Bytes of a token at all layers."""
    n_layers: int

    @classmethod
    def of(cls, config: HarvestConfig, settings: Settings) -> "Rolling | None":
        """The settings of `--rolling`, or None without it."""
        size = config.storage.rolling and parse_bytes(config.storage.rolling)
        if not size:
            return None
        fraction = min(_HELD_OUT, size / 8 / (config.max_tokens * settings.bytes_per_token))
        batch, layers = settings.batch_size * settings.packing.context_length, len(settings.layers)
        return cls(size, fraction, config.control.seed, batch, settings.bytes_per_token, layers)

    def first(self, n_documents: int) -> np.ndarray:
        """Which documents come first, because they are set aside: bool [n_documents]."""
        return validation_documents(n_documents, self.fraction, self.seed)

    def aside(self, tokens: TokenTable) -> int:
        """Number of tokens up to the end of those documents."""
        found = np.flatnonzero(self.first(int(tokens.document.max()) + 1)[tokens.document])
        return int(found[-1]) + 1 if len(found) else 0


def cut(n_tokens: int, aside: int, rolling: Rolling, chunk: int, shard: int) -> tuple[int, Ring]:
    """Tokens of a shard, and the division into parts, for a store whose first `aside` tokens stay. chunk, shard: tokens
    of a chunk, and maximum tokens of a shard.

    Raises `UsageError` if there is no room for two parts in addition to what stays, or nothing is left to train on.
    """
    size, _, _, batch, token_bytes, n_layers = rolling
    # A shard or run of shards holds whole batches, if enough fit: a batch that two parts need is computed twice.
    whole = math.lcm(chunk, batch)
    fits = _SHARDS // 4 * whole * token_bytes
    whole = whole if fits <= size else chunk
    most = max(min(shard, size // (_SHARDS * token_bytes)), chunk)
    divisors = (n * chunk for n in range(1, whole // chunk + 1) if whole % (n * chunk) == 0)
    shard = most // whole * whole or max(size for size in divisors if size <= most)
    n_shards, run = -(-n_tokens // shard), max(whole // shard, 1)
    if fits > size and shard < batch:
        often = f"forward passes of {batch:,} tokens: each runs up to {-(-batch // shard)} times, which is slow"
        way_out = f"--rolling {human_bytes(fits)}, or a smaller --batch-size or --context-length, avoids it"
        print(f"warning: --rolling {human_bytes(size)} is small for {often}; {way_out}", file=sys.stderr)
    kept = -(-aside // (run * shard)) * run
    if kept == 0:
        print("warning: with one document, none is held out for validation and analysis: give several", file=sys.stderr)
    if kept >= n_shards:
        total = counted(n_shards, "shard")
        way_out = "leave it out if the disk holds the whole store, else give less, or harvest more text"
        raise UsageError(f"--rolling {human_bytes(size)}: nothing is left to train on ({total} in all): {way_out}")
    # The moments of a part or shard: two float64 for each of a token's values, which take at least two bytes each.
    moments = 8 * token_bytes
    shard_bytes = shard * (token_bytes + -(-20 * n_layers // chunk)) + moments  # including its index
    fixed = 13 * n_tokens + 2 * n_shards * (400 + 25 * n_layers) + kept * shard_bytes + 4 * moments  # columns, lines
    part = max((size - fixed) // (2 * shard_bytes * run), 1) * run
    while (needed := fixed + 2 * part * shard_bytes - (kept - n_shards) // part * moments) > size and part > run:
        part -= run
    if needed > size:
        what = f"{human_bytes(fixed)} for token columns, the manifest and held-out documents, and two parts"
        raise UsageError(f"--rolling {human_bytes(size)}: this store needs at least {human_bytes(needed)}: {what}")
    ring = Ring(kept, int(min(part, -(-(n_shards - kept) // run) * run)), rolling.fraction, rolling.seed, run)
    words = f"{counted(len(ring.parts(n_shards)), 'part')} of {counted(ring.part_shards, 'shard')}, in turn"
    print(f"{words}; {kept} with held-out documents stay", file=sys.stderr)
    return shard, ring


def parts_to_fill(store: ActivationStore, stopped: Callable[[], bool]) -> Iterator[list[int]]:
    """The missing shards of a store; in a rolling store those of one part after another, each as soon as there is room
    for it, until `stopped()`."""
    missing = set(store.missing_shards())
    if store.ring is None:
        yield sorted(missing)
        return
    readers, waited, named = Readers(store.path, store.ring), 0.0, set[str]()

    def used_by_all(parts: int) -> bool:
        """Wait until all trainers have used so many parts; False if `stopped()` before."""
        nonlocal waited
        here = 0.0
        while min((used := readers.used()).values(), default=0) < parts:
            if stopped():
                return False
            if not waited:
                names = ", ".join(used) or f"a trainer (`train --store {store.path}`)"
                print(f"waiting for {names}, now and whenever it is slower", file=sys.stderr)
            time.sleep(_POLL_SECONDS)
            here, waited = here + _POLL_SECONDS if used else 0.0, waited + _POLL_SECONDS
            if here >= _SAY_SECONDS and (behind := min(used, key=lambda name: used[name])) not in named:
                named.add(behind)
                way_out = f"if it has ended and will not continue, remove {readers.file(behind)}"
                print(f"still waiting for {behind} after {human_seconds(here)}; {way_out}", file=sys.stderr)
        return True

    for number, part in enumerate(store.ring.parts(store.meta.n_shards)):
        if todo := [shard for shard in part.tolist() if shard in missing]:
            if number > 1:
                if not used_by_all(number - 1):
                    return
                readers.announce(number - 1)
                if not used_by_all(number - 1):  # A trainer that began meanwhile is seen now, or told that it is late.
                    return
                readers.remove(number - 1, store.meta.n_shards, store.moments)
            yield todo
    if waited:
        print(f"waited {human_seconds(waited)} for trainers", file=sys.stderr)
