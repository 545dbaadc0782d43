"""The arrays of a store: the metadata of all of them, and the values of all but `resid_post`.

How: `make_arrays` uses zarr to write every array's metadata, so that any Zarr v3 reader can open the store, and the
values of the token arrays. All small arrays have chunks of plain little-endian numbers followed by their crc32c; these
are read, and the statistics written, directly, so that reading a store does not need zarr. Tested in
tests/store/test_activations.py and tests/store/test_other_readers.py.

Shapes: T tokens, L stored layers, D = d_model.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from residscope.errors import UsageError
from store.checksums import CRC_BYTES, DamagedError, checksum, read_checked, read_small
from store.manifest import FOLDER
from store.meta import ZSTD_LEVEL, StoreMeta
from store.moments import LayerStatistics

_TOKEN_CHUNK = 1 << 22
_STATISTICS = ("layer_mean/c.0.0", "layer_var/c.0.0", "layer_norm/c.0")


class TokenTable(NamedTuple):
    """What is known of each token, in store order."""

    token_id: np.ndarray
    """int32 [T]: the tokenizer's id."""
    document: np.ndarray
    """int32 [T]: the document that the token comes from, counted from 0."""
    position: np.ndarray
    """int32 [T]: position within the packed sequence."""
    keep: np.ndarray
    """bool [T]: False for tokens that are neither trained on nor analysed."""


_DOCUMENTS = 2**24
"""Documents that even a small store may have (some are empty): a limit, because readers hold a number for each."""

_TOKEN_DTYPES = {name: np.dtype(bool) if name == "keep" else np.dtype("<i4") for name in TokenTable._fields}


def checked_tokens(tokens: TokenTable, n_tokens: int) -> TokenTable:
    """`tokens` in the stored number formats; `UsageError` when a column has the wrong length or values."""
    columns = {}
    for name, dtype in _TOKEN_DTYPES.items():
        column = np.asarray(getattr(tokens, name))
        if column.shape != (n_tokens,):
            raise UsageError(f"store: {name} should have shape ({n_tokens},), found {column.shape}")
        columns[name] = np.ascontiguousarray(column, dtype)
        if not np.array_equal(columns[name], column):
            raise UsageError(f"store: {name} has values that {dtype} cannot hold")
        low, high, most = int(column.min(initial=0)), int(column.max(initial=0)), max(n_tokens, _DOCUMENTS)
        if low < 0 or (name == "document" and high >= most):
            wanted = f"count from 0 to below {most:,}" if name == "document" else "be 0 or more"
            raise UsageError(f"store: {name} should {wanted}, found {low if low < 0 else high}")
    return TokenTable(**columns)


def make_arrays(folder: Path, meta: StoreMeta, tokens: TokenTable) -> None:
    """Write every array's metadata and the token arrays' values into a folder that has neither."""
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    group = zarr.create_group(str(folder), zarr_format=3, attributes=meta.to_attributes())
    group.create_group(FOLDER)  # An empty group, so that zarr does not warn about an unknown folder.
    n_tokens, n_layers, d_model = meta.n_tokens, meta.n_layers, meta.d_model
    # All chunks of an array are in one folder ("c.0.0"), so that one fsync makes a new chunk's name durable.
    common: Any = {"filters": None, "chunk_key_encoding": {"name": "default", "separator": "."}}
    group.create_array(
        "resid_post",
        shape=(n_tokens, n_layers, d_model),
        dtype="uint16" if meta.stored_dtype == "bfloat16" else meta.stored_dtype,
        chunks=(meta.chunk_tokens, 1, d_model),
        shards=(meta.shard_tokens, n_layers, d_model),
        compressors=[*([ZstdCodec(level=ZSTD_LEVEL)] if meta.codec == "zstd" else []), Crc32cCodec()],
        fill_value=0,
        dimension_names=("token", "layer", "d_model"),
        attributes={"stored_dtype": meta.stored_dtype},
        **common,
    )

    def small(name: str, dimensions: tuple[str, ...], shape: tuple[int, ...], **options: Any) -> Any:
        options |= {"dimension_names": dimensions, "compressors": [Crc32cCodec()], **common}
        return group.create_array(name, shape=shape, **options)

    numbers: Any = {"dtype": "float64", "fill_value": float("nan")}
    per_layer = (n_layers, d_model)
    moments = ("shard", "moment", "layer", "d_model")
    small("shard_moments", moments, (meta.n_shards, 2, *per_layer), chunks=(1, 2, *per_layer), **numbers)
    small("layer_mean", ("layer", "d_model"), per_layer, chunks=per_layer, **numbers)
    small("layer_var", ("layer", "d_model"), per_layer, chunks=per_layer, **numbers)
    small("layer_norm", ("layer",), (n_layers,), chunks=(n_layers,), **numbers)
    columns: Any = {"chunks": (min(n_tokens, _TOKEN_CHUNK),), "fill_value": 0, "config": {"write_empty_chunks": True}}
    for name, dtype in _TOKEN_DTYPES.items():
        small(name, ("token",), (n_tokens,), dtype=dtype, **columns)[:] = getattr(tokens, name)


