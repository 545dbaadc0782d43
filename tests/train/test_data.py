"""What reaches the trainer is what is in the store: each row once an epoch, layers numbered as they are trained."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from residscope.urls import as_path
from store.activations import ActivationStore
from store.dtypes import to_float32
from store.loader import Batch, WindowLoader
from store.remote.held import held_bytes
from tests.support.stores import make_store, random_activations
from train.config import TrainConfig
from train.data import TrainingData, Vectors, VectorSource, arriving, split_tokens
from train.parallel.ranks import ALONE, Ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("stored_dtype", ["bfloat16", "float16", "float32"])
def test_every_training_row_comes_once_as_it_is_stored(tmp_path: Path, stored_dtype: str) -> None:
    store = make_store(tmp_path / "s.zarr", random_activations(), stored_dtype=stored_dtype, chunk_tokens=32)
    mask = store.tokens.keep & (store.tokens.document % 2 == 0)
    source = VectorSource([0, 2], stored_dtype, CPU)
    loader = WindowLoader(store, mask, 50, seed=0, window_bytes=5000, layers=[0, 2])
    parts = list(map(source, loader))
    x, layer = (torch.cat(tensors) for tensors in list(zip(*parts, strict=True))[:2])
    assert x.dtype == torch.float32
    expected = store.read(layers=[0, 2])[mask]  # [t, 2, D]
    for position in range(2):
        ours = x[layer == position].numpy()
        theirs = expected[:, position]
        assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


class Counted(VectorSource):
    """Counts the batches that it was asked for."""

    taken = 0

    def __call__(self, batch: Batch) -> Vectors:
        self.taken += 1
        return super().__call__(batch)


def test_batches_that_are_gathered_ahead_are_the_same_in_the_same_order(small_store: Path) -> None:
    with ActivationStore.open(small_store) as store:
        before = threading.active_count()
        source, ahead = (Counted(range(3), "bfloat16", CPU) for _ in range(2))
        with (
            arriving(WindowLoader(store, store.tokens.keep, 50, 0), source, ahead=False) as here,
            arriving(WindowLoader(store, store.tokens.keep, 50, 0), ahead, ahead=True) as there,
        ):
            for number, (ours, its) in enumerate(zip(here, there, strict=True)):
                assert torch.equal(ours.x, its.x)
                assert torch.equal(ours.layer, its.layer)
                if number == 3:
                    break
        assert (source.taken, ahead.taken) == (4, 5)
        assert threading.active_count() == before
        whole = WindowLoader(store, store.tokens.keep, 50, 0)
        with arriving(whole, Counted(range(3), "bfloat16", CPU), ahead=True) as there:
            assert len(list(there)) == whole.n_batches


def test_an_interrupt_that_waits_for_no_thread_is_raised_as_it_is(
    small_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, begun = threading.Event(), threading.Event()

    class Interrupted(ThreadPoolExecutor):
        def __exit__(self, *_: object) -> None:
            raise KeyboardInterrupt

    with ActivationStore.open(small_store) as store:
        read = store.read_blocks
        monkeypatch.setattr(store, "read_blocks", lambda *given: (begun.set(), going.wait(), read(*given)))
        monkeypatch.setattr("train.data.ThreadPoolExecutor", Interrupted)
        loader, source = WindowLoader(store, store.tokens.keep, 50, 0), VectorSource(range(3), "bfloat16", CPU)
        with pytest.raises(KeyboardInterrupt), arriving(loader, source, ahead=True) as batches:  # noqa: PT012
            threading.Thread(target=next, args=(batches, None), daemon=True).start()
            begun.wait()
        going.set()


def test_a_fault_in_a_batch_that_is_gathered_ahead_is_raised(
    small_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ActivationStore.open(small_store) as store:
        loader = WindowLoader(store, store.tokens.keep, 50, 0)

        def broken(*_: object) -> None:
            raise OSError("the disk is gone")

        monkeypatch.setattr(store, "read_blocks", broken)
        with (
            pytest.raises(OSError, match="the disk is gone"),
            arriving(loader, Counted(range(3), "bfloat16", CPU), ahead=True) as batches,
        ):
            next(batches)


def test_bfloat16_bits_become_the_same_numbers_as_the_store_reads() -> None:
    bits = np.array([[0x3F80, 0xC000, 0x0001, 0x7F7F]], dtype=np.uint16)  # 1, -2, the smallest, the largest
    vectors = VectorSource([4], "bfloat16", CPU)(Batch(bits, np.array([4]), np.array([0]), np.bincount([4])))
    assert vectors.x[0, :2].tolist() == [1.0, -2.0]
    assert np.array_equal(vectors.x.numpy(), to_float32(bits, "bfloat16"))
    assert vectors.layer.tolist() == [0]


def test_no_document_is_on_both_sides(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", random_activations(n_tokens=160))
    split = split_tokens(store, 0.3, seed=1)
    document = store.tokens.document
    assert split.n_documents == 10
    assert len(set(document[split.validation])) == 3
    assert not set(document[split.train]) & set(document[split.validation])
    assert np.array_equal(split.train | split.validation, store.tokens.keep)
    assert not np.array_equal(split.train, split_tokens(store, 0.3, seed=2).train)


def test_of_a_store_at_a_url_a_third_of_the_free_memory_is_kept(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(s3, random_activations(200, 2, 16), chunk_tokens=16, shard_tokens=32)
    store = ActivationStore.open(s3)
    sizes = [store.record(shard).bytes for shard in range(store.meta.n_shards)]
    monkeypatch.setattr("train.data.free_memory", lambda: 2 * 3 * sum(sizes[:4]))
    for ranks, flag, kept in ((Ranks(0, 2, local=2), None, 4), (ALONE, None, 7), (ALONE, 0.0, 0)):
        TrainingData.open(TrainConfig(store=as_path(s3), cache_gb=flag), store, ranks)
        assert held_bytes(store) == sum(sizes[:kept])
