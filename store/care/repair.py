"""Repair a damaged store: forget its bad shards, compute them again, and prove that they are the same as before.

How: the lines of shards that `verify` finds bad, and damaged lines, are removed from the manifest, which is rewritten
atomically. A function given by the caller then fills the missing shards with the model. The old lines, which have the
hashes, are kept in `manifest/.repair` until the end, so that a repair can be proven even after a crash. Finally the
lines are put back in their old order, so that a repaired store has the same bytes as before. What belongs to no shard
(metadata, tokens, the manifest's header) cannot be repaired.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from residscope.errors import ResidscopeError
from store.activations import ActivationStore
from store.care.verify import BadShard, check_shard, verify
from store.files import atomic_write, sync
from store.folder import require_store
from store.manifest import FOLDER, Manifest, WriterLock, forget_lines, is_intact, read_manifest, shard_of, sort_lines

JOURNAL = f"{FOLDER}/.repair"


@dataclass(frozen=True)
class Repaired:
    found: list[BadShard]
    """What was missing or damaged."""
    refilled: list[int]
    """Shards that were computed again, ascending."""
    proven: list[int]
    """Refilled shards whose files have their old hashes; of the others the manifest had no intact line."""


def repair(path: Path, prepare: Callable[[Path], Callable[[], object]]) -> Repaired:
    """Make the store at `path` complete and intact again.

    prepare: called with `path` before anything is changed; returns a function that fills the missing shards. Raises
    `IncompatibleError` when there is no store, and `ResidscopeError` when another process is writing it, when
    something is damaged that cannot be computed again (then nothing is changed), and when a recomputed shard differs
    from the old one (then it is left missing, and running `harvest` accepts the new bytes).
    """
    require_store(path)
    with closing(WriterLock(path, path)):
        found = verify(path)
        if lost := [bad.reason for bad in found if bad.lasting]:
            way_out = "This cannot be computed again: copy the file from a backup, or harvest into a new store"
            raise ResidscopeError(f"{path}: {lost[0]}. {way_out}")
        bad = {bad.index for bad in found if bad.index is not None}
        if any(shard.to_come for shard in found):  # The harvest fills these in turn, and then the bad ones, too.
            forget_lines(path, bad)
            raise ResidscopeError(f"{path} is filled part by part: run its `harvest` or `residscope run` to repair it")
        refill = prepare(path) if bad else None
        old = _keep_lines(path, read_manifest(path))
        forget_lines(path, bad)
    with ActivationStore.open(path, partial=True) as store:
        refilled = store.missing_shards()
    if refill is not None:
        refill()
    with ActivationStore.open(path, writable=True) as store:
        store.finalize()
        manifest = read_manifest(path)
        broken = [reason for shard in refilled if (reason := check_shard(path, store.meta, manifest, shard))]
        if broken:
            raise ResidscopeError(f"{path}: {broken[0]}, although it was just written: check the disk")
        differing = [shard for shard, line in old.items() if manifest.lines.get(shard) != line]
        forget_lines(path, differing)
        sort_lines(path, list(old))
        (path / JOURNAL).unlink()
        sync(path / FOLDER)
    if differing:
        raise ResidscopeError(
            f"{path}: shards {differing} came out with different bytes; this happens on another device or with "
            "other versions of torch and transformers. They are left missing: repair the store where it was made, or "
            "run its `harvest` command again to accept the new bytes"
        )
    return Repaired(found, refilled, [shard for shard in refilled if shard in old])


def _keep_lines(path: Path, manifest: Manifest) -> dict[int, bytes]:
    """The manifest's lines in order: saved to the journal, or read from the one of an interrupted repair."""
    journal = path / JOURNAL
    if not journal.exists():
        atomic_write(journal, [line + b"\n" for line in manifest.lines.values()])
    lines = [line for line in journal.read_bytes().splitlines() if is_intact(line)]
    return {shard: line for line in lines if (shard := shard_of(line)) is not None}
