import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residscope.errors import ResidscopeError, UsageError
from store.activations import ActivationStore
from store.loader import Batch, WindowLoader
from tests.support.stores import make_store, random_activations

BLOCK_BYTES = 8 * 13 * 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """150 tokens, 3 layers, d_model 13 (rows of 26 bytes), in chunks of 8 and shards of 24."""
    path = tmp_path_factory.mktemp("loader") / "a.zarr"
    return make_store(path, random_activations(150, 3, 13), chunk_tokens=8, shard_tokens=24)


@pytest.fixture(scope="module")
def raw(store: ActivationStore) -> np.ndarray:
    return store.read(raw=True)


def joined(batches: list[Batch]) -> Batch:
    parts = [np.concatenate(parts) for parts in list(zip(*batches, strict=True))[:3]]
    return Batch(*parts, sum(batch.of_layer for batch in batches))  # type: ignore[arg-type]


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


@given(
    batch_size=st.integers(1, 500),
    window=st.integers(1, 80),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
    mask_seed=st.integers(0, 5),
    layers=st.sampled_from([None, (1,), (2, 0)]),
    world_size=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_every_row_comes_once_in_each_epoch(
    store: ActivationStore,
    raw: np.ndarray,
    batch_size: int,
    window: int,
    epochs: int,
    seed: int,
    mask_seed: int,
    layers: tuple[int, ...] | None,
    world_size: int,
) -> None:
    mask = np.random.default_rng(mask_seed).random(150) < 0.5
    mask[40:100] &= mask_seed > 2  # Some chunks have no rows.
    expected = sorted((t, layer) for t in np.flatnonzero(mask).tolist() for layer in layers or range(3))
    parts: list[list[Batch]] = []  # by rank
    for rank in range(world_size):
        loader = WindowLoader(
            store,
            mask,
            batch_size,
            seed,
            window * BLOCK_BYTES,
            layers=layers,
            epochs=epochs,
            rank=rank,
            world_size=world_size,
            threads=2,
        )
        parts.append(list(loader))
        assert len(parts[-1]) == loader.n_batches
    batches = [joined(list(ranks)) for ranks in zip(*parts, strict=True)]
    whole = list(WindowLoader(store, mask, batch_size, seed, window * BLOCK_BYTES, layers=layers, epochs=epochs))
    for found, one in zip(batches, whole, strict=True):  # of one rank or of several: the same batches
        assert sorted(zip(found.token, found.layer, strict=True)) == sorted(zip(one.token, one.layer, strict=True))
        assert np.array_equal(found.of_layer, world_size * np.bincount(one.layer, minlength=3))
    assert [len(b.rows) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    all_rows = joined(whole)
    assert len(all_rows.rows) == len(expected) * epochs
    for each in (*batches, all_rows):
        assert np.array_equal(each.rows, raw[each.token, each.layer])
    for part in np.split(np.stack([all_rows.token, all_rows.layer], 1), epochs):
        assert sorted(map(tuple, part.tolist())) == expected


@given(start=st.integers(0, 40), window=st.sampled_from([1, 7, 1000]), threads=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_resumed_at_any_batch_with_any_number_of_threads(
    store: ActivationStore, start: int, window: int, threads: int
) -> None:
    def batches(**options) -> list[Batch]:  # type: ignore[no-untyped-def]
        return list(WindowLoader(store, store.tokens.keep, 23, 1, window * BLOCK_BYTES, epochs=2, **options))

    assert equal(batches(start_batch=start, threads=threads), batches(threads=1)[start:])


def test_batches_are_mixed(store: ActivationStore) -> None:
    """In one window of the whole store, a batch has about as many rows of each layer, from all over the store."""
    (batch, *_) = WindowLoader(store, np.ones(150, bool), 150, 0, 10**9)
    assert np.bincount(batch.layer, minlength=3).min() > 30
    assert len(np.unique(batch.token // 8)) == 19
    assert not np.array_equal(np.sort(batch.token), batch.token)


def test_batches_belong_to_the_caller(store: ActivationStore) -> None:
    loader = iter(WindowLoader(store, store.tokens.keep, 50, 0, 3 * BLOCK_BYTES))
    first = next(loader)
    copy = Batch(*(part.copy() for part in first))
    first.rows.flags.writeable = True
    list(loader)
    assert equal([first], [copy])


def test_memory_is_two_windows_and_no_more_than_the_store(store: ActivationStore) -> None:
    mask = np.ones(150, bool)
    assert WindowLoader(store, mask, 10, 0, 7 * BLOCK_BYTES + 5).buffer_shape == (7, 8, 13)
    assert WindowLoader(store, mask, 10, 0, 10**12).buffer_shape == (19 * 3, 8, 13)


def test_a_loader_can_be_left_early(store: ActivationStore) -> None:
    loader = WindowLoader(store, store.tokens.keep, 10, 0, 2 * BLOCK_BYTES)
    assert [len(batch.rows) for batch in itertools.islice(loader, 3)] == [10] * 3
    (fourth, *_) = WindowLoader(store, store.tokens.keep, 10, 0, 2 * BLOCK_BYTES, start_batch=3)
    assert equal([next(iter(loader))], [fourth])


def test_damage_stops_the_loader(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.zarr", random_activations(150, 3, 13), chunk_tokens=8, shard_tokens=24)
    file = tmp_path / "a.zarr/resid_post/c.3.0.0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ResidscopeError, match=r"c\.3\.0\.0: the checksum of token chunk 0 at stored layer 0"):
        list(WindowLoader(store, store.tokens.keep, 10, 0, 5 * BLOCK_BYTES))


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"threads": 0}, {"epochs": 0}, {"start_batch": -1}, {"seed": -1}]
)
def test_senseless_options_are_refused(store: ActivationStore, options: dict) -> None:
    with pytest.raises(UsageError):
        WindowLoader(store, **({"row_mask": store.tokens.keep, "batch_size": 5, "seed": 0} | options))


def test_masks_must_fit_and_keep_something(store: ActivationStore) -> None:
    with pytest.raises(UsageError, match=r"\(150,\)"):
        WindowLoader(store, np.ones(10, bool), 5, 0)
    with pytest.raises(UsageError, match="no rows"):
        WindowLoader(store, np.zeros(150, bool), 5, 0)
