"""A store that is on the disk in part at a time: harvested part by part, each removed once all trainers have used it.

How: the parts are fixed when the store is made, from its metadata alone. The first shards hold the documents that are
set aside for validation, and stay. The others follow in a spread order, as many in a part as half of the disk
space takes; the store is trained on part by part (`store.loader`), so that rows mix within a part. A shard keeps its
line when its files are removed; the moments of a part are then kept as one, since those of all shards of a store may be
larger than a part. Beside the manifest lie

    readers/NAME.json   how many parts a trainer has used, written after its checkpoint is on the disk
    removed.json        how many parts are removed, written before the first of their files goes
    moments/PART        the moments of a part that is removed, written after that and before the first goes

and part p is filled once part p - 2 is removed: so at most two are on the disk, and whatever is killed, at whatever
moment, finds what it needs. Content is that of the options and token ids (`config_hash`): the hash of a store whose
shards come and go cannot be a hash of shards.
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
_SHARDS = 6  # The stream of random numbers, beside those of `store.shuffle`.


class Ring(NamedTuple):
    """How a store is cut into parts; `provenance["ring"]` of its metadata."""

    kept_shards: int
    """The first ones, which stay."""
    part_shards: int
    """Shards of every other part but the last."""
    fraction: float
    """Share of the documents that is set aside for validation, as `store.shuffle.validation_documents` draws it ..."""
    seed: int
    """... with this seed, which is also that of the order of the shards."""
    run_shards: int = 1
    """Neighbours that come one after another, as one, in that order: they are filled by whole forward passes."""

    def parts(self, n_shards: int) -> list[np.ndarray]:
        """The shards of each part, ascending; the first one begins with those that are kept."""
        first, size = self.kept_shards, self.run_shards
        runs = spread_order(-(-(n_shards - first) // size), self.seed, _SHARDS)
        parts = np.split(runs, range(self.part_shards // size, len(runs), self.part_shards // size))
        shards = [(first + np.sort(part)[:, None] * size + np.arange(size)).reshape(-1) for part in parts]
        return [np.append(np.arange(first), shards[0][shards[0] < n_shards]), *(p[p < n_shards] for p in shards[1:])]

    def to_come(self, n_shards: int, there: Collection[int]) -> set[int]:
        """Shards whose turn has not come: those that lack, from the last part on of which there is one."""
        parts, known = [part.tolist() for part in self.parts(n_shards)], {*there}
        last = max((number for number, part in enumerate(parts) if not known.isdisjoint(part)), default=0)
        return {shard for part in parts[last:] for shard in part} - known

    def part_of(self, n_shards: int) -> np.ndarray:
        """int64 [shards]: the part that each is in."""
        parts = self.parts(n_shards)
        return np.repeat(np.arange(len(parts)), [len(part) for part in parts])[np.argsort(np.concatenate(parts))]


def ring_of(meta: StoreMeta) -> Ring | None:
    """How the store is cut, where it is one of this kind."""
    found = meta.provenance.get("ring")
    return None if found is None else Ring(**found)


def design_effect(parts: Sequence[ShardMoments], rows: float) -> float:
    """Of batches that are each drawn from one of `parts`: the variance of a batch's mean over that of as many vectors
    drawn from all parts; 1 is as well mixed. Of `rows` vectors of a layer in a batch; the mean over layers and
    dimensions, and parts count as one sample of all that there could be."""
    total = functools.reduce(merge, parts)
    within = np.sum([part.m2 for part in parts], axis=0)
    between = (total.m2 - within) / (total.count * (1 - 1 / len(parts)))
    within *= (1 - rows * len(parts) / total.count) / (total.count - len(parts))
    varies = total.m2 > 0
    return float(np.mean((rows * between + within)[varies] / total.m2[varies]) * total.count)


class Moments:
    """The moments of a store's shards: merged in shard order; in a store of parts, first those that stay."""

    def __init__(self, path: Path, meta: StoreMeta, records: Mapping[int, ShardRecord]) -> None:
        """records: lines of the shards that have come."""
        self._path, self._shape, ring = path, (meta.n_layers, meta.d_model), ring_of(meta)
        stay, parts = (ring.kept_shards, ring.parts(meta.n_shards)) if ring else (meta.n_shards, [])
        groups = [range(stay), *(part[part >= stay].tolist() for part in parts)]
        self._records = [[records[shard] for shard in group if shard in records] for group in groups]

    def all(self) -> ShardMoments:
        """Those of all shards that have come."""
        return functools.reduce(merge, map(self.of_part, range(-1, len(self._records) - 1)))

    def of_part(self, part: int) -> ShardMoments:
        """Those of a part, without shards that stay, which are part -1; also once it is removed."""
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
    """The trainers of a store, and what is removed of it."""

    def __init__(self, store: Path, ring: Ring) -> None:
        self._store, self._ring = store, ring

    def used(self) -> dict[str, int]:
        """Parts that each trainer has used, by its name."""
        files = sorted((self._store / _READERS).glob("*.json"))
        return dict(self._read(file, "remove it, if its trainer is not to go on") for file in files)

    def publish(self, name: str, parts: int) -> None:
        """Say that a trainer, called by its checkpoint's path, has used this many parts, and has saved what it made of
        them."""
        path = self.file(name)
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, [sealed({"name": name, "parts": parts})])

    def file(self, name: str) -> Path:
        """Where a trainer's parts are."""
        words = re.sub(r"[^A-Za-z0-9.-]", "_", name)[-100:]
        return self._store / _READERS / f"{words}-{xxhash.xxh3_64_hexdigest(name.encode())}.json"

    def removed(self) -> int:
        """Parts that are removed, or are being removed."""
        path = self._store / _REMOVED
        return self._read(path, "harvest again with --overwrite")[1] if path.exists() else 0

    def removed_shards(self, n_shards: int) -> set[int]:
        """Of the store's shards, those that are removed, or are being removed."""
        parts = self._ring.parts(n_shards)[: self.removed()]
        return {shard for part in parts for shard in part.tolist() if shard >= self._ring.kept_shards}

    def _read(self, path: Path, way_out: str) -> tuple[str, int]:
        """A trainer's name ("": none), and parts of this store."""
        with reading(f"{path}: damaged", way_out):
            data = read_whole(path, CONFIG_BYTES)
            found = json.loads(data)
            earlier = not {*found} - {"name", "parts"}  # versions, which wrote no check sum
            if type(found["parts"]) is not int or not (earlier or is_intact(data[:-1])):
                raise ValueError("wrong check sum, or no number")
            return str(found.get("name", "")), found["parts"]

    def register(self, name: str, part: int) -> None:
        """Make a trainer known that needs `part` next; `IncompatibleError` where it comes too late."""
        self.publish(name, part)  # First: what is removed after this is removed with a look at it.
        with removed_on_error(self.file(name)):
            self.require(name, part)

    def require(self, name: str, part: int) -> None:
        """`IncompatibleError` where a trainer that needs `part` next comes too late."""
        if part < (gone := self.removed()):
            raise IncompatibleError(
                f"{self._store}: {name} needs part {part + 1} of it, and the first {gone} are removed, since all"
                " trainers that had begun have used them: harvest again with --overwrite, and start it earlier"
            )

    def announce(self, parts: int) -> None:
        """Say that the first `parts` parts are about to be removed: no trainer that needs them can begin any more. The
        caller holds the store's lock, and looks once more at those that have begun."""
        if parts > self.removed():
            atomic_write(self._store / _REMOVED, [sealed({"parts": parts})])

    def remove(self, parts: int, n_shards: int, moments: Moments) -> None:
        """Remove the shards of the first `parts` parts, once that is announced."""
        for part, shards in list(enumerate(self._ring.parts(n_shards)))[max(parts - 2, 0) : parts]:  # after a crash two
            if not (file := self._store / _MOMENTS / str(part)).exists():
                file.parent.mkdir(exist_ok=True)
                found = moments.of_part(part)
                atomic_write(file, [encode_numbers(np.stack([found.mean, found.m2]))])
            for shard in shards[shards >= self._ring.kept_shards].tolist():
                for name in (shard_name(shard), moments_name(shard)):
                    (self._store / name).unlink(missing_ok=True)
