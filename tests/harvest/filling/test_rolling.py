"""Stores that take no more of the disk than they may."""

import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from harvest import run
from harvest.filling import rolling
from harvest.filling.rolling import Rolling, cut, parts_to_fill
from harvest.sequences import SequenceBatch, batches_for
from residscope.errors import Interrupted, UsageError
from store.activations import ActivationStore
from store.care.ring import Readers, Ring
from store.shuffle import validation_documents
from tests.support.harvesting import MakeConfig
from tests.support.stores import make_meta, token_table

SIZE = 120_000


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, and shards of 32 tokens, smaller than a batch."""
    monkeypatch.setattr(rolling, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr("harvest.settings.chunk_and_shard_tokens", lambda *sizes: (32, 32))


def test_a_store_never_takes_more_than_it_may(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a trainer that uses a part between two looks, in a store whose vectors alone are 113 kB."""
    run.harvest(config(rolling="1GB"))
    whole = ActivationStore.open(config().out, follow=True)
    hashes = [whole.record(shard).xxh3_128 for shard in range(19)]
    sizes, write = list[int](), ActivationStore.write_shard

    def watched(store: ActivationStore, *arguments: object, **options: object) -> None:
        write(store, *arguments, **options)  # type: ignore[arg-type]
        sizes.append(disk_bytes(store.path))

    monkeypatch.setattr(ActivationStore, "write_shard", watched)
    looks = iter(range(-1, 99))
    monkeypatch.setattr(Readers, "used", lambda _: {"a.pt": next(looks)})
    run.harvest(config(rolling="120kB", overwrite=True))
    store = ActivationStore.open(config().out, follow=True)
    assert store.ring is not None
    assert SIZE // 2 < max(sizes) <= SIZE
    assert [store.record(shard).xxh3_128 for shard in range(19)] == hashes
    assert Readers(store.path, store.ring).removed() == len(store.ring.parts(19)) - 2 > 1


def test_held_out_documents_stay(config: MakeConfig) -> None:
    run.harvest(config(rolling="1GB"))
    store = ActivationStore.open(config().out)
    assert store.ring is not None
    document = store.tokens.document
    held_out = validation_documents(4, store.ring.fraction, store.ring.seed)[document]
    assert 0 < held_out.sum() < len(held_out)
    assert np.flatnonzero(held_out)[-1] + 1 == held_out.sum() <= store.ring.kept_shards * 32


def test_it_waits_for_every_trainer_and_ends_when_it_is_stopped(tmp_path: Path) -> None:
    ring = Ring(kept_shards=1, part_shards=2, fraction=0.2, seed=0)
    sizes = {"chunk_tokens": 16, "shard_tokens": 32, "provenance": {"ring": ring._asdict()}}
    with ActivationStore.create(tmp_path / "a.zarr", make_meta(9 * 32, 3, 12, **sizes), token_table(9 * 32)) as store:
        readers, looks = Readers(store.path, ring), iter([False, False, True])
        readers.publish("/a.pt", 2)
        readers.publish("/b.pt", 0)
        filled = list(parts_to_fill(store, lambda: next(looks)))
        assert [sorted(shards) for shards in filled] == [part.tolist() for part in ring.parts(9)[:2]]
        assert readers.removed() == 0
        readers.publish("/b.pt", 1)
        assert len(list(parts_to_fill(store, lambda: True))) == 3
        assert readers.removed() == 1


def test_a_trainer_that_stays_behind_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ring = Ring(kept_shards=1, part_shards=2, fraction=0.2, seed=0)
    sizes = {"chunk_tokens": 16, "shard_tokens": 32, "provenance": {"ring": ring._asdict()}}
    monkeypatch.setattr(rolling.time, "sleep", lambda _: None)
    monkeypatch.setattr(rolling, "_POLL_SECONDS", 0.5)
    with ActivationStore.create(tmp_path / "a.zarr", make_meta(9 * 32, 3, 12, **sizes), token_table(9 * 32)) as store:
        readers, looks = Readers(store.path, ring), itertools.count()
        readers.publish("/a.pt", 2)
        readers.publish("/b.pt", 0)
        list(parts_to_fill(store, lambda: next(looks) > 10_000))
        said = [line for line in capsys.readouterr().err.splitlines() if "still" in line]
        way_out = f"if it has ended and will not continue, remove {readers.file('/b.pt')}"
        assert said == [f"still waiting for /b.pt after 10 min 00 s; {way_out}"]


