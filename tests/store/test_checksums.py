"""crc32c: the number that the standard gives, from either library, for bytes and arrays of every alignment."""

import builtins
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from store import checksums
from store.checksums import DamagedError


@pytest.fixture(params=["fastest", "without awscrt"])
def crc32c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "without awscrt":
        load = builtins.__import__

        def absent(name: str, *rest: Any) -> Any:
            if name.startswith("awscrt"):
                raise ImportError(name)
            return load(name, *rest)

        monkeypatch.setattr(builtins, "__import__", absent)
    checksums._fastest.cache_clear()
    yield checksums.crc32c
    checksums._fastest.cache_clear()


def bit_by_bit(data: bytes) -> int:
    """crc32c from its definition: the reflected polynomial 0x1EDC6F41."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_the_standards_numbers(crc32c: Any) -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the catalogue of CRCs
    assert crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_bytes_and_arrays_of_any_length_and_alignment(crc32c: Any) -> None:
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    for start in (0, 1, 3, 16):
        for length in (0, 1, 7, 63, 64, 65, 255, 256, 1023):
            part = data[start : start + length]
            assert crc32c(part) == crc32c(part.tobytes()) == bit_by_bit(part.tobytes())
        assert crc32c(data[start:]) == google_crc32c.value(data[start:].tobytes())


def test_damage_is_told_by_another_process_as_it_is() -> None:
    error = pickle.loads(pickle.dumps(DamagedError(Path("a.zarr/token_id/c.0"), "the file is missing")))
    assert isinstance(error, DamagedError)
    assert (error.what, error.exit_code) == ("the file is missing", 3)
    assert str(error).startswith("a.zarr/token_id/c.0: the file is missing. ")
