import pickle
from pathlib import Path

import numpy as np
import pytest

from residscope.errors import IncompatibleError, UsageError
from store.activations import ActivationStore
from store.dtypes import from_float32, to_float32
from tests.support.stores import make_meta, make_store, random_activations, token_table

ALL_FORMATS = [(dtype, codec) for dtype in ("bfloat16", "float16", "float32") for codec in ("none", "zstd")]


def rounded(x: np.ndarray, stored_dtype: str) -> np.ndarray:
    return to_float32(from_float32(x, stored_dtype), stored_dtype)


@pytest.mark.parametrize(("stored_dtype", "codec"), ALL_FORMATS)
def test_what_is_written_is_read(tmp_path: Path, stored_dtype: str, codec: str) -> None:
    x = random_activations(300, 3, 12)
    store = make_store(tmp_path / "a.zarr", x, stored_dtype=stored_dtype, codec=codec, chunk_tokens=16, shard_tokens=64)
    expected = rounded(x, stored_dtype)
    assert np.array_equal(store.read(), expected)
    assert np.array_equal(to_float32(store.read(raw=True), stored_dtype), expected)
    tokens = token_table(300)
    for name, column in store.tokens._asdict().items():
        assert np.array_equal(column, getattr(tokens, name))
        assert not column.flags.writeable


@pytest.mark.parametrize(("start", "stop"), [(0, 300), (17, 18), (60, 70), (299, 300), (5, 5), (64, 128), (-10, None)])
@pytest.mark.parametrize("layers", [None, slice(1, 3), [2, 0], []])
def test_any_range_of_tokens_and_layers(tmp_path: Path, start: int, stop: int, layers: slice | list[int]) -> None:
    x = random_activations(300, 3, 4)
    store = make_store(tmp_path / "a.zarr", x, chunk_tokens=16, shard_tokens=64)
    expected = rounded(x, "bfloat16")[start:stop]
    assert np.array_equal(store.read(slice(start, stop), layers), expected if layers is None else expected[:, layers])


def test_layers_and_steps_that_are_not_there_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.zarr", random_activations(20, 2, 4))
    for tokens in (slice(0, 9, 2), [], [1, 2], np.array([3]), 5):
        with pytest.raises(UsageError, match=r"read: tokens should be a slice of step 1, found"):
            store.read(tokens)  # pyright: ignore[reportArgumentType]
    with pytest.raises(IndexError, match=r"0\.\.1"):
        store.read(layers=[2])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_read_blocks_in_any_order(tmp_path: Path, codec: str, threads: int) -> None:
    x = random_activations(300, 3, 5)
    store = make_store(tmp_path / "a.zarr", x, codec=codec, chunk_tokens=16, shard_tokens=64)
    rng = np.random.default_rng(1)
    chunk, layer = rng.integers(0, store.meta.n_chunks, 40), rng.integers(0, 3, 40)
    out = np.full((40, 16, 5), 7, np.uint16)
    store.read_blocks(chunk, layer, out, threads)
    padded = np.zeros((store.meta.n_chunks * 16, 3, 5), np.uint16)
    padded[:300] = from_float32(x, "bfloat16")
    for i in range(40):
        assert np.array_equal(out[i], padded[chunk[i] * 16 : chunk[i] * 16 + 16, layer[i]])


@pytest.mark.parametrize(("stored_dtype", "codec"), ALL_FORMATS)
def test_statistics_are_of_the_stored_values_of_kept_tokens(tmp_path: Path, stored_dtype: str, codec: str) -> None:
    x = random_activations(300, 3, 12) + np.float32(20)
    keep = np.random.default_rng(2).random(300) < 0.6
    keep[64:128] = False  # A shard without a kept token.
    store = make_store(
        tmp_path / "a.zarr", x, keep=keep, stored_dtype=stored_dtype, codec=codec, chunk_tokens=16, shard_tokens=64
    )
    kept = rounded(x, stored_dtype)[keep].astype(np.float64)
    for found in (store.statistics(), store.merged_statistics()):
        assert found.count == keep.sum()
        np.testing.assert_allclose(found.mean, kept.mean(0), rtol=1e-13)
        np.testing.assert_allclose(found.var, kept.var(0), rtol=1e-12)
        np.testing.assert_allclose(found.norm, np.sqrt((kept**2).sum(-1)).mean(0), rtol=1e-13)


