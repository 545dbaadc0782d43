"""What a store's metadata claims is held against its files before any memory is taken by it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from residscope.errors import IncompatibleError, UsageError
from residscope.urls import as_path
from store.activations import ActivationStore
from store.care.verify import verify
from store.folder import refuse_inside_store
from store.manifest import FILE, sealed
from tests.support.faults import everything, fill


def claim(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the store's attributes, and make every checksum right again."""
    file = path / "zarr.json"
    content = json.loads(file.read_bytes())
    change(content["attributes"])
    file.write_text(json.dumps(content))
    header, *lines = (path / FILE).read_bytes().splitlines(keepends=True)
    fields = json.loads(header)
    fields["checksums"]["zarr.json"] = xxhash.xxh3_128_hexdigest(file.read_bytes())
    del fields["check"]
    (path / FILE).write_bytes(sealed(fields) + b"".join(lines))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    fill(tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_tokens": 10**15}, r"token_id: 1,000,000,000,000,000 tokens should be in 238,418,580 files, found 1\."),
        (
            {"n_tokens": 4_000_000},
            r"token_id/c\.0: the file should have 16,000,004 bytes for 4,000,000 tokens, found ",
        ),
        ({"d_model": 10**12}, "a shard should have at most 1.07 GB before compression"),
        ({"shard_tokens": 8 * 10**9}, "a shard should have at most 1.07 GB before compression"),
        ({"lens": 5}, "lens and provenance should be mappings"),
    ],
)
def test_sizes_that_no_file_has_are_refused(store: Path, changes: dict[str, Any], said: str) -> None:
    claim(store, lambda attributes: attributes.update(changes))
    for read in (ActivationStore.open, lambda path: ActivationStore.open(path, partial=True), verify):
        with pytest.raises(IncompatibleError, match=said):
            read(store)


@pytest.mark.parametrize("name", ["token_id/c.0", "keep/c.0", "shard_moments/c.0.0.0.0", "layer_mean/c.0.0", FILE])
@pytest.mark.parametrize("kind", ["device", "sparse"])
def test_a_file_that_has_no_end_or_is_too_large_is_not_read(store: Path, name: str, kind: str) -> None:
    (store / name).unlink()
    if kind == "device":
        (store / name).symlink_to("/dev/zero")
    else:
        (store / name).touch()
        os.truncate(store / name, 1 << 40)
    with pytest.raises(IncompatibleError):
        everything(store)
    if (name, kind) != (FILE, "device"):  # a device is no store's manifest
        assert name == FILE or "layer_mean" in name or verify(store)


def test_attributes_that_are_no_json_object_are_refused(store: Path) -> None:
    claim(store, lambda attributes: attributes.clear())
    with pytest.raises(IncompatibleError, match="not an activation store"):
        ActivationStore.open(store)


def test_what_is_no_store_is_refused_at_a_url_before_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residscope.urls._client", lambda *_: pytest.fail("asked the bucket"))
    with pytest.raises(UsageError, match=r"--out s3://b/ckpt.pt should be on a disk: write ckpt.pt there, then copy"):
        refuse_inside_store(as_path("s3://b/ckpt.pt"))
