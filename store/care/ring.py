"""A rolling store: filled part by part, each part removed once all trainers have used it.

How: the parts are fixed when the store is made, from its metadata alone. The first shards hold the documents that are
set aside for validation, and stay. The others follow in a spread order, as many in a part as fit in half of the disk
space; the store is trained on part by part (`store.loader`), so that rows are shuffled within a part. A shard keeps its
line when its files are removed. The moments of a removed part are kept merged, because those of all shards of a store
may be larger than a part. Beside the manifest are

    readers/NAME.json   how many parts a trainer has used, written after its checkpoint is on the disk
    removed.json        how many parts are removed, written before the first of their files is deleted
    moments/PART        the moments of a removed part, written after that and before its first file is deleted

Part p is filled once part p - 2 is removed: so at most two are on the disk, and a process that is killed at any moment
can continue. The store's content hash covers only its options and token ids (`config_hash`), because its shards come
and go.
"""

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from residscope.errors import IncompatibleError
from residscope.reading import CONFIG_BYTES, read_whole, reading
from store.arrays import encode_numbers, moments_name, read_numbers
from store.checksums import DamagedError
from store.files import atomic_write, removed_on_error
from store.manifest import FOLDER, ShardRecord, is_intact, sealed
from store.meta import StoreMeta
from store.moments import ShardMoments, merge, no_moments
from store.shards import shard_name
from store.shuffle import spread_order

_READERS, _REMOVED, _MOMENTS = f"{FOLDER}/readers", f"{FOLDER}/removed.json", f"{FOLDER}/moments"
_SHARDS = 6  # A stream of random numbers, different from those of `store.shuffle`.


