"""Results go where nobody else writes, over no other command's comparison, and onto a disk with room for them."""

from pathlib import Path

import pytest

from residscope.destinations import held_alone, refuse_comparison_of, require_space
from residscope.errors import ResidscopeError, UsageError


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
        pytest.raises(ResidscopeError, match=r"--out .*out: another process is writing there; wait until it ends"),
        held_alone(tmp_path, tmp_path / "out"),
    ):
        pass
    with held_alone(tmp_path, tmp_path / "out"):
        pass
