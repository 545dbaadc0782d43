"""What libraries raise on bad input is one line of the file's; memory that is refused and the disk's words are not."""

import errno
import json
from pathlib import Path

import pytest

from residscope.errors import IncompatibleError, UsageError, is_out_of_memory
from residscope.reading import read_json, reading


class PanicException(BaseException):
    """As libraries in Rust raise it: no Exception."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\n two."), "x.bin (one two): save it again"),
        (KeyError("k"), "x.bin (no 'k'): save it again"),
        (RuntimeError(), "x.bin (RuntimeError): save it again"),
        (RecursionError("maximum recursion depth"), "x.bin (nested too deeply): save it again"),
        (OSError(errno.EINVAL, "Invalid argument"), "x.bin ([Errno 22] Invalid argument): save it again"),
        (PanicException("index out of range"), "x.bin (index out of range): save it again"),
    ],
)
def test_whatever_is_raised_is_one_line_of_the_file(error: BaseException, line: str) -> None:
    with pytest.raises(IncompatibleError) as caught, reading("x.bin", "save it again"):
        raise error
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "error",
    [
        UsageError("ours"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError(errno.EACCES, "Permission denied"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_not_the_file_s_fault_stays_what_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("x.bin"):
        raise error
    assert caught.value is error


def test_memory_and_threads_that_are_refused_are_known_by_what_is_said() -> None:
    for error in (
        RuntimeError("can't start new thread"),
        ImportError("libarrow.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ):
        assert is_out_of_memory(error)
        other = OSError("could not be found")
        other.__context__ = error
        assert is_out_of_memory(other)
    assert not is_out_of_memory(ValueError("shapes differ"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"Exceeds the limit \(4300 digits\).*has 5000 digits\)$"),
        (b'"\xff"', "can't decode byte"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_no_reader_takes_is_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(IncompatibleError, match=rf"^{path}: not valid JSON \(.*{reason}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps({"a": [1]}))
    assert read_json(path) == {"a": [1]}
