"""Stores of which a part at a time is on the disk."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from residscope.cli import main
from residscope.commands.info import facts, in_words
from residscope.errors import IncompatibleError, ResidscopeError
from store.activations import ActivationStore
from store.arrays import moments_name
from store.care.repair import repair
from store.care.ring import Readers, Ring, design_effect
from store.care.verify import verify
from store.checksums import DamagedError
from store.manifest import FILE, shard_of
from store.moments import ShardMoments
from store.shards import shard_name
from tests.support.stores import make_meta, make_store, random_activations, token_table

RING = Ring(kept_shards=1, part_shards=2, fraction=0.2, seed=0)


def ring_store(path: Path) -> ActivationStore:
    """A whole one, of 7 shards: the one that stays, and three parts of two."""
    activations = random_activations(n_tokens=7 * 32)
    sizes = {"chunk_tokens": 16, "shard_tokens": 32, "provenance": {"ring": RING._asdict()}}
    return make_store(path, activations, **sizes)


@given(st.integers(1, 60), st.integers(0, 10), st.integers(1, 20), st.integers(0, 99), st.integers(1, 4))
def test_parts_hold_each_shard_once(n_shards: int, kept: int, runs: int, seed: int, run: int) -> None:
    kept, size = min(kept, n_shards - 1), runs * run
    ring = Ring(kept, size, 0.1, seed, run)
    parts = ring.parts(n_shards)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n_shards))
    assert parts[0][:kept].tolist() == list(range(kept))
    short = -(n_shards - kept) % run  # of the last run, wherever it is
    assert sum(size - len(part) for part in parts[1:-1]) in (0, short)
    runs_of = [{(shard - kept) // run for shard in part.tolist() if shard >= kept} for part in parts]
    assert sum(map(len, runs_of)) == len(set.union(*runs_of))
    of = ring.part_of(n_shards)
    assert all((of[part] == number).all() for number, part in enumerate(parts))


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_the_design_effect_is_what_batches_show(spread: float) -> None:
    """Of rows at 2 layers and 5 dimensions; each part's mean is off by some standard deviations."""
    rng, rows = np.random.default_rng(0), 50
    parts = [rng.normal(size=(400, 2, 5)) + spread * rng.normal(size=(2, 5)) for _ in range(200)]
    moments = [ShardMoments(400, x.mean(axis=0), ((x - x.mean(axis=0)) ** 2).sum(axis=0), np.zeros(2)) for x in parts]
    means = np.concatenate([x.reshape(-1, rows, 2, 5).mean(axis=1) for x in parts])
    shown = (means.var(axis=0, ddof=1) * rows / np.concatenate(parts).var(axis=0)).mean()
    assert design_effect(moments, rows) == pytest.approx(shown, rel=0.05)
    assert design_effect(moments, rows) == pytest.approx(1 + rows * spread**2 / (1 + spread**2), rel=0.1)


def test_only_what_stays_is_served_unless_it_is_followed(tmp_path: Path) -> None:
    ring_store(tmp_path / "a.zarr")
    keep = ActivationStore.open(tmp_path / "a.zarr").tokens.keep
    assert keep[:32].sum() == 30
    assert not keep[32:].any()
    assert ActivationStore.open(tmp_path / "a.zarr", follow=True).tokens.keep.sum() == 7 * 30


def test_removed_shards_are_no_damage_and_content_stays_the_same(tmp_path: Path) -> None:
    store = ring_store(tmp_path / "a.zarr")
    before, statistics = store.content_hash, store.statistics()
    readers = Readers(store.path, RING)
    for _ in range(2):  # as after a crash
        readers.announce(2)
        readers.remove(2, 7, store.moments)
    gone = {shard for part in RING.parts(7)[:2] for shard in part.tolist()} - {0}
    for name in (shard_name, moments_name):
        assert {i for i in range(7) if not (store.path / name(i)).exists()} == gone
    assert verify(store.path) == []
    found = facts(store.path)
    assert found["removed_shards"] == sorted(gone)
    assert found["bytes"] == sum(path.stat().st_size for path in store.path.glob("resid_post/c.*"))
    assert f"rolling: {len(gone)} shards removed" in in_words(found)["state"]
    again = ActivationStore.open(store.path)
    assert again.content_hash == before
    assert again.statistics().mean.tobytes() == statistics.mean.tobytes()
    assert again.merged_statistics().norm.tobytes() == store.merged_statistics().norm.tobytes()
    kept, whole = store.path / "manifest/moments/1", (store.path / "manifest/moments/1").read_bytes()
    kept.write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
    with pytest.raises(DamagedError, match="moments/1: its checksum does not match"):
        again.merged_statistics()
    kept.write_bytes(whole)
    (store.path / shard_name(0)).unlink()
    assert [bad.index for bad in verify(store.path)] == [0]


