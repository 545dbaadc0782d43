"""How loops are compiled and run: errors, the cache of machine code."""

import importlib
import logging
import shutil
import sys
from pathlib import Path

import numba
import pytest

from train.kernels.cpu import compiling


def test_an_error_in_a_chunk_reaches_the_caller() -> None:
    def loop(start: int, stop: int) -> None:
        raise ArithmeticError(f"{start} to {stop}")

    with pytest.raises(ArithmeticError):
        compiling.run_chunks(loop, [0, 1, 2, 3])


def test_without_a_folder_for_the_cache_loops_compile_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    njit = numba.njit

    def refuse_cache(*args: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(numba, "njit", refuse_cache)
    with caplog.at_level(logging.WARNING):
        loop = compiling.compiled(lambda a, b: a + b)
    assert loop(1, 2) == 3
    assert "NUMBA_CACHE_DIR" in caplog.text


def test_loops_are_made_anew_when_a_helper_in_another_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numba itself looks at the file of the function that it caches."""
    monkeypatch.setattr("numba.config.CACHE_DIR", "")  # Beside the file, whatever NUMBA_CACHE_DIR says.
    package = tmp_path / "loops_of_a_test"
    package.mkdir()
    shutil.copy(compiling.__file__, package / "compiling.py")
    start = "from loops_of_a_test.compiling import compiled, inlined\n"
    loop = "from loops_of_a_test.helper import twice\n@compiled\ndef loop(a):\n    return twice(a) + 1\n"
    (package / "loop.py").write_text(start + loop)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for number in (2, 2, 3):
        helper = f"@inlined\ndef twice(a):\n    return {number} * a\n"
        (package / "helper.py").write_text(start + helper)
        for name in [name for name in sys.modules if name.startswith(package.name)]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        assert importlib.import_module("loops_of_a_test.loop").loop(5) == 5 * number + 1
    assert len(list(package.glob("__pycache__/loop.loop*.nbc"))) == 1
