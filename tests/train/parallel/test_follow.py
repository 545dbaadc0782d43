"""Training beside a harvest: the same bits as from the whole store, each row once, and nothing used too early."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from harvest.filling.rolling import parts_to_fill
from residscope.errors import IncompatibleError, Interrupted, UsageError
from store.activations import ActivationStore
from store.care.ring import Readers, Ring
from store.loader import WindowLoader
from store.shards import shard_name
from store.shuffle import validation_documents
from tests.support.stores import make_meta, random_activations, token_table
from tests.support.training import StopAt, train_config
from train.checkpoint import load_checkpoint
from train.run import train

RING = Ring(kept_shards=2, part_shards=3, fraction=0.1, seed=0)
N_SHARDS, SHARD = 15, 32
FLAGS = {"n_latents": 24, "k": 4, "batch_size": 40, "window_gb": 1e-5, "threads": 1, "dtype": "float32"}


def begin(path: Path) -> ActivationStore:
    """A store with its token table, open for writing."""
    sizes = {"chunk_tokens": 16, "shard_tokens": SHARD, "provenance": {"ring": RING._asdict()}}
    n_tokens = N_SHARDS * SHARD
    held_out = validation_documents(n_tokens // 16, RING.fraction, RING.seed)
    document = np.repeat(np.argsort(~held_out, kind="stable"), 16)  # held-out ones first
    return ActivationStore.create(path, make_meta(n_tokens, 3, 12, **sizes), token_table(n_tokens, document=document))


def write(store: ActivationStore, shards: list[int]) -> None:
    activations = random_activations(n_tokens=N_SHARDS * SHARD)
    for shard in shards:
        store.write_shard(shard, activations[slice(*store.meta.shard_bounds(shard))])


@contextmanager
def harvest_beside(path: Path) -> Iterator[None]:
    """Fill the store at `path` part by part, in a thread."""
    done = threading.Event()

    def fill() -> None:
        with ActivationStore.open(path, writable=True) as store:
            for shards in parts_to_fill(store, done.is_set):
                there = [i for i in range(N_SHARDS) if (path / shard_name(i)).exists()]
                assert len(there) <= RING.kept_shards + RING.part_shards
                write(store, shards)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights from the store with all its shards there beforehand."""
    folder = tmp_path_factory.mktemp("whole")
    with begin(folder / "a.zarr") as store:
        write(store, list(range(N_SHARDS)))
    train(train_config(store=folder / "a.zarr", out=folder / "a.pt", **FLAGS))
    return load_checkpoint(folder / "a.pt").sae.state_dict()