def test_what_is_still_to_come_is_no_damage_and_not_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts: shard 0 and two, two, two. The second has begun, and lacks a shard; of the first one is damaged."""
    meta = make_meta(7 * 32, 3, 12, chunk_tokens=16, shard_tokens=32, provenance={"ring": RING._asdict()})
    first, second, third = (part.tolist() for part in RING.parts(7))
    with ActivationStore.create(tmp_path / "a.zarr", meta, token_table(7 * 32)) as store:
        for shard in (*first, second[0]):
            store.write_shard(shard, random_activations(n_tokens=32))
    assert RING.to_come(7, [*first, second[0]]) == {second[1], *third}
    assert RING.to_come(7, [second[0]]) == {second[1], *third}
    to_come = "3 shards still to come: the harvest has not ended"
    assert [bad.reason for bad in verify(store.path)] == [to_come]
    assert main(["verify", str(store.path)]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [to_come, f"{store.path}: not whole yet"]
    assert "--repair" not in said.err
    (store.path / shard_name(first[1])).unlink()
    assert [bad.index for bad in verify(store.path)] == [first[1], None]
    with pytest.raises(
        ResidscopeError, match="is filled part by part: run its `harvest` or `residscope run` to repair"
    ):
        repair(store.path, lambda _: pytest.fail("it computes nothing"))
    assert ActivationStore.open(store.path, partial=True).missing_shards() == sorted({first[1], second[1], *third})


def test_a_damaged_line_of_a_whole_one_is_damage(tmp_path: Path) -> None:
    store, last = ring_store(tmp_path / "a.zarr"), RING.parts(7)[-1].tolist()[-1]
    path = store.path / FILE
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if shard_of(line.strip()) == last)
    path.write_bytes(b"".join([*lines[:at], lines[at].replace(b"0", b"1", 1), *lines[at + 1 :]]))
    assert last in [bad.index for bad in verify(store.path)]
    assert not any(bad.to_come for bad in verify(store.path))


def test_a_removal_that_was_cut_short_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ring_store(tmp_path / "a.zarr")
    readers, unlink, calls = Readers(store.path, RING), Path.unlink, list[Path]()

    def crash(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "resid_post":
            calls.append(path)
            if len(calls) == 2:
                raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", crash)
    readers.announce(1)
    with pytest.raises(KeyboardInterrupt):
        readers.remove(1, 7, store.moments)
    assert readers.removed() == 1
    readers.remove(1, 7, store.moments)
    assert not any((store.path / shard_name(i)).exists() for i in RING.parts(7)[0].tolist() if i)


def test_a_trainer_that_comes_too_late_is_told(tmp_path: Path) -> None:
    store = ring_store(tmp_path / "a.zarr")
    readers = Readers(store.path, RING)
    readers.publish("/x/a.pt", 0)
    readers.publish("/x/b.pt", 2)
    assert readers.used() == {"/x/a.pt": 0, "/x/b.pt": 2}
    readers.announce(1)
    with pytest.raises(IncompatibleError, match=r"c\.pt needs part 1, but the first 1 have been removed"):
        readers.register("/x/c.pt", 0)
    assert "/x/c.pt" not in readers.used()
    readers.register("/x/c.pt", 1)


@pytest.mark.parametrize("content", ["{}", "[]", "5", '{"parts": "x"}', '{"parts": null}', '{"parts": 1e400}', ""])
def test_what_is_no_number_of_parts_is_refused(tmp_path: Path, content: str) -> None:
    store = ring_store(tmp_path / "a.zarr")
    readers, removed = Readers(store.path, RING), store.path / "manifest" / "removed.json"
    removed.write_text(content)
    with pytest.raises(IncompatibleError, match=r"removed\.json: damaged"):
        readers.removed()
    with pytest.raises(IncompatibleError, match=r"removed\.json: damaged"):
        verify(store.path)
    removed.write_text('{"parts": 1}')  # as earlier versions wrote it
    assert readers.removed() == 1


def test_a_flipped_bit_says_of_no_part_that_it_was_used(tmp_path: Path) -> None:
    store = ring_store(tmp_path / "a.zarr")
    readers = Readers(store.path, RING)
    readers.publish("/x/a.pt", 0)
    (file,) = (store.path / "manifest" / "readers").iterdir()
    whole = file.read_bytes()
    for bit in range(8 * (len(whole) - 1)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(IncompatibleError, match="damaged"):
            readers.used()


def test_trainers_of_like_names_are_told_apart(tmp_path: Path) -> None:
    readers = Readers(ring_store(tmp_path / "a.zarr").path, RING)
    names = ("/x/run/a_b.pt", "/x/run/a/b.pt", "/y" + "/deep" * 40, "/z" + "/deep" * 40)
    for parts, name in enumerate(names):
        readers.publish(name, parts)
    assert readers.used() == {name: parts for parts, name in enumerate(names)}


def test_a_store_is_followed_while_shards_come(tmp_path: Path) -> None:
    activations, sizes = random_activations(n_tokens=64), {"chunk_tokens": 16, "shard_tokens": 32}
    meta = make_meta(64, 3, 12, **sizes, provenance={"ring": RING._asdict()})
    tokens = token_table(64)
    with ActivationStore.create(tmp_path / "a.zarr", meta, tokens) as writer:
        with pytest.raises(IncompatibleError, match="1 of 2 shards are missing"):
            ActivationStore.open(writer.path)
        reader = ActivationStore.open(writer.path, follow=True)
        assert reader.missing_shards() == [0, 1]
        writer.write_shard(0, activations[:32])
        reader.refresh()
        assert reader.missing_shards() == [1]
        ActivationStore.open(writer.path)
        assert reader.content_hash == writer.content_hash
