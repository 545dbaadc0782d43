"""Training during a harvest, on a store of which only some parts are on disk at a time (`store.care.ring`).

The stream of batches goes through the store part by part. Before a part is read, its shards must be there; when a step
has used the last row of a part, the runs are saved, and then the harvest is told that it may remove the part. So,
whichever process is killed, the rows that come after the last checkpoint are still there.
"""

import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from residscope.errors import Interrupted, UsageError
from store.activations import ActivationStore
from store.care.ring import Readers, design_effect
from store.folder import is_store
from store.manifest import FILE

_PARTS = 32


def wait_for_store(path: Path) -> None:
    """Wait until a harvest has created the store at `path`; `UsageError` if `path` is a file."""
    if path.is_file():
        raise UsageError(f"--store {path}: should be the folder of a store, found a file")
    if not is_store(path):
        print(f"train: waiting for a harvest to begin {path}", file=sys.stderr)
    while not is_store(path):
        time.sleep(0.1)


class Follower:
    """The link from a training run to the harvest that it follows: what it reports and waits for."""

    def __init__(self, store: ActivationStore, name: str, n_layers: int) -> None:
        """name: unique among the trainings on this store. n_layers: layers in each batch."""
        assert store.ring is not None
        self._store, self._name, self._n_layers = store, name, n_layers
        self._readers = Readers(store.path, store.ring)
        self._parts = store.ring.parts(store.meta.n_shards)
        self.part_of = store.ring.part_of(store.meta.n_shards)
        """int64 [shards]: the part that each shard belongs to."""
        self._moments = lru_cache(_PARTS)(lambda part: store.moments.of_part(part))
        self.stopped: Callable[[], bool] = lambda: False
        self._used, self._told, self._read, self._missing = 0, False, 0, set[int]()

    def require_once(self, epochs: int, processes: int) -> None:
        """Raise `UsageError` if rows would be needed twice or by several processes."""
        if epochs > 1 or processes > 1:
            what = "is filled and removed part by part, so each token is trained on once, by one process"
            raise UsageError(f"{self._store.path} {what}: lower --steps or --epochs, and leave --n-procs out")

    def expect(self, row_ends: np.ndarray, batch_size: int, step: int) -> None:
        """Set what the training needs from `step` on. row_ends: int64 [parts], rows of the stream served when each
        part is done. Raises if a part that it needs is removed already, or one is smaller than a batch."""
        self._row_ends, self._batch_size = row_ends, batch_size
        if np.diff(self._row_ends, prepend=0).min() < self._batch_size:
            raise UsageError(
                f"--batch-size {self._batch_size} is more than a part of {self._store.path} holds: lower it"
            )
        self._used = self.parts_used(step)
        self._readers.require(self._name, self._used)

    def begin(self, stopped: Callable[[], bool]) -> None:
        """Register this training with the harvest before anything is read. stopped: whether waiting should end."""
        self.stopped = stopped
        self._readers.register(self._name, self._used)

    def parts_used(self, step: int) -> int:
        """Number of parts whose rows the first `step` batches have all used."""
        return int(np.searchsorted(self._row_ends, step * self._batch_size, side="right"))

    def is_due(self, step: int) -> bool:
        """Whether a part has been used up since the last `publish`."""
        return self.parts_used(step) > self._used

    def publish(self, step: int) -> None:
        """Tell the harvest which parts are used up; the checkpoint of `step` must be on disk."""
        self._used = self.parts_used(step)
        self._readers.publish(self._name, self._used)

    def mixing(self, step: int) -> dict[str, float | None]:
        """For the metrics: the design effect of batches (`store.care.ring`), from the last parts that the first `step`
        batches have used up; None if fewer than two."""
        parts = [self._moments(part) for part in range(self.parts_used(step))[-_PARTS:]]
        return {"design_effect": design_effect(parts, self._batch_size / self._n_layers) if parts[1:] else None}

    def end(self) -> None:
        """Tell the harvest that nothing more is needed, even if the run is shorter than the store."""
        self._readers.publish(self._name, len(self._parts))

    def ready(self, part: int) -> bool:
        """Whether all shards of a part are there; raises `Interrupted` if the wait should end."""
        if self.stopped():
            raise Interrupted("stopped")
        file = self._store.path / FILE
        size = file.stat().st_size if file.exists() else -1
        if size != self._read:  # The manifest may be long, so it is read only when its size changes.
            self._store.refresh()
            self._read, self._missing = size, set(self._store.missing_shards())
        if self._missing.isdisjoint(self._parts[part].tolist()):
            return True
        if not self._told:
            self._told = True
            print(f"train: waiting for the harvest of {self._store.path} whenever it is behind", file=sys.stderr)
        return False