def check_counts(folder: Path, meta: StoreMeta, checksums: Mapping[str, str]) -> None:
    """`DamagedError` unless the token arrays' files have the number and sizes that the attributes imply."""
    chunk = min(meta.n_tokens, _TOKEN_CHUNK)
    n_files = -(-meta.n_tokens // chunk)
    for name, dtype in _TOKEN_DTYPES.items():
        files = [folder / file for file in checksums if file.startswith(f"{name}/c.")]
        wanted = chunk * dtype.itemsize + CRC_BYTES
        if len(files) != n_files:
            found = f"{meta.n_tokens:,} tokens should be in {n_files:,} files, found {len(files):,}"
            raise DamagedError(folder / name, found)
        for path in files:
            if path.exists() and (size := path.stat().st_size) != wanted:
                raise DamagedError(path, f"the file should have {wanted:,} bytes for {chunk:,} tokens, found {size:,}")


def read_tokens(folder: Path, meta: StoreMeta, checksums: Mapping[str, str]) -> TokenTable:
    """The token arrays, checked against the manifest's header (and before, by `check_counts`); read-only."""
    chunk, columns = min(meta.n_tokens, _TOKEN_CHUNK), {}
    for name, dtype in _TOKEN_DTYPES.items():
        files = [read_checked(folder, f"{name}/c.{i}", checksums) for i in range(-(-meta.n_tokens // chunk))]
        columns[name] = np.concatenate([np.frombuffer(file, dtype, chunk) for file in files])[: meta.n_tokens]
        columns[name].flags.writeable = False
    return TokenTable(**columns)


def moments_name(shard: int) -> str:
    """File of a shard's chunk of `shard_moments`, below the store."""
    return f"shard_moments/c.{shard}.0.0.0"


def statistics_chunks(found: LayerStatistics) -> dict[str, bytes]:
    """The files of the layer statistics, by their paths in the store, and what should be in them."""
    numbers = (found.mean, found.var, found.norm)
    return {name: encode_numbers(values) for name, values in zip(_STATISTICS, numbers, strict=True)}


def read_statistics(folder: Path, meta: StoreMeta, count: int, norm_sums: np.ndarray) -> LayerStatistics | None:
    """The layer statistics over `count` kept tokens, whose norms add up to `norm_sums` [L]; None when one of the three
    files does not exist. Raises `DamagedError` when they do not match `norm_sums`."""
    shape = (meta.n_layers, meta.d_model)
    if not all((folder / name).exists() for name in _STATISTICS):
        return None
    shapes = zip(_STATISTICS, (shape, shape, shape[:1]), strict=True)
    found = LayerStatistics(count, *(read_numbers(folder / name, shape) for name, shape in shapes))
    if count and not np.allclose(found.norm * count, norm_sums, rtol=1e-9, atol=0):
        raise DamagedError(folder / _STATISTICS[-1], "its numbers do not match the shards, or are another store's")
    return found


def encode_numbers(values: np.ndarray) -> bytes:
    """float64 numbers as a chunk: little-endian, followed by their crc32c."""
    data = np.ascontiguousarray(values, "<f8").tobytes()
    return data + checksum(data)


def read_numbers(path: Path, shape: tuple[int, ...], xxh3_128: str | None = None) -> np.ndarray:
    """The float64 numbers [shape] of a chunk's file; raises when it is missing, damaged, or does not have this hash."""
    n_bytes = math.prod(shape) * 8 + CRC_BYTES
    data = read_small(path, n_bytes)
    if len(data) != n_bytes or checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise DamagedError(path, "its checksum does not match")
    if xxh3_128 not in (None, xxhash.xxh3_128_hexdigest(data)):
        raise DamagedError(path, "it belongs to another shard or store")
    return np.frombuffer(data, "<f8", len(data) // 8).reshape(shape)
