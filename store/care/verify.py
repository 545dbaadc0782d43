"""Check everything in a store against its checksums, and name what is wrong.

How: it checks the manifest's lines, every file that was made with the store against the manifest's header, each
shard's file and moments against its line, and the layer statistics against the moments. Shards are read whole,
several at once. Tested in tests/store/test_faults.py and tests/residscope/test_cli.py.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from residscope.console import counted, progress
from residscope.urls import URL, as_path
from store import arrays
from store.activations import ActivationStore
from store.care.ring import Readers, ring_of
from store.checksums import DamagedError, read_checked, read_small
from store.folder import read_meta, require_store
from store.manifest import Manifest, read_manifest
from store.meta import StoreMeta
from store.shards import ShardReader, shard_name


@dataclass(frozen=True)
class BadShard:
    """A missing or damaged part of a store."""

    index: int | None
    """The shard, or None if the fault concerns the whole store."""
    reason: str
    """The file, and what is wrong with it."""
    lasting: bool = False
    """Whether it cannot be computed again: it is metadata, tokens, or the manifest's header."""
    to_come: bool = False
    """Whether it is no damage: these are shards of a rolling store whose turn has not come."""


def verify(path: str | os.PathLike[str]) -> list[BadShard]:
    """Everything that is missing or damaged in the store at `path`; empty when the store is complete and intact.

    Raises `IncompatibleError` for something that is not a store, or another version.
    """
    path = as_path(path)
    require_store(path)
    manifest = read_manifest(path)
    bad = [BadShard(None, problem, lasting=not manifest.checksums) for problem in manifest.problems]
    for name in manifest.checksums:
        try:
            read_checked(path, name, manifest.checksums)
        except DamagedError as error:
            bad.append(BadShard(None, f"{name}: {error.what}", lasting=True))
    if any(found.lasting for found in bad) or not manifest.checksums:
        return bad  # Without metadata the shards cannot be checked.
    meta = read_meta(path, Manifest(checksums=manifest.checksums))
    ring = ring_of(meta)
    to_come = ring.to_come(meta.n_shards, manifest.lines) if ring and not manifest.problems else set[int]()
    torn = "; its last line is incomplete" if manifest.torn else ""
    with ThreadPoolExecutor(4) as pool, progress("verify", "shard", meta.n_shards) as bar:
        checks = pool.map(lambda shard: check_shard(path, meta, manifest, shard), range(meta.n_shards))
        for shard, reason in enumerate(checks):
            if reason:
                bad.append(BadShard(shard, reason + (torn if shard not in manifest.lines else "")))
            bar.update()
    bad += [BadShard(shard, "the store has no such shard") for shard in manifest.lines if shard >= meta.n_shards]
    if ring:  # Some of its shards may have been removed during the check.
        passing = to_come | Readers(path, ring).removed_shards(meta.n_shards)
        bad = [found for found in bad if found.index not in passing]
    if to_come:
        words = f"{counted(len(to_come), 'shard')} still to come: the harvest has not ended"
        bad.append(BadShard(None, words, to_come=True))
    if bad:
        return bad
    expected = arrays.statistics_chunks(ActivationStore.open(path).merged_statistics())
    return [
        BadShard(None, f"{name}: its numbers do not match the shards")
        for name, data in expected.items()
        if (path / name).exists() and not _holds(path / name, data)
    ]


def lost_shards(store: ActivationStore) -> list[int]:
    """Shards of a store on a disk that were written but whose files are gone or have another size; reads no shard."""
    if store.ring or isinstance(store.path, URL):
        return []
    written = {*range(store.meta.n_shards)} - {*store.missing_shards()}
    files = ((shard, store.path / shard_name(shard)) for shard in sorted(written))
    return [i for i, file in files if not file.is_file() or file.stat().st_size != store.record(i).bytes]


def _holds(file: Path, data: bytes) -> bool:
    try:
        return read_small(file, len(data)) == data
    except DamagedError:
        return False


def check_shard(path: Path, meta: StoreMeta, manifest: Manifest, shard: int) -> str | None:
    """What is wrong with a shard; None for nothing."""
    if shard not in manifest.lines:
        return "missing: the manifest has no line for it"
    record = manifest.record(shard)
    start, stop = meta.shard_bounds(shard)
    if record.tokens != stop - start or record.config_hash != meta.config_hash:
        return "its manifest line belongs to another configuration"
    try:
        with ShardReader(path / shard_name(shard), meta, record.bytes) as reader:
            reader.require_own(record)
        shape = (2, meta.n_layers, meta.d_model)
        arrays.read_numbers(path / arrays.moments_name(shard), shape, record.moments_xxh3_128)
    except DamagedError as error:
        return f"{error.path.relative_to(path)}: {error.what}"
    return None
