"""Shards that are bad or missing come back, proven by the manifest's old lines, and the store has the bytes it had."""

import json
import shutil
import sys
import types
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from residscope.cli import main
from residscope.errors import IncompatibleError, ResidscopeError
from store.activations import ActivationStore
from store.care.repair import JOURNAL, repair
from store.care.verify import verify
from store.manifest import FILE, WriterLock, forget_lines
from tests.support.faults import X, files_of, fill, run_and_die, small

SHARD = "resid_post/c.1.0.0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "a.zarr"
    fill(path)
    return path


@pytest.fixture
def path(tmp_path: Path, whole: Path) -> Path:
    shutil.copytree(whole, tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


def filler(path: Path) -> Callable[[], object]:
    return lambda: fill(path)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 16
    file.write_bytes(data)


def without_line(path: Path, shard: int) -> None:
    lines = (path / FILE).read_bytes().splitlines(keepends=True)
    (path / FILE).write_bytes(b"".join(lines[: shard + 1] + lines[shard + 2 :]))


FAULTS: dict[str, tuple[Callable[[Path], object], list[int], list[int]]] = {
    "nothing": (lambda path: None, [], []),
    "a flipped byte": (lambda path: flip(path / SHARD, 50), [1], [1]),
    "a lost file": (lambda path: (path / SHARD).unlink(), [1], [1]),
    "two files cut short": (
        lambda path: [(path / f"resid_post/c.{i}.0.0").write_bytes(b"x") for i in (0, 2)] and None,
        [0, 2],
        [0, 2],
    ),
    "flipped moments": (lambda path: flip(path / "shard_moments/c.2.0.0.0", 9), [2], [2]),
    "flipped statistics": (lambda path: flip(path / "layer_var/c.0.0", 9), [], []),
    "a flipped line": (lambda path: flip(path / FILE, len((path / FILE).read_bytes()) - 400), [1], []),
    "a torn last line": (lambda path: (path / FILE).write_bytes((path / FILE).read_bytes()[:-9]), [2], []),
    "a missing line": (lambda path: without_line(path, 1), [1], []),
    "a forgotten shard": (lambda path: forget_lines(path, [0]), [0], []),
    "a line that is there twice": (
        lambda path: (path / FILE).write_bytes((path / FILE).read_bytes() + b"".join(lines_of(path)[1:2])),
        [],
        [],
    ),
}


def lines_of(path: Path) -> list[bytes]:
    return (path / FILE).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_store_has_the_bytes_that_it_had(path: Path, whole: Path, fault: str) -> None:
    damage, refilled, proven = FAULTS[fault]
    damage(path)
    done = repair(path, filler)
    assert (done.refilled, done.proven) == (refilled, proven)
    assert files_of(path) == files_of(whole)
    assert not verify(path)


def test_the_order_of_lines_that_several_workers_left_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    meta, tokens = small()
    with ActivationStore.create(path, meta, tokens) as store:
        for shard in (2, 0, 1):
            store.write_shard(shard, X[slice(*meta.shard_bounds(shard))])
        store.finalize()
    before = files_of(path)
    (path / "resid_post/c.0.0.0").unlink()
    assert repair(path, filler).proven == [0]
    assert files_of(path) == before


def test_death_at_any_step_of_a_repair(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "a.zarr"
    calls, died = 0, True
    while died:
        calls += 1
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        flip(path / SHARD, 50)
        (path / "resid_post/c.2.0.0").unlink()
        died = run_and_die(lambda: repair(path, filler), calls)
        repair(path, filler)
        assert files_of(path) == files_of(whole)
    assert calls > 30


def test_a_model_that_gives_other_bytes_is_found_out(path: Path, whole: Path) -> None:
    def other(path: Path) -> None:
        with ActivationStore.open(path, writable=True) as store:
            for shard in store.missing_shards():
                start, stop = store.meta.shard_bounds(shard)
                store.write_shard(shard, X[start:stop] + np.float32(0.1))

    flip(path / SHARD, 50)
    with pytest.raises(ResidscopeError, match=r"shards \[1\] came out with different bytes"):
        repair(path, lambda path: lambda: other(path))
    assert ActivationStore.open(path, partial=True).missing_shards() == [1]
    fill(path)  # A plain run takes what its model gives.
    assert not verify(path)
    assert not (path / JOURNAL).exists()


@pytest.mark.parametrize("name", ["zarr.json", "token_id/c.0", "keep/zarr.json"])
def test_what_no_model_gives_back_is_left_alone(path: Path, name: str) -> None:
    flip(path / name, 5)
    before = files_of(path)
    with pytest.raises(ResidscopeError, match=f"{name}: the file was changed after it was written. This cannot"):
        repair(path, filler)
    assert files_of(path) == before


def test_a_lost_header_is_no_shards(path: Path) -> None:
    flip(path / FILE, 3)
    with pytest.raises(ResidscopeError, match=r"header is damaged\. This cannot"):
        repair(path, filler)


def test_nothing_is_changed_before_there_is_something_to_fill_it_with(path: Path) -> None:
    flip(path / SHARD, 50)
    before = files_of(path)

    def cannot(path: Path) -> Callable[[], object]:
        raise ResidscopeError("no model")

    with pytest.raises(ResidscopeError, match="no model"):
        repair(path, cannot)
    assert files_of(path) == before
    assert ActivationStore.open(path).missing_shards() == []


def test_one_at_a_time(path: Path, tmp_path: Path) -> None:
    with closing(WriterLock(path, path)), pytest.raises(ResidscopeError, match="another process is writing"):
        repair(path, filler)
    with pytest.raises(IncompatibleError, match="not an activation store"):
        repair(tmp_path, filler)
    assert not (tmp_path / "manifest").exists()


def test_the_command(
    path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "harvest.refill", types.SimpleNamespace(prepare=filler))
    flip(path / SHARD, 50)
    assert main(["verify", str(path), "--repair"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"shard 1: {SHARD}: the checksum of token chunk 0 at stored layer 0 does not match",
        f"{path}: complete; 1 shard recomputed, 1 of them with the same hashes as before",
    ]
    assert files_of(path) == files_of(whole)
    assert main(["verify", str(path), "--repair", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bad"], found["refilled"]) == ([], [])
    flip(path / "token_id/c.0", 5)
    assert main(["verify", str(path), "--repair"]) == 1
    assert "This cannot be computed again" in capsys.readouterr().err
