"""How fast a store is written and read: our direct path, the zarr API, and a plain memory map, in one run.

    python benchmarks/bench_store.py [--json] [--tokens N] [--folder DIR]

Everything is warm (in the page cache) and with checksums on, except for the memory map, which has none: it is the ceiling.
Reading is measured on one core, the loader on one and on two. Each number is the best of several rounds; the rounds of the
things compared alternate, so that a busy machine hurts them alike. MB/s are 10^6 bytes of activations per second; higher
is better.

Not measured: a cold disk (it would measure the disk), compressed stores, and training (bench_step.py).
"""

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr

sys.path.insert(0, str(Path(__file__).parent.parent))

from store.activations import ActivationStore
from store.arrays import TokenTable
from store.loader import WindowLoader
from store.meta import StoreMeta, chunk_and_shard_tokens, config_hash
from store.pack import pack_shard
from store.plan import LoaderPlan
from store.shards import CRC_BYTES, shard_name

N_LAYERS, D_MODEL = 30, 576  # SmolLM2-135M
BATCH_ROWS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the activation store against zarr and a plain memory map.")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--tokens", type=int, default=24_576, help="tokens of the store, 34,560 bytes each")
    parser.add_argument("--folder", type=Path, help="where to write it (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement; the best counts")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-store-", dir=options.folder))
    try:
        results = run(folder, options.tokens, options.rounds)
    finally:
        shutil.rmtree(folder)
    print_table(results)
    if options.json:
        print(json.dumps(results["ratios"]))


def run(folder: Path, n_tokens: int, rounds: int) -> dict:
    cores = sorted(os.sched_getaffinity(0))
    one, two = {cores[0]}, set(cores[:2])
    rng = np.random.default_rng(0)
    chunk, shard = chunk_and_shard_tokens(n_tokens, N_LAYERS, D_MODEL, 2)
    n_tokens -= n_tokens % shard
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
    # bfloat16 bit patterns of ordinary numbers; their values do not matter to any of the three.
    data = rng.integers(0x3C00, 0x4000, (N_LAYERS, shard, D_MODEL), dtype=np.uint16).transpose(1, 0, 2)
    keep = np.ones(shard, bool)

    store = ActivationStore.create(folder / "acts.zarr", meta, tokens)
    for i in range(meta.n_shards):
        store.write_shard(i, data, keep)
    store.finalize()
    store.close()
    store = ActivationStore.open(folder / "acts.zarr")
    plain = np.lib.format.open_memmap(
        folder / "plain.npy", mode="w+", dtype=np.uint16, shape=(meta.n_chunks, N_LAYERS, chunk, D_MODEL)
    )
    for i in range(meta.n_chunks):
        plain[i] = data[:chunk].transpose(1, 0, 2)
    plain.flush()

    os.sched_setaffinity(0, one)
    write = write_speeds(folder, meta, tokens, data, keep, rounds)
    read = read_speeds(store, rng, rounds)
    loader_one = loader_speeds(store, plain, threads=1, rounds=rounds)
    os.sched_setaffinity(0, two)
    loader_two = loader_speeds(store, plain, threads=4, rounds=rounds)
    os.sched_setaffinity(0, cores)
    return {
        "write": write,
        **read,
        "loader, one core": loader_one,
        f"loader, {len(two)} cores": loader_two,
        "ratios": {
            "random_read_over_memmap": read["random chunks"]["direct"] / read["random chunks"]["memory map"],
            "random_read_over_zarr": read["random chunks"]["direct"] / read["random chunks"]["zarr"],
            "sequential_read_over_memmap": read["in order"]["direct"] / read["in order"]["memory map"],
            "loader_over_memmap": loader_one["direct"] / loader_one["memory map"],
            "loader_two_cores_over_one": loader_two["direct"] / loader_one["direct"],
            "write_over_zarr": write["direct"] / write["zarr"],
        },
    }