def test_a_harvest_without_a_trainer_stops_when_it_is_told_to(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Readers, "used", lambda _: {})

    def sleep(_: float) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(rolling.time, "sleep", sleep)
    with pytest.raises(Interrupted, match="stopped with 9 of 19 shards complete"):
        run.harvest(config(rolling="120kB"))


REST = {"fraction": 0.01, "seed": 0, "token_bytes": 1000, "n_layers": 2}


@pytest.mark.parametrize(
    ("batch", "shard", "run", "times"),
    # The last two: fewer than 16 batches in the size, and of the smallest number of tokens of whole batches and chunks.
    [(64, 256, 1, 1.0), (960, 192, 5, 1.0), (6400, 288, 1, 20.0), (1300, 288, 1, 6.0)],
)
def test_parts_hold_whole_batches(
    batch: int, shard: int, run: int, times: float, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = validation_documents(1000, 0.01, 0)
    tokens = token_table(100_000, document=np.repeat(np.argsort(~held_out, kind="stable"), 100))
    rolling = Rolling(20_000_000, batch=batch, **REST)
    found, ring = cut(100_000, rolling.aside(tokens), rolling, 32, 4096)
    assert (found, ring.run_shards) == (shard, run)  # of 64 shards in all
    n_shards = -(-100_000 // shard)
    parts = len(ring.parts(n_shards))
    least = 13 * 100_000 + parts * 8000 + (ring.kept_shards + 2 * ring.part_shards) * shard * 1000
    assert 18_000_000 - 2 * run * shard * 1000 < least < 20_000_000
    batches = [SequenceBatch(at, min(at + batch, 100_000), 32) for at in range(0, 100_000, batch)]
    passes = sum(len(batches_for(batches, part.tolist(), shard)) for part in ring.parts(n_shards))
    assert 1 <= passes / len(batches) <= times
    slow = f"warning: --rolling 20 MB is small for forward passes of {batch:,} tokens: each runs up to"
    slow += f" {-(-batch // shard)} times, which is slow; --rolling {'102' if batch == 6400 else '166'} MB, or a"
    assert (slow in capsys.readouterr().err) == (times > 1)


@pytest.mark.parametrize(
    ("n_tokens", "size", "words"),
    [
        (
            100_000,
            2_000_000,
            r"--rolling 2 MB: this store needs at least \S+ MB: \S+ MB for token columns, the manifest",
        ),
        (20, 10_000_000, r"nothing is left to train on \(1 shard in all\)"),
    ],
)
def test_sizes_that_hold_too_little_are_refused(n_tokens: int, size: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cut(n_tokens, n_tokens // 100 + 1, Rolling(size, batch=64, **REST), 32, 4096)


def test_a_text_that_cannot_be_split_is_warned_of(capsys: pytest.CaptureFixture) -> None:
    rolling = Rolling(20_000_000, batch=64, **REST)
    aside = rolling.aside(token_table(100_000, document=np.zeros(100_000, np.int64)))
    assert cut(100_000, aside, rolling, 32, 4096)[1].kept_shards == 0
    assert "warning: with one document, none is held out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"rolling": "50"}, "--rolling should be a size such as 50GB, found '50'"),
        ({"rolling": "0GB"}, "--rolling should be a size such as 50GB, found '0GB'"),
        ({"rolling": "9" * 400 + "GB"}, "--rolling should be a size such as 50GB"),
        ({"rolling": "1GB", "n_workers": 2}, "leave --n-workers"),
        ({"rolling": "1GB", "pack": False}, "--no-pack"),
    ],
)
def test_senseless_flags_are_refused(flags: dict, words: str, config: MakeConfig) -> None:
    with pytest.raises(UsageError, match=words):
        config(**flags)
