"""Freed memory stays with the process: temporaries made again are not faulted in again. A limit of the address space
below what a command takes is one line at its start."""

import ctypes
import platform
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from residscope.cli import main
from residscope.errors import is_out_of_memory
from residscope.memory import NEEDED_GB, keep_freed_memory

FAULTS = """
import resource, sys
import numpy as np
from residscope.memory import keep_freed_memory

taken = keep_freed_memory() if sys.argv[1] == "keep" else None

def temporaries():
    blocks = [np.ones(12_000_000, np.uint8) for _ in range(4)]
    while blocks:
        blocks.pop()  # The highest first, so that the top of the heap is free.

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    temporaries()
before = faults()
for _ in range(10):
    temporaries()
print(taken, faults() - before)
"""


def faults(mode: str) -> tuple[str, int]:
    """What `keep_freed_memory` gave in a process of its own, and page faults of 480 MB of temporaries."""
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], check=True, capture_output=True, text=True)
    taken, count = done.stdout.split()
    return taken, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_temporaries_are_faulted_in_once() -> None:
    taken, kept = faults("keep")
    assert taken == "True"
    _, given_back = faults("default")
    assert given_back > 10_000  # 480 MB are 117,000 pages, fewer where they are large
    assert kept < 500


def test_an_older_malloc_keeps_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes blocks of at most 32 MiB, as glibc before 2.35."""
    settings = {}

    def mallopt(name: int, value: int) -> int:
        if name == -3 and value > 2**25:
            return 0
        settings[name] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory.__wrapped__()
    assert settings == {-3: 2**25, -1: 2**31 - 1}


COMMANDS = {
    "harvest": "harvest --model m --out a.zarr",
    "train": "train --store a.zarr",
    "train compare": "train compare --store a.zarr --sae c.pt",
    "analyze": "analyze --store a.zarr --sae c.pt",
    "residscope fit-lens": "fit-lens --model m --store a.zarr --out lens",
    "residscope convert": "convert c.pt out --to saelens",
    "residscope demo": "demo --out demo",
}


def limited(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (n_bytes, n_bytes))


@pytest.mark.parametrize("name", NEEDED_GB)
def test_too_small_an_address_space_is_one_line_before_anything_loads(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limited(monkeypatch, round(NEEDED_GB[name] * 1e9) - 1)
    assert main(COMMANDS[name].split()) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"{name}: error: not enough memory: the address space limit (`ulimit -v`) is ")
    assert f"needs at least {NEEDED_GB[name]} GB" in err
    with pytest.raises(SystemExit, match=r"^0$"):  # what needs no memory is not refused
        main([*name.removeprefix("residscope ").split(), "--help"])


def test_the_address_space_that_is_needed_is_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for n_bytes in (round(NEEDED_GB["train"] * 1e9), resource.RLIM_INFINITY):
        limited(monkeypatch, n_bytes)
        assert main(["train", "--store", "nowhere.zarr"]) == 2  # the next thing that is wrong
    assert "address space" not in capsys.readouterr().err


def test_libraries_that_fail_without_a_word_under_a_limit_had_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = (SystemError("error return without exception set"), ImportError("Unable to find a usable engine"))
    limited(monkeypatch, resource.RLIM_INFINITY)
    assert not any(map(is_out_of_memory, errors))
    limited(monkeypatch, 4 * 10**9)
    assert all(map(is_out_of_memory, errors))
    assert not is_out_of_memory(ModuleNotFoundError("No module named 'matplotlib'"))