class Ring(NamedTuple):
    """How a store is cut into parts; `provenance["ring"]` of its metadata."""

    kept_shards: int
    """Number of shards at the beginning that stay."""
    part_shards: int
    """Number of other shards in each part; the last part may have fewer."""
    fraction: float
    """Share of the documents set aside for validation, drawn by `store.shuffle.validation_documents` ..."""
    seed: int
    """... with this seed, which also determines the order of the shards."""
    run_shards: int = 1
    """Neighbouring shards that stay together in that order, so that whole forward passes fill them."""

    def parts(self, n_shards: int) -> list[np.ndarray]:
        """The shards of each part, ascending; the first part begins with the kept shards."""
        first, size = self.kept_shards, self.run_shards
        runs = spread_order(-(-(n_shards - first) // size), self.seed, _SHARDS)
        parts = np.split(runs, range(self.part_shards // size, len(runs), self.part_shards // size))
        shards = [(first + np.sort(part)[:, None] * size + np.arange(size)).reshape(-1) for part in parts]
        return [np.append(np.arange(first), shards[0][shards[0] < n_shards]), *(p[p < n_shards] for p in shards[1:])]

    def to_come(self, n_shards: int, there: Collection[int]) -> set[int]:
        """Shards whose turn has not come: the missing ones of the last part that has any shard, and of later parts."""
        parts, known = [part.tolist() for part in self.parts(n_shards)], {*there}
        last = max((number for number, part in enumerate(parts) if not known.isdisjoint(part)), default=0)
        return {shard for part in parts[last:] for shard in part} - known

    def part_of(self, n_shards: int) -> np.ndarray:
        """int64 [shards]: the part of each shard."""
        parts = self.parts(n_shards)
        return np.repeat(np.arange(len(parts)), [len(part) for part in parts])[np.argsort(np.concatenate(parts))]


def ring_of(meta: StoreMeta) -> Ring | None:
    """How the store is cut into parts; None for a store that is not rolling."""
    found = meta.provenance.get("ring")
    return None if found is None else Ring(**found)


def design_effect(parts: Sequence[ShardMoments], rows: float) -> float:
    """The variance of batch means when each batch is drawn from one of `parts`, divided by the variance when batches of
    the same size are drawn from all parts; 1 is perfectly mixed. rows: a batch's vectors of one layer. Averaged over
    layers and dimensions; the parts are treated as a sample of all possible parts."""
    total = functools.reduce(merge, parts)
    within = np.sum([part.m2 for part in parts], axis=0)
    between = (total.m2 - within) / (total.count * (1 - 1 / len(parts)))
    within *= (1 - rows * len(parts) / total.count) / (total.count - len(parts))
    varies = total.m2 > 0
    return float(np.mean((rows * between + within)[varies] / total.m2[varies]) * total.count)


class Moments:
    """The moments of a store's shards, merged in shard order; in a rolling store first the kept ones, then by part."""

    def __init__(self, path: Path, meta: StoreMeta, records: Mapping[int, ShardRecord]) -> None:
        """records: those of the shards in the manifest."""
        self._path, self._shape, ring = path, (meta.n_layers, meta.d_model), ring_of(meta)
        stay, parts = (ring.kept_shards, ring.parts(meta.n_shards)) if ring else (meta.n_shards, [])
        groups = [range(stay), *(part[part >= stay].tolist() for part in parts)]
        self._records = [[records[shard] for shard in group if shard in records] for group in groups]

    def all(self) -> ShardMoments:
        """The merged moments of all shards in the manifest."""
        return functools.reduce(merge, map(self.of_part, range(-1, len(self._records) - 1)))

    def of_part(self, part: int) -> ShardMoments:
        """The merged moments of a part, even a removed one. The shards that stay are counted as part -1 instead."""
        records, file, total = self._records[part + 1], self._path / _MOMENTS / str(part), no_moments(*self._shape)
        try:
            for record in records:
                path = self._path / moments_name(record.shard)
                mean, m2 = read_numbers(path, (2, *self._shape), record.moments_xxh3_128)
                total = merge(total, ShardMoments(record.kept, mean, m2, np.array(record.norm_sums)))
            return total
        except DamagedError:
            if not file.exists():
                raise
        mean, m2 = read_numbers(file, (2, *self._shape))
        norm_sums = sum((np.array(record.norm_sums) for record in records), np.zeros(self._shape[0]))
        return ShardMoments(sum(record.kept for record in records), mean, m2, norm_sums)


class Readers:
    """The trainers of a rolling store, and which of its parts are removed."""

    def __init__(self, store: Path, ring: Ring) -> None:
        self._store, self._ring = store, ring

    def used(self) -> dict[str, int]:
        """How many parts each trainer has used, by its name."""
        files = sorted((self._store / _READERS).glob("*.json"))
        return dict(self._read(file, "remove it if its trainer will not continue") for file in files)

    def publish(self, name: str, parts: int) -> None:
        """Record that a trainer, named by its checkpoint's path, has used this many parts and saved its checkpoint."""
        path = self.file(name)
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, [sealed({"name": name, "parts": parts})])

    def file(self, name: str) -> Path:
        """The file with a trainer's number of used parts."""
        words = re.sub(r"[^A-Za-z0-9.-]", "_", name)[-100:]
        return self._store / _READERS / f"{words}-{xxhash.xxh3_64_hexdigest(name.encode())}.json"

    def removed(self) -> int:
        """Number of parts that are removed or being removed."""
        path = self._store / _REMOVED
        return self._read(path, "harvest again with --overwrite")[1] if path.exists() else 0

    def removed_shards(self, n_shards: int) -> set[int]:
        """The store's shards that are removed or being removed."""
        parts = self._ring.parts(n_shards)[: self.removed()]
        return {shard for part in parts for shard in part.tolist() if shard >= self._ring.kept_shards}

    def _read(self, path: Path, way_out: str) -> tuple[str, int]:
        """A trainer's name ("" for removed.json) and a number of parts."""
        with reading(f"{path}: damaged", way_out):
            data = read_whole(path, CONFIG_BYTES)
            found = json.loads(data)
            unsealed = not {*found} - {"name", "parts"}  # Earlier versions wrote no checksum.
            if type(found["parts"]) is not int or not (unsealed or is_intact(data[:-1])):
                raise ValueError("wrong checksum, or not a number")
            return str(found.get("name", "")), found["parts"]

    def register(self, name: str, part: int) -> None:
        """Register a trainer that needs `part` next; `IncompatibleError` if that part is already gone."""
        self.publish(name, part)  # First, so that any later removal takes this trainer into account.
        with removed_on_error(self.file(name)):
            self.require(name, part)

    def require(self, name: str, part: int) -> None:
        """`IncompatibleError` if `part`, which a trainer needs next, is already gone."""
        if part < (gone := self.removed()):
            raise IncompatibleError(
                f"{self._store}: {name} needs part {part + 1}, but the first {gone} have been removed, because all"
                " trainers running then had used them: harvest again with --overwrite, and start it earlier"
            )

    def announce(self, parts: int) -> None:
        """Announce that the first `parts` parts will be removed: from now on no trainer that needs them can start. The
        caller holds the store's lock, and checks once more for trainers that have started."""
        if parts > self.removed():
            atomic_write(self._store / _REMOVED, [sealed({"parts": parts})])

    def remove(self, parts: int, n_shards: int, moments: Moments) -> None:
        """Remove the shards of the first `parts` parts, which `announce` has announced."""
        for part, shards in list(enumerate(self._ring.parts(n_shards)))[max(parts - 2, 0) : parts]:  # 2 after a crash
            if not (file := self._store / _MOMENTS / str(part)).exists():
                file.parent.mkdir(exist_ok=True)
                found = moments.of_part(part)
                atomic_write(file, [encode_numbers(np.stack([found.mean, found.m2]))])
            for shard in shards[shards >= self._ring.kept_shards].tolist():
                for name in (shard_name(shard), moments_name(shard)):
                    (self._store / name).unlink(missing_ok=True)
