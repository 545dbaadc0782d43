"""Hashes of whole files. Tested in tests/harvest/model/test_gguf.py and test_names.py."""

import hashlib
from pathlib import Path
from typing import Any


def add_file(digest: Any, path: Path) -> None:
    """Add a file's content to a hash of hashlib or xxhash."""
    with path.open("rb") as stream:
        hashlib.file_digest(stream, lambda: digest)


def hash_of(digest: Any, *paths: Path) -> str:
    """The hash in hex after adding the files' contents."""
    for path in paths:
        add_file(digest, path)
    return digest.hexdigest()