def best_of(rounds: int, n_bytes: int, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """MB/s of each of `runs`, each of which moves `n_bytes`: the best round of each, rounds alternating."""
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, function in runs.items():
            gc.collect()
            began = time.perf_counter()
            function()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return {name: n_bytes / s / 1e6 for name, s in seconds.items()}


def write_speeds(
    folder: Path, meta: StoreMeta, tokens: TokenTable, data: np.ndarray, keep: np.ndarray, rounds: int
) -> dict[str, float]:
    """One shard, given in memory: encoded, checksummed and in a file (not forced to the disk, which zarr never does).

    "direct" does what zarr does; "whole commit" is `write_shard`: statistics, content hash, fsyncs and the manifest's line.
    """
    target = folder / "shard"
    other = zarr.open_group(str(folder / "acts.zarr"), mode="r")["resid_post"]
    assert isinstance(other, zarr.Array)
    copy = zarr.create_array(
        str(folder / "zarr-writes.zarr"),
        shape=(meta.shard_tokens, *other.shape[1:]),
        dtype=other.dtype,
        chunks=other.chunks,
        shards=other.shards,
        compressors=other.compressors,
        filters=None,
        fill_value=0,
    )
    contiguous = np.ascontiguousarray(data)
    plain = np.lib.format.open_memmap(folder / "written.npy", mode="w+", dtype=np.uint16, shape=data.shape)

    def direct() -> None:
        with target.open("wb") as file:
            for part in pack_shard(data, keep, meta).parts:
                file.write(part)

    def with_zarr() -> None:
        copy[:] = contiguous

    def memory_map() -> None:
        plain[:] = contiguous

    n_bytes = data.nbytes
    speeds = best_of(rounds, n_bytes, {"direct": direct, "zarr": with_zarr, "memory map": memory_map})
    commits = []
    with ActivationStore.create(folder / "commit.zarr", meta, tokens) as store:
        for i in range(min(rounds, meta.n_shards)):
            began = time.perf_counter()
            store.write_shard(i, data, keep)
            commits.append(n_bytes / (time.perf_counter() - began) / 1e6)
    return {**speeds, "whole commit": max(commits)}


def read_speeds(store: ActivationStore, rng: np.random.Generator, rounds: int) -> dict:
    """1,024 inner chunks (256 tokens at one layer each) into a buffer that holds them all: in random order, and in order.

    The memory map is one of the store's own files, opened anew in each round as a reader would: same bytes, no checksums.
    """
    meta = store.meta
    array = zarr.open_group(str(store.path), mode="r")["resid_post"]
    assert isinstance(array, zarr.Array)
    size, chunk_bytes = meta.chunk_tokens, meta.chunk_tokens * meta.d_model * meta.itemsize
    everything = np.stack(np.divmod(np.arange(meta.n_chunks * meta.n_layers), meta.n_layers), axis=1)
    n_read = min(1024, len(everything))
    out = np.empty((n_read, size, meta.d_model), np.uint16)
    results = {}
    for name, order in (("random chunks", rng.permutation(everything)[:n_read]), ("in order", everything[:n_read])):

        def direct(order: np.ndarray = order) -> None:
            store.read_blocks(order[:, 0].copy(), order[:, 1].copy(), out, threads=1)

        def memory_map(order: np.ndarray = order) -> None:
            maps = [np.memmap(store.path / shard_name(i), np.uint8, "r") for i in range(meta.n_shards)]
            flat = out.reshape(n_read, -1).view(np.uint8)
            for i, (chunk, layer) in enumerate(order):
                shard, within = divmod(int(chunk), meta.chunks_per_shard)
                start = (within * meta.n_layers + int(layer)) * (chunk_bytes + CRC_BYTES)
                flat[i] = maps[shard][start : start + chunk_bytes]

        def with_zarr(order: np.ndarray = order[:128]) -> None:
            # Fewer, because it is an order of magnitude slower; its speed does not depend on how many are read.
            for i, (chunk, layer) in enumerate(order):
                out[i] = array[chunk * size : (chunk + 1) * size, layer]

        n_bytes = n_read * chunk_bytes
        results[name] = best_of(rounds, n_bytes, {"direct": direct, "memory map": memory_map}) | best_of(
            rounds, 128 * chunk_bytes, {"zarr": with_zarr}
        )
    return results


def loader_speeds(store: ActivationStore, plain: np.ndarray, *, threads: int, rounds: int) -> dict[str, float]:
    """A whole epoch in shuffled batches, against the same windows and batches from a memory map without checksums."""
    mask = np.ones(store.meta.n_tokens, bool)

    def direct() -> None:
        for _ in WindowLoader(store, mask, BATCH_ROWS, seed=0, threads=threads):
            pass

    plan = WindowLoader(store, mask, BATCH_ROWS, seed=0).plan
    n_bytes = store.meta.n_tokens * store.meta.bytes_per_token
    return best_of(rounds, n_bytes, {"direct": direct, "memory map": lambda: memory_map_epoch(plain, plan, threads)})


def memory_map_epoch(plain: np.ndarray, plan: LoaderPlan, threads: int) -> None:
    """The plainest loader with the same shuffle: copy a window's chunks from a memory map, then gather permuted rows."""
    blocks = plan.epoch(0)
    buffers = [np.empty((plan.blocks_per_window, *plain.shape[2:]), np.uint16) for _ in range(2)]

    def load(window: int) -> tuple[np.ndarray, np.ndarray]:
        chunk, layer = plan.window(blocks, window)
        buffer = buffers[window % 2]
        for i, (c, at) in enumerate(zip(chunk, layer, strict=True)):
            buffer[i] = plain[c, at]
        rows = buffer[: len(chunk)].reshape(-1, plain.shape[-1]).view(np.int64)
        return rows, plan.row_order(np.arange(len(rows)), 0, window)

    out = np.empty((BATCH_ROWS, plain.shape[-1] // 4), np.int64)
    with ThreadPoolExecutor(1) as pool:
        n_windows = len(blocks.row_ends)
        pending = pool.submit(load, 0)
        for window in range(n_windows):
            rows, order = pending.result()
            if window + 1 < n_windows and threads > 1:
                pending = pool.submit(load, window + 1)
            for start in range(0, len(order), BATCH_ROWS):
                picked = order[start : start + BATCH_ROWS]
                np.take(rows, picked, axis=0, out=out[: len(picked)], mode="clip")
            if window + 1 < n_windows and threads == 1:
                pending = pool.submit(load, window + 1)


def print_table(results: dict) -> None:
    columns = ("direct", "memory map", "zarr", "whole commit")
    print(f"{'MB/s (higher is better)':<26}" + "".join(f"{c:>14}" for c in columns))
    for name, speeds in results.items():
        if name != "ratios":
            print(f"{name:<26}" + "".join(f"{speeds[c]:>14,.0f}" if c in speeds else f"{'':>14}" for c in columns))
    for name, ratio in results["ratios"].items():
        print(f"{name:<34}{ratio:>6.2f}")


if __name__ == "__main__":
    main()
