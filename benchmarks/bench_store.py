"""How fast a store is written and read: our direct path, the zarr API, and a plain memory map, in one run.

    python benchmarks/bench_store.py [--json] [--tokens N] [--rounds N] [--folder DIR]

Everything is warm (in the page cache), and with checksums on but for the memory map, which has none: it is the ceiling.
The rounds of the things compared alternate, and each ratio is the median over rounds of what ran side by side, so that
a busy machine hurts both alike. One-core numbers count the processor's seconds of the whole process, which other
processes' turns are not part of; only the loader on one core against two goes by the clock. MB/s are 10^6 bytes of
activations per second; higher is better.

Not measured: a cold disk (it would measure the disk), compressed stores, and training (bench_step.py).
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

sys.path.insert(0, str(Path(__file__).parent.parent))

from store.activations import ActivationStore
from store.arrays import TokenTable
from store.checksums import CRC_BYTES
from store.loader import WindowLoader
from store.meta import StoreMeta, chunk_and_shard_tokens, config_hash
from store.pack import ShardPacker, seal_slots
from store.shards import shard_name

N_LAYERS, D_MODEL = 30, 576  # SmolLM2-135M
BATCH_ROWS = 8192
READ_CHUNKS, ZARR_CHUNKS = 512, 64
"""Inner chunks of a round; fewer for zarr, which takes many times as long for each."""
EPOCHS = 3
"""Epochs that the loader serves in a round. This store is two windows: in one epoch, half of the time would go into the
first touch of their memory, and into a window that nothing is read beside."""


class Rates(dict[str, np.ndarray]):
    """MB/s of several ways to do one thing, by round: each [rounds]."""

    def ratio(self, one: str, other: str) -> float:
        """Median over rounds of how many times as fast `one` is."""
        return float(np.median(self[one] / self[other]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the activation store against zarr and a plain memory map.")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--tokens", type=int, default=14_336, help="tokens of the store, 34,560 bytes each")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each measurement")
    parser.add_argument("--folder", type=Path, help="where to write it (default: a temporary folder)")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-store-", dir=options.folder))
    try:
        found = measure(folder, options.tokens, options.rounds)
    finally:
        shutil.rmtree(folder)
    ratios = {
        "random_read_over_memmap": found["random chunks"].ratio("direct", "memory map"),
        "random_read_over_zarr": found["random chunks"].ratio("direct", "zarr"),
        "sequential_read_over_memmap": found["chunks in order"].ratio("direct", "memory map"),
        "loader_over_memmap": found["loader"].ratio("direct", "memory map"),
        "loader_two_cores_over_one": found["loader by the clock"].ratio("two cores", "one core"),
        "write_over_zarr": found["shard write"].ratio("direct", "zarr"),
    }
    print("MB/s, median (best) over rounds; higher is better")
    for name, rates in found.items():
        print(f"{name:<20}", *(f"{way} {np.median(r):,.0f} ({r.max():,.0f})" for way, r in rates.items()), sep="  ")
    for name, value in ratios.items():
        print(f"{name:<28}{value:>7.2f}")
    if options.json:
        print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


def measure(folder: Path, n_tokens: int, rounds: int) -> dict[str, Rates]:
    chunk, shard = chunk_and_shard_tokens(n_tokens, N_LAYERS, D_MODEL, 2)
    n_tokens = max(n_tokens // shard, 1) * shard
    meta = StoreMeta(
        n_tokens=n_tokens,
        layers=tuple(range(N_LAYERS)),
        n_model_layers=N_LAYERS,
        d_model=D_MODEL,
        chunk_tokens=chunk,
        shard_tokens=shard,
        context_length=1024,
        config_hash=config_hash({"benchmark": "store"}),
    )
    index = np.arange(n_tokens, dtype=np.int32)
    tokens = TokenTable(index, index // 512, index % 1024, np.ones(n_tokens, bool))
    # bfloat16 bit patterns of ordinary numbers; their values do not matter.
    rng = np.random.default_rng(0)
    data = rng.integers(0x3C00, 0x4000, (N_LAYERS, shard, D_MODEL), dtype=np.uint16).transpose(1, 0, 2)
    commits = []
    with ActivationStore.create(folder / "acts.zarr", meta, tokens) as store:
        for i in range(meta.n_shards):
            began = time.perf_counter()
            store.write_shard(i, data)
            commits.append(data.nbytes / (time.perf_counter() - began) / 1e6)
        store.finalize()
    store = ActivationStore.open(folder / "acts.zarr")
    cores = sorted(os.sched_getaffinity(0))
    with on_cores(cores[:1]):
        found = {
            "shard write": shard_write(folder, store, data, rounds),
            "whole commit": Rates({"direct, by the clock": np.array(commits)}),
            "random chunks": chunk_reads(store, rng.permutation(all_chunks(meta))[:READ_CHUNKS], rounds),
            "chunks in order": chunk_reads(store, all_chunks(meta)[:READ_CHUNKS], rounds),
            "loader": loader_epochs(store, rounds),
        }
    return found | {"loader by the clock": loader_on_cores(store, cores[:2], rounds)}


@contextlib.contextmanager
def on_cores(cores: list[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def compare(
    rounds: int, ways: Mapping[str, tuple[int, Callable[[], object]]], clock: Callable[[], float] = time.process_time
) -> Rates:
    """MB/s of each way (bytes that it moves, and how), after a round that is not counted."""
    rates = {name: np.empty(rounds) for name in ways}
    for turn in range(-1, rounds):
        for name, (n_bytes, run) in ways.items():
            gc.collect()
            began = clock()
            run()
            if turn >= 0:
                rates[name][turn] = n_bytes / (clock() - began) / 1e6
    return Rates(rates)


def shard_write(folder: Path, store: ActivationStore, data: np.ndarray, rounds: int) -> Rates:
    """One shard from memory to a file: encoded and checksummed, but not forced to the disk, which zarr never does.

    Ours also takes the layers' moments on the way; the memory map is a bare copy.
    """
    meta = store.meta
    theirs: Any = zarr.open_group(str(store.path), mode="r")["resid_post"]
    copy = zarr.create_array(
        str(folder / "zarr-writes.zarr"),
        shape=(meta.shard_tokens, *theirs.shape[1:]),
        dtype=theirs.dtype,
        chunks=theirs.chunks,
        shards=theirs.shards,
        compressors=theirs.compressors,
        filters=None,
        fill_value=0,
    )
    contiguous = np.ascontiguousarray(data)
    mapped = np.lib.format.open_memmap(folder / "written.npy", mode="w+", dtype=np.uint16, shape=data.shape)
    packer, keep = ShardPacker(meta), np.ones(len(data), bool)

    def direct() -> None:
        with (folder / "shard").open("wb") as file:
            for part in seal_slots(packer.pack(data, keep)[0], meta):
                file.write(part)

    ways: dict[str, Callable[[], object]] = {
        "direct": direct,
        "zarr": lambda: copy.__setitem__(slice(None), contiguous),
        "memory map": lambda: mapped.__setitem__(slice(None), contiguous),
    }
    return compare(max(rounds // 3, 2), {name: (data.nbytes, way) for name, way in ways.items()})


def all_chunks(meta: StoreMeta) -> np.ndarray:
    """Token chunk and layer of every inner chunk, in the order of the file: int64 [n, 2]."""
    return np.stack(np.divmod(np.arange(meta.n_chunks * meta.n_layers), meta.n_layers), axis=1)


class MappedStore:
    """The plainest reader of a store: its chunks through memory maps of its own files, opened anew for each request."""

    def __init__(self, store: ActivationStore) -> None:
        self.path, self.meta = store.path, store.meta

    def read_blocks(self, chunk: np.ndarray, layer: np.ndarray, out: np.ndarray, threads: int = 1) -> None:
        """As `ActivationStore.read_blocks`, in one thread and without a checksum."""
        meta = self.meta
        size = meta.chunk_tokens * meta.d_model * meta.itemsize
        maps = [np.memmap(self.path / shard_name(shard), np.uint8, "r") for shard in range(meta.n_shards)]
        target = out.reshape(len(out), -1).view(np.uint8)
        for block, (c, at) in enumerate(zip(chunk.tolist(), layer.tolist(), strict=True)):
            shard, within = divmod(c, meta.chunks_per_shard)
            start = (within * meta.n_layers + at) * (size + CRC_BYTES)
            target[block] = maps[shard][start : start + size]


def chunk_reads(store: ActivationStore, chunks: np.ndarray, rounds: int) -> Rates:
    """Inner chunks (int64 [n, 2], token chunk and layer) into one buffer that holds them all."""
    meta, size = store.meta, store.meta.chunk_tokens
    array: Any = zarr.open_group(str(store.path), mode="r")["resid_post"]
    chunk, layer = chunks[:, 0].copy(), chunks[:, 1].copy()
    out = np.empty((len(chunks), size, meta.d_model), np.uint16)
    mapped = MappedStore(store)

    def with_zarr() -> None:
        for i in range(ZARR_CHUNKS):
            out[i] = array[chunk[i] * size : (chunk[i] + 1) * size, layer[i]]

    return compare(
        rounds,
        {
            "direct": (out.nbytes, lambda: store.read_blocks(chunk, layer, out, threads=1)),
            "memory map": (out.nbytes, lambda: mapped.read_blocks(chunk, layer, out)),
            "zarr": (out[:ZARR_CHUNKS].nbytes, with_zarr),
        },
    )


def serve(store: Any, threads: int) -> None:
    """Serve every row `EPOCHS` times, in shuffled batches."""
    mask = np.ones(store.meta.n_tokens, bool)
    for _ in WindowLoader(store, mask, BATCH_ROWS, seed=0, threads=threads, epochs=EPOCHS):
        pass


def loader_epochs(store: ActivationStore, rounds: int) -> Rates:
    """The loader on the store, and on a memory map of the same bytes."""
    n_bytes = EPOCHS * store.meta.n_tokens * store.meta.bytes_per_token
    return compare(
        rounds,
        {
            "direct": (n_bytes, lambda: serve(store, 1)),
            "memory map": (n_bytes, lambda: serve(MappedStore(store), 1)),
        },
    )


def loader_on_cores(store: ActivationStore, cores: list[int], rounds: int) -> Rates:
    """The loader confined to one core, and on two."""

    def run(cores: list[int]) -> None:
        with on_cores(cores):
            serve(store, 4)

    n_bytes = EPOCHS * store.meta.n_tokens * store.meta.bytes_per_token
    ways = {"one core": (n_bytes, lambda: run(cores[:1])), "two cores": (n_bytes, lambda: run(cores))}
    return compare(rounds, ways, time.perf_counter)


if __name__ == "__main__":
    main()
