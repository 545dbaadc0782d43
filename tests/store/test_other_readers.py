"""zarr, tensorstore, xarray and dask read what we write, and we read what zarr and tensorstore write."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store.activations import ActivationStore
from store.dtypes import from_float32
from tests.support.stores import make_meta, make_store, random_activations, token_table

FORMATS = [("bfloat16", "none"), ("bfloat16", "zstd"), ("float16", "none"), ("float32", "zstd")]


@pytest.fixture(params=FORMATS, ids=["-".join(f) for f in FORMATS])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ActivationStore:
    stored_dtype, codec = request.param
    return make_store(
        tmp_path / "a.zarr",
        random_activations(150, 3, 7),
        stored_dtype=stored_dtype,
        codec=codec,
        chunk_tokens=16,
        shard_tokens=64,
    )


def open_tensorstore(path: Path, name: str) -> Any:
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
    return tensorstore.open(spec).result()


def test_zarr_reads_every_array(store: ActivationStore) -> None:
    import zarr

    group = zarr.open_group(str(store.path), mode="r")
    resid_post: Any = group["resid_post"]
    assert np.array_equal(resid_post[:], store.read(raw=True))
    assert resid_post.attrs["stored_dtype"] == store.meta.stored_dtype
    assert resid_post.metadata.dimension_names == ("token", "layer", "d_model")
    for name, column in store.tokens._asdict().items():
        array: Any = group[name]
        assert np.array_equal(array[:], column)
    statistics = store.statistics()
    for name, values in (("mean", statistics.mean), ("var", statistics.var), ("norm", statistics.norm)):
        array = group[f"layer_{name}"]
        assert np.array_equal(array[:], values)
    moments: Any = group["shard_moments"]
    assert np.isfinite(moments[:]).all()


def test_tensorstore_reads_every_array(store: ActivationStore) -> None:
    assert np.array_equal(open_tensorstore(store.path, "resid_post").read().result(), store.read(raw=True))
    assert np.array_equal(open_tensorstore(store.path, "keep").read().result(), store.tokens.keep)
    assert np.array_equal(open_tensorstore(store.path, "layer_var").read().result(), store.statistics().var)


@pytest.mark.filterwarnings("error::zarr.errors.ZarrUserWarning")
def test_xarray_and_dask_read_the_group(store: ActivationStore) -> None:
    xarray = pytest.importorskip("xarray")
    with xarray.open_zarr(str(store.path), consolidated=False, chunks={}) as opened:
        assert opened["resid_post"].dims == ("token", "layer", "d_model")
        assert np.array_equal(opened["resid_post"].values, store.read(raw=True))
        assert np.array_equal(opened["keep"].values, store.tokens.keep)


@pytest.mark.parametrize("writer", ["zarr", "tensorstore"])
def test_a_store_filled_by_another_writer(tmp_path: Path, store: ActivationStore, writer: str) -> None:
    """Its array, read by that library, gives the same numbers and statistics."""
    meta, tokens = store.meta, store.tokens
    raw = store.read(raw=True)
    raw[32:48, 1] = 0  # A chunk of zeros, which zarr leaves out.
    path = tmp_path / "b.zarr"
    with ActivationStore.create(path, meta, tokens) as filled:
        if writer == "zarr":
            import zarr

            group: Any = zarr.open_group(str(path), mode="r+")
            group["resid_post"][:] = raw
            theirs = group["resid_post"][:]
        else:
            array = open_tensorstore(path, "resid_post")
            array.write(raw).result()
            theirs = array.read().result()
        for shard in range(meta.n_shards):
            filled.write_shard(shard, theirs[slice(*meta.shard_bounds(shard))])
        filled.finalize()
    again = ActivationStore.open(path)
    assert np.array_equal(again.read(raw=True), raw)
    ours = tmp_path / "c.zarr"
    with ActivationStore.create(ours, meta, tokens) as written:
        for shard in range(meta.n_shards):
            start, stop = meta.shard_bounds(shard)
            written.write_shard(shard, raw[start:stop])
        assert np.array_equal(again.statistics().var, written.merged_statistics().var)


def test_metadata_is_that_of_the_format(tmp_path: Path) -> None:
    meta = make_meta(150, 3, 7, chunk_tokens=16, shard_tokens=64, codec="zstd")
    ActivationStore.create(tmp_path / "a.zarr", meta, token_table(150)).close()
    array = json.loads((tmp_path / "a.zarr/resid_post/zarr.json").read_text())
    (sharding,) = array["codecs"]
    assert array["chunk_grid"]["configuration"]["chunk_shape"] == [64, 3, 7]
    assert sharding["configuration"]["chunk_shape"] == [16, 1, 7]
    assert sharding["configuration"]["index_location"] == "end"
    assert [c["name"] for c in sharding["configuration"]["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert [c["name"] for c in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    assert array["data_type"] == "uint16"
    assert "consolidated_metadata" not in json.loads((tmp_path / "a.zarr/zarr.json").read_text())


def test_direct_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    """A shard by hand: 1 layer, 2 chunks of 2 tokens of which 3 are valid, then a chunk that is not there."""
    from google_crc32c import value as crc32c

    x = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)[:, None]
    make_store(tmp_path / "a.zarr", x, chunk_tokens=2, shard_tokens=6)
    raw = from_float32(x, "bfloat16").tobytes()
    sealed = [chunk + crc32c(chunk).to_bytes(4, "little") for chunk in (raw[:8], raw[8:] + bytes(4))]
    index = np.array([0, 12, 12, 12, 2**64 - 1, 2**64 - 1], "<u8").tobytes()
    expected = b"".join(sealed) + index + crc32c(index).to_bytes(4, "little")
    assert (tmp_path / "a.zarr/resid_post/c.0.0.0").read_bytes() == expected
