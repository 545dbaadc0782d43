"""Sparse codes of an autoencoder, kept inside a store: `acts.zarr/latents/KEY/`, two Zarr arrays, values and indices.

How: KEY is a hash of all that the codes depend on, and the group's attributes spell it out; codes of another store,
autoencoder, format or set of layers are never taken for these. A shard's codes are two files, each written whole or not
at all and ending in its crc32c; a shard that lacks one, or in which one is damaged, counts as not kept. The manifest
does not know of them, so a store with codes is the same store. Not here: making codes.

Shapes: T tokens, L layers, W places for active latents of a vector, S tokens of a shard.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from store.activations import ActivationStore
from store.files import atomic_write
from store.shards import CRC_BYTES, checksum

FOLDER = "latents"
FORMAT, VERSION = "residscope-codes", 1


class KeptCodes:
    """The codes of one autoencoder on one store."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], n_tokens: int, dtype: str) -> None:
        """`open` and `create` make it. shape: (S, L, W)."""
        self.folder = folder
        self._shape, self._n_tokens = shape, n_tokens
        self._dtypes = {"values": np.dtype(dtype).newbyteorder("<"), "indices": np.dtype("<i4")}

    @classmethod
    def open(cls, store: ActivationStore, origin: Mapping[str, Any], width: int) -> "KeptCodes | None":
        """Those of `origin` (plain JSON values: what the codes depend on, beside the store) in `store`; None if there
        are none."""
        attributes = _attributes(store, origin, width)
        folder = store.path / FOLDER / _key(attributes)
        try:
            found = json.loads((folder / "zarr.json").read_bytes())["attributes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if found != attributes:
            return None
        shape = (store.meta.shard_tokens, len(attributes["layers"]), width)
        return cls(folder, shape, store.meta.n_tokens, attributes["dtype"])

    @classmethod
    def create(cls, store: ActivationStore, origin: Mapping[str, Any], width: int) -> "KeptCodes":
        """As `open`, after making the arrays, without codes yet, where there are none."""
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
        shape = (store.meta.n_tokens, len(attributes["layers"]), width)
        for name, dtype in (("values", attributes["dtype"]), ("indices", "int32")):
            group.create_array(
                name,
                shape=shape,
                dtype=dtype,
                chunks=(store.meta.shard_tokens, *shape[1:]),
                compressors=[Crc32cCodec()],
                filters=None,
                chunk_key_encoding={"name": "default", "separator": "."},
                fill_value=0,
                dimension_names=("token", "layer", "place"),
            )
        folder = parent / _key(attributes)
        if folder.exists():  # no group that can be read, or another's: nothing of it can be trusted
            shutil.rmtree(folder)
        made.replace(folder)
        opened = cls.open(store, origin, width)
        assert opened is not None
        return opened

    def has(self, shard: int) -> bool:
        """Whether the shard's codes are there."""
        return all(path.exists() for path in self._files(shard).values())

    def write(self, shard: int, values: np.ndarray, indices: np.ndarray) -> bool:
        """Keep the codes [T, L, w] of all tokens of a shard; False, and nothing is kept, if a vector has more active
        latents than there are places. Values of 0 are padding."""
        width = self._shape[2]
        if values.shape[2] > width:
            order = np.argsort(values <= 0, axis=2, kind="stable")  # active ones first
            values, indices = np.take_along_axis(values, order, 2), np.take_along_axis(indices, order, 2)
            if (values[:, :, width:] > 0).any():
                return False
        for name, part in (("values", values), ("indices", indices)):
            whole = np.zeros(self._shape, self._dtypes[name])
            whole[: part.shape[0], :, : part.shape[2]] = part[:, :, :width]
            path = self._files(shard)[name]
            # Two workers may write a shard at once, where one was thought dead: each has a name of its own.
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            atomic_write(temporary, [whole.tobytes(), checksum(whole.tobytes())])
            temporary.replace(path)
        return True

    def read(self, shard: int) -> tuple[np.ndarray, np.ndarray] | None:
        """values [T, L, W] and indices int64 [T, L, W] of a shard's tokens; None if not there, or damaged."""
        parts = []
        for name, path in self._files(shard).items():
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return None
            n_bytes = int(np.prod(self._shape)) * self._dtypes[name].itemsize
            if len(data) != n_bytes + CRC_BYTES or checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
                return None
            whole = np.frombuffer(data, self._dtypes[name], n_bytes // self._dtypes[name].itemsize)
            parts.append(whole.reshape(self._shape)[: self._n_tokens - shard * self._shape[0]])
        return parts[0], parts[1].astype(np.int64)

    def _files(self, shard: int) -> dict[str, Path]:
        return {name: self.folder / name / f"c.{shard}.0.0" for name in ("values", "indices")}


def _attributes(store: ActivationStore, origin: Mapping[str, Any], width: int) -> dict[str, Any]:
    own = {"format": FORMAT, "format_version": VERSION, "content_hash": store.content_hash, "width": width}
    return {**own, **origin}


def _key(attributes: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(attributes, sort_keys=True).encode())
