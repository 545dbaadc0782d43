"""Damaged lines of the manifest: a torn last one is a missing shard, any other is refused."""

from pathlib import Path

import pytest

from residscope.errors import IncompatibleError, ResidscopeError
from store.activations import ActivationStore
from store.care.verify import verify
from store.manifest import FILE
from tests.support.faults import fill


def test_manifest_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    fill(path)
    good = (path / FILE).read_bytes()
    header, *lines = good.splitlines(keepends=True)
    (path / FILE).write_bytes(header + lines[0] + lines[1][:50] + b"\n" + lines[2])
    with pytest.raises(ResidscopeError, match="line 3: its checksum"):
        ActivationStore.open(path, partial=True)
    assert [bad.index for bad in verify(path)] == [None, 1]
    (path / FILE).write_bytes(good + lines[1])
    with pytest.raises(ResidscopeError, match="line 5: shard 1 is listed twice"):
        ActivationStore.open(path)
    (path / FILE).write_bytes(b"".join([*lines]))
    with pytest.raises(ResidscopeError, match="line 1: the header"):
        ActivationStore.open(path)
    (path / FILE).write_bytes(good[:-20])
    with pytest.raises(IncompatibleError, match="1 of 3 shards"):
        ActivationStore.open(path)
    (bad,) = verify(path)
    assert (bad.index, "incomplete" in bad.reason) == (2, True)