def test_variance_is_exact_where_squares_would_cancel(tmp_path: Path) -> None:
    x = np.full((200, 2, 3), 30000, np.float32)
    x[:, 1, 0] += np.arange(200) % 2
    found = make_store(tmp_path / "a.zarr", x, stored_dtype="float32", chunk_tokens=16, shard_tokens=32).statistics()
    assert (found.var[0] == 0).all()
    kept = np.arange(200) % 16 != 0
    np.testing.assert_allclose(found.var[1, 0], (np.arange(200) % 2)[kept].var(), rtol=1e-13)


def test_no_kept_token_gives_nan(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.zarr", random_activations(20, 2, 4), keep=np.zeros(20, bool))
    assert store.statistics().count == 0
    assert np.isnan(store.statistics().mean).all()


def test_a_store_that_lacks_shards(tmp_path: Path) -> None:
    path, x = tmp_path / "a.zarr", random_activations(60, 2, 4)
    with ActivationStore.create(path, make_meta(60, 2, 4, chunk_tokens=16, shard_tokens=32), token_table(60)) as store:
        store.write_shard(1, x[32:])
    with pytest.raises(IncompatibleError, match=r"1 of 2 shards.*harvest"):
        ActivationStore.open(path)
    store = ActivationStore.open(path, partial=True)
    assert np.array_equal(store.read(slice(32, 60)), rounded(x[32:], "bfloat16"))
    with pytest.raises(IncompatibleError, match=r"shard 0 \(tokens 0 to 31\) is missing"):
        store.read(slice(31, 40))
    with pytest.raises(UsageError, match="reading only"):
        store.write_shard(0, x[:32])


def test_says_what_it_holds(tmp_path: Path) -> None:
    make_store(tmp_path / "a.zarr", random_activations(2000, 2, 4), chunk_tokens=16, shard_tokens=512)
    found = repr(ActivationStore.open(tmp_path / "a.zarr"))
    path = str(tmp_path / "a.zarr")
    assert found == f"ActivationStore({path!r}: 2,000 tokens x 2 layers x 4, bfloat16)"


def test_pickles_as_its_path(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.zarr", random_activations(40, 2, 4))
    store.read()
    packed = pickle.dumps(store)
    assert len(packed) < 300
    assert np.array_equal(pickle.loads(packed).read(), store.read())


def test_content_hash_tells_data_apart(tmp_path: Path) -> None:
    x = random_activations(40, 2, 4)
    a = make_store(tmp_path / "a.zarr", x)
    b = make_store(tmp_path / "b.zarr", x)
    c = make_store(tmp_path / "c.zarr", x + 1)
    assert a.content_hash == b.content_hash != c.content_hash


@pytest.mark.parametrize("content", ["nothing", "folder", "file", "group"])
def test_what_is_no_store_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.zarr"
    if content == "file":
        path.write_text("x")
    elif content != "nothing":
        path.mkdir()
        if content == "group":
            (path / "zarr.json").write_text("{}")
    kind, message = (
        (UsageError, "such file or folder") if content == "nothing" else (IncompatibleError, "not an activation store")
    )
    with pytest.raises(kind, match=message):
        ActivationStore.open(path)


def test_token_columns_must_fit(tmp_path: Path) -> None:
    meta, tokens = make_meta(20, 2, 4), token_table(20)
    with pytest.raises(UsageError, match=r"position should have shape \(20,\)"):
        ActivationStore.create(tmp_path / "a.zarr", meta, tokens._replace(position=np.arange(19)))
    with pytest.raises(UsageError, match="token_id has values"):
        ActivationStore.create(tmp_path / "a.zarr", meta, tokens._replace(token_id=np.arange(20) + 2**31))
    for name, found in (("token_id", -1), ("position", -1), ("document", -1), ("document", 2**24)):
        column = np.array([found, *getattr(tokens, name)[1:]])
        with pytest.raises(UsageError, match=f"store: {name} should .*, found {found}"):
            ActivationStore.create(tmp_path / "a.zarr", meta, tokens._replace(**{name: column}))
    assert not list(tmp_path.iterdir())