def test_the_same_bits_as_from_the_whole_store(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.zarr"
    begin(path).close()
    with harvest_beside(path):
        train(train_config(store=path, out=tmp_path / "a.pt", **FLAGS))
    found = load_checkpoint(tmp_path / "a.pt").sae.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    parts = RING.parts(N_SHARDS)
    readers = Readers(path, RING)
    assert readers.removed() == len(parts) - 2
    assert list(readers.used().values()) == [len(parts)]
    lines = [json.loads(line) for line in (tmp_path / "a.metrics.jsonl").read_text().splitlines()]
    effects = [line["design_effect"] for line in lines if "split" not in line]
    assert effects[-1] == pytest.approx(1, abs=0.5)  # independent vectors


def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bits(
    tmp_path: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tmp_path / "a.zarr", {"store": tmp_path / "a.zarr", "out": tmp_path / "a.pt", **FLAGS}
    begin(path).close()
    for stop in (2, 9, 20):  # It is asked after each step, and as often as it waits: so it ends then, or before.
        with monkeypatch.context() as patch, harvest_beside(path):
            patch.setattr("train.run.stop_on_signals", lambda stop=stop: StopAt(stop))
            with pytest.raises(Interrupted):
                train(train_config(**config, resume=True))
    with harvest_beside(path):
        train(train_config(**config, resume=True))
    found = load_checkpoint(tmp_path / "a.pt").sae.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_rows_come_once_part_by_part(tmp_path: Path) -> None:
    with begin(tmp_path / "a.zarr") as store:
        write(store, list(range(N_SHARDS)))
    store = ActivationStore.open(tmp_path / "a.zarr", follow=True)
    part_of, asked = RING.part_of(N_SHARDS), list[int]()
    ready = lambda part: asked.append(part) or True  # noqa: E731
    loader = WindowLoader(store, store.tokens.keep, 50, 0, 10_000, shard_part=part_of, ready=ready)
    rows = [(int(t), int(layer)) for batch in loader for t, layer in zip(batch.token, batch.layer, strict=True)]
    assert len(rows) == len(set(rows)) == store.tokens.keep.sum() * 3
    parts = part_of[np.array(rows)[:, 0] // SHARD]
    assert (np.diff(parts) >= 0).all()
    assert np.cumsum(np.bincount(parts)).tolist() == loader.part_ends.tolist()
    assert asked == list(range(len(RING.parts(N_SHARDS))))


def test_a_sweep_is_known_by_what_it_makes(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    begin(path).close()
    with harvest_beside(path):
        train(train_config(store=path, out=tmp_path / "a.pt", steps=3, sweep=("k=2",), **FLAGS))
    assert list(Readers(path, RING).used()) == [str(tmp_path / "a.*.pt")]
    assert [made.name for made in tmp_path.glob("a.*.pt")] == ["a.k=2.pt"]


def test_a_run_that_is_shorter_than_the_store_lets_the_harvest_end(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    begin(path).close()
    with harvest_beside(path):
        train(train_config(store=path, out=tmp_path / "a.pt", steps=3, **FLAGS))
    assert list(Readers(path, RING).used().values()) == [len(RING.parts(N_SHARDS))]


def test_a_finished_training_lets_a_store_that_is_made_anew_end(tmp_path: Path) -> None:
    """As where the first lay in memory, or where the last word to the harvest was lost in a crash."""
    for name in ("a.zarr", "b.zarr"):
        begin(path := tmp_path / name).close()
        with harvest_beside(path):
            train(train_config(store=path, out=tmp_path / "a.pt", resume=True, follow=True, **FLAGS))
        assert list(Readers(path, RING).used().values()) == [len(RING.parts(N_SHARDS))]


def test_what_is_no_store_is_waited_for_with_a_word_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "a.txt"
    file.touch()
    with pytest.raises(UsageError, match=r"--store .*a\.txt: should be the folder of a store, found a file"):
        train(train_config(store=file, out=tmp_path / "a.pt", follow=True, **FLAGS))

    def come(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.parallel.follow.time.sleep", come)
    with pytest.raises(KeyboardInterrupt):
        train(train_config(store=tmp_path / "a.zarr", out=tmp_path / "a.pt", follow=True, **FLAGS))
    assert "waiting for a harvest to begin " in capsys.readouterr().err


def test_who_comes_too_late_replaces_nothing(tmp_path: Path) -> None:
    path, config = tmp_path / "a.zarr", {"store": tmp_path / "a.zarr", "out": tmp_path / "a.pt", **FLAGS}
    begin(path).close()
    with harvest_beside(path):
        train(train_config(**config))
    before = {file.name: file.read_bytes() for file in tmp_path.glob("a.*") if file.is_file()}
    used = Readers(path, RING).used()
    with pytest.raises(IncompatibleError, match="needs part 1, but"):
        train(train_config(**config, overwrite=True))
    assert {file.name: file.read_bytes() for file in tmp_path.glob("a.*") if file.is_file()} == before
    assert Readers(path, RING).used() == used


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"epochs": 2}, "each token is trained on once"),
        ({"batch_size": 400}, "--batch-size 400 is more than a part of"),
    ],
)
def test_what_parts_cannot_give_is_refused(flags: dict, words: str, tmp_path: Path) -> None:
    with begin(tmp_path / "a.zarr") as store:
        write(store, list(range(N_SHARDS)))
    with pytest.raises(UsageError, match=words):
        train(train_config(store=tmp_path / "a.zarr", out=tmp_path / "a.pt", **{**FLAGS, **flags}))
