"""Results go where nobody else writes, over no other output's files, together, and onto a disk with room for them."""

import os
from pathlib import Path

import pytest

from residscope.destinations import (
    held_alone,
    partial_folder,
    refuse_comparison_of,
    refuse_shared,
    require_name,
    require_space,
    together,
)
from residscope.errors import ResidscopeError, UsageError
from tests.support.faults import files_of, run_and_die


def test_a_comparison_is_not_written_over_another_commands(tmp_path: Path) -> None:
    refuse_comparison_of("train compare", tmp_path, "store")
    (tmp_path / "compare.json").write_text('{"schema_version": 1, "runs": []}')
    refuse_comparison_of("train compare", tmp_path, "store")
    with pytest.raises(UsageError, match="already contains a comparison by `analyze --compare`: choose"):
        refuse_comparison_of("analyze --compare", tmp_path, "schema_version")
    (tmp_path / "compare.json").write_text("[")
    refuse_comparison_of("analyze --compare", tmp_path, "schema_version")


def test_space_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    require_space(tmp_path / "not/there/yet", 1)
    with pytest.raises(ResidscopeError, match=r"needs 1e\+03 PB.*--max-tokens"):
        require_space(tmp_path / "not/there/yet", 10**18)


def test_one_process_writes_into_a_folder_at_a_time(tmp_path: Path) -> None:
    with (
        held_alone(tmp_path, tmp_path / "out"),
        pytest.raises(ResidscopeError, match=r"out: another process is writing there; wait for it, or choose another"),
        held_alone(tmp_path, tmp_path / "out"),
    ):
        pass
    with held_alone(tmp_path, tmp_path / "out"):
        pass


def write(out: Path, *, replace: bool, content: str = "new") -> None:
    with together(out, ["a", "b/c", "d"], ["a"], replace=replace) as folder:
        (folder / "b").mkdir()
        for name in ("a", "b/c"):
            (folder / name).write_text(content)


@pytest.mark.parametrize("replace", [False, True])
def test_killed_at_any_call_the_files_are_all_there_after_the_next_try(tmp_path: Path, replace: bool) -> None:
    calls = 0
    died = True
    while died:
        calls += 1
        out = tmp_path / str(calls)
        out.mkdir()
        (out / "mine").touch()
        if replace:
            write(out, replace=True, content="old")
            (out / "d").write_text("old")
        before = files_of(out)
        died = run_and_die(lambda out=out: write(out, replace=replace), calls)
        after = {name: content for name, content in files_of(out).items() if ".partial" not in name}
        if "a" in after:  # what counts: all of it is of one run
            assert after in (before, {"mine": b"", "a": b"new", "b/c": b"new"})
        done = not replace and "a" in after and not (out / ".partial/claim").exists()
        if not done:
            write(out, replace=replace)
        assert files_of(out) == {"mine": b"", "a": b"new", "b/c": b"new"}
        assert done or not (out / ".partial").exists()
    assert calls > 10


def test_what_another_kind_of_run_left_half_done_goes_and_what_the_user_has_stays(tmp_path: Path) -> None:
    def fail() -> None:
        with together(tmp_path, ["x", "a"], ["x"], replace=False) as folder:
            (folder / "x").touch()
            (folder / "a").touch()
            os.replace = lambda *_: os._exit(9)  # type: ignore[assignment]

    (tmp_path / "b").mkdir()
    assert run_and_die(fail, 1000)
    (tmp_path / "a").touch()  # as if the kill had come after this one
    write(tmp_path, replace=False)
    assert set(files_of(tmp_path)) == {"a", "b/c"}
    with pytest.raises(UsageError, match="a exists already; choose another folder"):
        write(tmp_path, replace=False)
    assert not (tmp_path / ".partial").exists()


def test_a_run_that_fails_leaves_what_was_there_and_no_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for out in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(ZeroDivisionError), together(out, ["a"], ["a"], replace=False) as folder:
            (folder / "a").write_text(str(1 / 0))
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert not any((tmp_path / "old").iterdir())


@pytest.mark.parametrize("claimed", ['["../mine", "/tmp/none"]', "[1]", "7", "[" * 100_000])
def test_a_claim_that_is_not_ours_removes_nothing(tmp_path: Path, claimed: str) -> None:
    (tmp_path / "out/.partial").mkdir(parents=True)
    (tmp_path / "mine").touch()
    (tmp_path / "out/.partial/claim").write_text(claimed)
    with together(tmp_path / "out", ["a"], ["a"], replace=False) as folder:
        (folder / "a").touch()
    assert (tmp_path / "mine").exists()
    assert (tmp_path / "out/a").exists()


def test_files_beside_an_output_belong_to_one(tmp_path: Path) -> None:
    out, other, record, side = (tmp_path / name for name in ("a", "a.pt", "a.config.toml", "a.safetensors"))
    refuse_shared(out, record, [side])
    side.write_text("another tool's")
    with pytest.raises(UsageError, match=r"--out .*a: .*a.safetensors, which would be replaced, already exists"):
        refuse_shared(out, record, [side])
    record.write_text('out = "somewhere/a.pt"')
    refuse_shared(out, record, [side])  # its owner is gone
    other.touch()
    refuse_shared(other, record, [side])
    with pytest.raises(
        UsageError, match=r"--out .*a: .*a.config.toml and the files next to it belong to .*a.pt: choose"
    ):
        refuse_shared(out, record, [side])
    record.write_text('out = "b.pt"')  # renamed, with the files beside it
    (tmp_path / "b.pt").touch()
    refuse_shared(out, record, [side])
    record.write_text("[")
    with pytest.raises(UsageError, match=r"a.config.toml, which would be replaced"):
        refuse_shared(out, record, [side])
    refuse_shared(other, record, [side])  # damaged: the checkpoint itself says enough to resume
    record.unlink()
    os.mkfifo(record)  # would wait for a writer
    with pytest.raises(UsageError, match=r"a.config.toml, which would be replaced"):
        refuse_shared(out, record, [side])
    refuse_shared(other / "x", other / "x.config.toml", [other / "x.safetensors"])  # a file where a folder should be


@pytest.mark.parametrize(
    "name", [".", "a/..", "a.metrics.jsonl", "acts.zarr.planning", "a.pt.tmp", "\u65e5" * 74 + ".pt"]
)
def test_an_output_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(UsageError, match="--out"):
        require_name(Path(name))


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"below/a.pt: a part of this path is a file, not a folder"):
        require_name(tmp_path / "file/below/a.pt")
    require_name(tmp_path / "folder/below/a.pt")


def test_a_link_to_what_is_not_there_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "no" / "where")
    with (
        pytest.raises(UsageError, match=r"--out .*link: .*link is a broken link: choose another"),
        together(tmp_path / "link", ["a"], ["a"], replace=False),
    ):
        raise AssertionError("not reached")


def test_a_folder_that_a_run_beside_this_one_removed_is_that_runs(tmp_path: Path) -> None:
    with (
        pytest.raises(ResidscopeError, match=r"out: another process is writing there; wait for it, or choose another"),
        held_alone(tmp_path / "gone", tmp_path / "out"),
    ):
        pass


def test_the_folder_for_unfinished_results_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries take a relative a:b for a URL."""
    monkeypatch.chdir(tmp_path)
    with partial_folder(Path("a:b")) as folder:
        assert folder == tmp_path / "a:b" / ".partial"
