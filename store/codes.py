"""Sparse codes of an autoencoder, kept inside a store: `acts.zarr/latents/KEY/`, three Zarr arrays.

How: KEY is a hash of everything that the codes depend on, which the group's attributes list, so that codes of another
store, autoencoder, format or set of layers are never used. A shard's codes are two files, values and indices, each
written atomically and ending in its crc32c. A third file, written last, holds a hash of KEY, the shard's number
and both files, so that intact files of another key or shard are not used either. If any of the three is missing,
damaged or another's, the shard has no codes. The manifest does not list codes, so adding them does not change a store.
Tested in tests/analysis/test_tiles.py and tests/store/test_format_page.py.

Shapes: T tokens, L layers, W slots for a vector's active latents, S tokens of a shard.
"""

import json
import math
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from residscope.reading import CONFIG_BYTES, read_whole
from store.activations import ActivationStore
from store.checksums import CRC_BYTES, checksum
from store.files import atomic_write

FOLDER = "latents"
FORMAT, VERSION = "residscope-codes", 2

_CODES = ("values", "indices")
_DIGEST = "digest"
_DIGEST_BYTES = 16


class KeptCodes:
    """The codes of one autoencoder on one store."""

    def __init__(self, folder: Path, key: str, shape: tuple[int, int, int], n_tokens: int, dtype: str) -> None:
        """Use `open` or `create`. shape: (S, L, W)."""
        self.folder, self._key = folder, key
        self._shape, self._n_tokens = shape, n_tokens
        self._dtypes = {"values": np.dtype(dtype).newbyteorder("<"), "indices": np.dtype("<i4")}

    @classmethod
    def open(cls, store: ActivationStore, origin: Mapping[str, Any], width: int) -> "KeptCodes | None":
        """The codes in `store` made by `origin` (plain JSON: what they depend on besides the store), or None."""
        attributes = _attributes(store, origin, width)
        key = _key(attributes)
        folder = store.path / FOLDER / key
        try:
            found = json.loads(read_whole(folder / "zarr.json", CONFIG_BYTES))["attributes"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if found != attributes:
            return None
        shape = (store.meta.shard_tokens, len(attributes["layers"]), width)
        return cls(folder, key, shape, store.meta.n_tokens, attributes["dtype"])

    @classmethod
    def create(cls, store: ActivationStore, origin: Mapping[str, Any], width: int) -> "KeptCodes":
        """Like `open`, but makes empty arrays if there are none."""
        import zarr
        from zarr.codecs import Crc32cCodec

        found = cls.open(store, origin, width)
        if found is not None:
            return found
        attributes = _attributes(store, origin, width)
        parent = store.path / FOLDER
        if not (parent / "zarr.json").exists():
            parent.mkdir(exist_ok=True)
            atomic_write(parent / "zarr.json", [b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'])
        made = parent / f".{uuid.uuid4().hex}.making"
        group = zarr.create_group(str(made), zarr_format=3, attributes=attributes)
        keys = {"name": "default", "separator": "."}
        common: Any = {"filters": None, "chunk_key_encoding": keys, "fill_value": 0}
        inner = (len(attributes["layers"]), width)
        shape, chunks = (store.meta.n_tokens, *inner), (store.meta.shard_tokens, *inner)
        codes: Any = {"compressors": [Crc32cCodec()], "dimension_names": ("token", "layer", "place"), **common}
        for name, dtype in (("values", attributes["dtype"]), ("indices", "int32")):
            group.create_array(name, shape=shape, dtype=dtype, chunks=chunks, **codes)
        digests: Any = {"compressors": None, "dimension_names": ("shard", "byte"), **common}
        shape, chunks = (store.meta.n_shards, _DIGEST_BYTES), (1, _DIGEST_BYTES)
        group.create_array(_DIGEST, shape=shape, dtype="uint8", chunks=chunks, **digests)
        folder = parent / _key(attributes)
        if folder.exists():  # unreadable, or another key's: nothing in it can be trusted
            shutil.rmtree(folder)
        made.replace(folder)
        opened = cls.open(store, origin, width)
        assert opened is not None
        return opened

    def write(self, shard: int, values: np.ndarray, indices: np.ndarray) -> bool:
        """Write a shard's codes [T, L, w] (0: padding). If a vector has over W active latents: writes none, False."""
        width = self._shape[2]
        if values.shape[2] > width:
            order = np.argsort(values <= 0, axis=2, kind="stable")  # active ones first
            values, indices = np.take_along_axis(values, order, 2), np.take_along_axis(indices, order, 2)
            if (values[:, :, width:] > 0).any():
                return False
        written = []
        for name, part in zip(_CODES, (values, indices), strict=True):
            whole = np.zeros(self._shape, self._dtypes[name])
            whole[: part.shape[0], :, : part.shape[2]] = part[:, :, :width]
            data = whole.tobytes()
            written.append(data)
            _write_whole(self._files(shard)[name], [data, checksum(data)])
        _write_whole(self._digest_file(shard), [self._digest(shard, written)])
        return True

    def read(self, shard: int) -> tuple[np.ndarray, np.ndarray] | None:
        """values and indices (int64) [T, L, W] of a shard's tokens; None if missing, damaged, or another's."""
        try:
            sizes = [math.prod(self._shape) * self._dtypes[name].itemsize + CRC_BYTES for name in _CODES]
            files = [read_whole(path, size) for path, size in zip(self._files(shard).values(), sizes, strict=True)]
            digest = read_whole(self._digest_file(shard), _DIGEST_BYTES)
        except (FileNotFoundError, ValueError):
            return None
        parts = []
        for name, data, size in zip(_CODES, files, sizes, strict=True):
            if len(data) != size or checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
                return None
            whole = np.frombuffer(data, self._dtypes[name], math.prod(self._shape))
            parts.append(whole.reshape(self._shape)[: self._n_tokens - shard * self._shape[0]])
        if digest != self._digest(shard, [memoryview(data)[:-CRC_BYTES] for data in files]):
            return None
        return parts[0], parts[1].astype(np.int64)

    def _files(self, shard: int) -> dict[str, Path]:
        return {name: self.folder / name / f"c.{shard}.0.0" for name in _CODES}

    def _digest_file(self, shard: int) -> Path:
        return self.folder / _DIGEST / f"c.{shard}.0"

    def _digest(self, shard: int, codes: Sequence[bytes | memoryview]) -> bytes:
        """A hash (XXH3-128, 16 bytes) of the key, the shard's number and its codes without their crc32c."""
        digest = xxhash.xxh3_128(f"{self._key}:{shard}:".encode())
        for part in codes:
            digest.update(part)
        return digest.digest()


def _write_whole(path: Path, parts: Sequence[bytes]) -> None:
    # Two workers may write the same shard at once, if one was thought dead: each uses a temporary name of its own.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    atomic_write(temporary, parts)
    temporary.replace(path)


def _attributes(store: ActivationStore, origin: Mapping[str, Any], width: int) -> dict[str, Any]:
    own = {"format": FORMAT, "format_version": VERSION, "content_hash": store.content_hash, "width": width}
    return {**own, **origin}


def _key(attributes: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(attributes, sort_keys=True).encode())
