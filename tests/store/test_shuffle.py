from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residscope.errors import UsageError
from store import shuffle
from store.shuffle import RowOrder, chunk_row_counts, permutation, spread_order, validation_documents


def row_order(**changes) -> RowOrder:  # type: ignore[no-untyped-def]
    defaults = {"chunk_rows": (4, 0, 3, 4, 1, 4, 2, 4), "layers": (0, 1, 2), "blocks_per_window": 5, "seed": 7}
    options: dict[str, Any] = defaults | changes
    options["chunk_rows"] = np.array(options["chunk_rows"])
    return RowOrder(**options)


def all_blocks(order: RowOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    return order.epoch(epoch).blocks(0, order.n_blocks)


@given(st.integers(1, 30), st.integers(0, 3), st.integers(0, 2**64 - 1))
@settings(max_examples=50)
def test_every_block_with_rows_comes_once_in_an_epoch(window: int, epoch: int, seed: int) -> None:
    one = row_order(blocks_per_window=window, seed=seed)
    blocks = one.epoch(epoch)
    chunks, layers = all_blocks(one, epoch)
    seen = zip(chunks.tolist(), layers.tolist(), strict=True)
    assert sorted(seen) == [(c, layer) for c in (0, 2, 3, 4, 5, 6, 7) for layer in (0, 1, 2)]
    assert one.n_blocks == len(chunks)
    assert len(blocks.row_ends) == -(-one.n_blocks // window)
    assert blocks.row_ends[-1] == one.row_ends[-1] == 22 * 3
    parts = [blocks.window(i) for i in range(len(blocks.row_ends))]
    assert np.array_equal(np.concatenate([chunk for chunk, _ in parts]), chunks)


def test_windows_hold_all_layers_evenly() -> None:
    one = row_order(chunk_rows=(1,) * 100, layers=(0, 1, 2, 3), blocks_per_window=10)
    blocks = one.epoch(0)
    assert len(set(np.bincount(all_blocks(one, 0)[1]).tolist())) == 1
    for i in range(len(blocks.row_ends)):
        _, layer = blocks.window(i)
        assert np.bincount(layer, minlength=4).max() <= -(-len(layer) // 4) + 1


@given(st.integers(0, 300), st.integers(0, 1000), st.data())
def test_every_run_of_a_spread_order_comes_from_everywhere(n: int, seed: int, data: st.DataObject) -> None:
    order = spread_order(n, seed, 1)
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, spread_order(n, seed, 1))
    start = data.draw(st.integers(0, n))
    run = order[start : start + data.draw(st.integers(0, n))]
    for parts in (2, 4, 8):  # A random order is off by about the root of the run's length instead.
        whole = 1 << max(n - 1, 0).bit_length()
        sizes = np.bincount(np.arange(n) * parts // whole, minlength=parts)
        found = np.bincount(run * parts // whole, minlength=parts)
        assert np.abs(found - len(run) * sizes / max(n, 1)).max() < 2 * np.log2(whole) + 2


def test_spread_orders_put_every_number_everywhere() -> None:
    counts = np.zeros((8, 8), int)
    for seed in range(400):
        counts[spread_order(8, seed), np.arange(8)] += 1
    assert counts.min() > 20  # 50 on average
    assert counts.max() < 90


def test_windows_hold_every_chunk_at_about_as_many_layers() -> None:
    one = row_order(chunk_rows=(1,) * 48, layers=tuple(range(12)), blocks_per_window=144)
    blocks = one.epoch(0)
    for i in range(len(blocks.row_ends)):
        chunk, _ = blocks.window(i)
        times = np.bincount(chunk, minlength=48)
        assert set(times.tolist()) <= {2, 3, 4}  # a quarter of all blocks
        quarters = times.reshape(4, 12).sum(axis=1)
        assert abs(quarters - len(chunk) / 4).max() <= 12


def test_orders_differ_by_epoch_seed_layer_and_window() -> None:
    one = row_order(chunk_rows=(1,) * 40)
    chunk, layer = all_blocks(one, 0)
    assert np.array_equal(chunk, all_blocks(row_order(chunk_rows=(1,) * 40), 0)[0])
    assert not np.array_equal(chunk, all_blocks(one, 1)[0])
    assert not np.array_equal(chunk, all_blocks(row_order(chunk_rows=(1,) * 40, seed=8), 0)[0])
    assert not np.array_equal(chunk[layer == 0], chunk[layer == 1])
    rows = np.arange(100)
    orders = [one.shuffled(rows, epoch, window) for epoch, window in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == rows.tolist() for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("piece", [1, 4, 7])
def test_blocks_are_the_same_however_they_are_asked_for(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = row_order()
    chunk, layer = all_blocks(one, 1)
    ends = np.cumsum(one.chunk_rows[chunk])[[4, 9, 14, 19, 20]]
    monkeypatch.setattr(shuffle, "_PIECE", piece)
    blocks = one.epoch(1)
    assert np.array_equal(blocks.row_ends, ends)
    for start in range(len(chunk)):
        found = blocks.blocks(start, start + piece)
        assert np.array_equal(found, (chunk[start : start + piece], layer[start : start + piece]))


@given(st.integers(0, 131))
def test_locate_is_where_the_row_is(row: int) -> None:
    one = row_order()
    found = one.locate(row)
    assert found.epoch == row // 66
    ends = [0, *one.epoch(found.epoch).row_ends.tolist()]
    assert ends[found.window] + found.row == row % 66
    assert ends[found.window] <= row % 66 < ends[found.window + 1]


def test_parts_are_served_one_after_another() -> None:
    part = np.array([1, 0, 0, 2, 1, 1, 2, 0])
    one = row_order(part=part, blocks_per_window=2)
    assert one.n_parts == 3
    assert one.row_ends.tolist() == [3 * 7, 3 * 16, 3 * 22]
    for epoch in range(6):
        chunk, layer = one.epoch(epoch).blocks(0, 10**6)
        expected = [(c, at) for c in np.flatnonzero(part == epoch % 3).tolist() if c != 1 for at in range(3)]
        assert sorted(zip(chunk.tolist(), layer.tolist(), strict=True)) == expected
    found = one.locate(66 + 48)
    assert (found.epoch, found.window, found.row) == (5, 0, 0)
    assert one.locate(66 + 47).epoch == 4


def test_chunk_row_counts() -> None:
    assert chunk_row_counts(np.array([1, 1, 0, 0, 0, 0, 1], bool), 3).tolist() == [2, 0, 1]


@pytest.mark.parametrize("changes", [{"seed": -1}, {"layers": ()}, {"layers": (1, 1)}])
def test_senseless_orders_are_refused(changes: dict) -> None:
    with pytest.raises(UsageError):
        row_order(**changes)


@given(st.integers(0, 200), st.floats(0, 1), st.integers(0, 1000))
def test_validation_documents_are_that_fraction(n: int, fraction: float, seed: int) -> None:
    held_out = validation_documents(n, fraction, seed)
    assert np.array_equal(held_out, validation_documents(n, fraction, seed))
    assert held_out.shape == (n,)
    assert abs(held_out.sum() - fraction * n) <= 1
    if n >= 2 and 0 < fraction < 1:
        assert 0 < held_out.sum() < n


def test_validation_documents_never_change() -> None:
    """Checkpoints rely on it: the split is rebuilt from three numbers."""
    assert np.flatnonzero(validation_documents(20, 0.2, 0)).tolist() == [0, 5, 15, 17]
    assert not np.array_equal(validation_documents(20, 0.2, 0), validation_documents(20, 0.2, 1))
    assert sorted(permutation(50, 3, 1)) == list(range(50))


def test_a_window_beyond_all_integers_is_the_whole_epoch() -> None:
    whole, beyond = (row_order(blocks_per_window=size).epoch(0) for size in (10**6, 10**20))
    assert whole.row_ends.tolist() == beyond.row_ends.tolist()
    assert len(beyond.row_ends) == 1
