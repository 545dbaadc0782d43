"""A small store that is filled as a harvest fills one; processes that die, or meet errors, at a chosen system call."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from store.activations import ActivationStore
from store.arrays import TokenTable
from store.meta import StoreMeta
from tests.support.stores import make_meta, random_activations, token_table

X = random_activations(40, 2, 5)


def small(codec: str = "none") -> tuple[StoreMeta, TokenTable]:
    return make_meta(40, 2, 5, chunk_tokens=8, shard_tokens=16, codec=codec), token_table(40)


def fill(path: Path, codec: str = "none") -> None:
    """Make the store or go on with what is there, as harvest does."""
    meta, tokens = small(codec)
    store = ActivationStore.open(path, writable=True) if path.exists() else ActivationStore.create(path, meta, tokens)
    with store:
        for shard in store.missing_shards():
            start, stop = meta.shard_bounds(shard)
            store.write_shard(shard, X[start:stop])
        store.finalize()


def files_of(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def count_down(calls: int, act: Callable[[Callable], None], patch: Callable[[str, Callable], None]) -> list[int]:
    """Have `act` called in place of the `calls`-th system call of those that change or sync the disk; what is left."""
    left = [calls]

    def counted(call: Callable) -> Callable:
        def wrapped(*arguments, **options):  # type: ignore[no-untyped-def]
            left[0] -= 1
            if left[0] == 0:
                act(lambda: call(arguments[0], arguments[1][: len(arguments[1]) // 2]) if call is write else None)
            return call(*arguments, **options)

        return wrapped

    write = os.write
    for name in ("write", "fsync", "replace", "ftruncate", "unlink", "rmdir", "mkdir"):
        patch(name, counted(getattr(os, name)))
    return left


def run_and_die(action: Callable[[], object], calls: int) -> bool:
    """Run in a process that dies at that system call, in a write by half; True if it did."""
    child = os.fork()
    if child == 0:

        def die(by_half: Callable) -> None:
            by_half()
            os._exit(9)

        count_down(calls, die, lambda name, call: setattr(os, name, call))
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def everything(path: Path) -> list[np.ndarray | int]:
    """All that a reader can ask of a whole store."""
    store = ActivationStore.open(path)
    meta, statistics = store.meta, store.statistics()
    chunk = np.array([0, meta.n_chunks - 1])
    blocks = np.empty((2, meta.chunk_tokens, meta.d_model), np.uint16)
    store.read_blocks(chunk, np.array([meta.n_layers - 1, 0]), blocks)
    return [
        store.read(),
        blocks,
        *store.tokens,
        statistics.count,
        statistics.mean,
        statistics.var,
        statistics.norm,
        store.merged_statistics().var,
    ]


def harmless(path: Path, expected: list[np.ndarray | int]) -> bool:
    """Whether all that a reader gets is what it should be; raises what the reader raises."""
    return all(np.array_equal(a, b) for a, b in zip(everything(path), expected, strict=True))


def random_fault(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """The bytes of a file after a fault, a flipped bit or a lost end, and what it was."""
    at = int(rng.integers(len(data)))
    if rng.integers(2):
        return data[:at], f"cut to {at} bytes"
    changed = bytearray(data)
    changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed), f"byte {at} flipped"
