"""Freed memory stays with the process: temporaries made again are not faulted in again."""

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from residscope.memory import keep_freed_memory

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
