from pathlib import Path

import numpy as np
import pytest

from residscope.errors import IncompatibleError, ResidscopeError
from store import ActivationStore, dask_array
from store.manifest import forget_lines
from tests.support.stores import make_store, random_activations

dask = pytest.importorskip("dask")


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    keep = np.arange(150) % 16 != 0
    keep[64:128] = False  # A shard without a kept token.
    return make_store(tmp_path / "a.zarr", random_activations(150, 3, 7), keep=keep, chunk_tokens=16, shard_tokens=64)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
def test_the_kept_tokens_of_whole_shards(store: ActivationStore, scheduler: str) -> None:
    array = dask_array(store.path)
    keep = store.tokens.keep
    assert array.dtype == np.float32
    assert array.chunks == ((60, 20), (3,), (7,))
    some = dask_array(store.path, layers=[2, 0]), dask_array(store.path, layers=slice(1, 3))
    # At once, since every computation of its own would start processes of its own.
    found = dask.compute(array, *some, scheduler=scheduler, num_workers=2)
    assert np.array_equal(found[0], store.read()[keep])
    assert np.array_equal(found[1], store.read(layers=[2, 0])[keep])
    assert np.array_equal(found[2], store.read()[keep, 1:3])


def test_no_token_is_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path / "b.zarr", random_activations(20, 2, 3), keep=np.zeros(20, bool))
    assert dask_array(store.path).compute().shape == (0, 2, 3)


def test_names_are_those_of_the_data(store: ActivationStore, tmp_path: Path) -> None:
    array = dask_array(store.path)
    assert array.name == dask_array(store.path).name
    assert array.name != dask_array(store.path, layers=[0]).name


def test_what_is_missing_or_damaged_raises(store: ActivationStore) -> None:
    array = dask_array(store.path)
    file = store.path / "resid_post/c.2.0.0"
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    with pytest.raises(ResidscopeError, match="checksum of token chunk 0 at stored layer 0"):
        array.compute()
    forget_lines(store.path, [2])
    with pytest.raises(IncompatibleError, match="1 of 3 shards are missing"):
        dask_array(store.path)
    with pytest.raises(IncompatibleError, match="content hash should be"), dask.config.set(scheduler="processes"):
        array.compute()
