"""Ranges of objects on a real S3 server (SeaweedFS) on this machine by obstore, which `residscope.urls` uses, and by
s3fs, the S3 client of fsspec: GB/s (higher is better), and seconds of processor per GB (lower is better).

    python -m pip install s3fs
    python benchmarks/bench_object_libraries.py [--megabytes 512] [--rounds 3]

Both get the same ranges of the same objects, 32 requests at once: obstore from 32 threads, as the loader does, s3fs by
its own event loop (`cat_ranges`), which is its fastest. The order of the two changes from round to round; the last
columns are medians of the rounds' ratios. Nothing is promised.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from residscope.urls import URL, as_path
from tests.support.s3 import Server

N_OBJECTS, AT_ONCE = 8, 32
SIZES = {"long, 8 MiB": 8 << 20, "an inner chunk, 512 KiB": 512 << 10, "64 KiB": 64 << 10}


def measured(get: Callable[[list[Any]], int], pieces: list[Any], n_bytes: int) -> tuple[float, float]:
    """GB/s, and seconds of processor per GB."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    assert get(pieces) == n_bytes
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return n_bytes / seconds / 1e9, spent / n_bytes * 1e9


def run(arguments: argparse.Namespace) -> None:
    import s3fs  # type: ignore[import-not-found]

    folder = Path(tempfile.mkdtemp(prefix="bench_object_libraries"))
    server = Server(folder)
    os.environ.update(server.environment)
    try:
        urls = [cast(URL, as_path(f"s3://data/object.{i}")) for i in range(N_OBJECTS)]
        size = arguments.megabytes * 2**20 // N_OBJECTS
        for i, url in enumerate(urls):
            url.put(np.random.default_rng(i).bytes(size))
        names = [str(url).removeprefix("s3://") for url in urls]
        client = s3fs.S3FileSystem(
            key=os.environ["AWS_ACCESS_KEY_ID"],
            secret=os.environ["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=server.url,
            config_kwargs={"max_pool_connections": AT_ONCE},
        )

        def by_obstore(pieces: list[Any]) -> int:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return sum(pool.map(lambda piece: len(urls[piece[0]].get(*piece[1:]).data), pieces))

        def by_s3fs(pieces: list[Any]) -> int:
            which, starts, stops = zip(*pieces, strict=True)
            found = client.cat_ranges([names[i] for i in which], [*starts], [*stops], batch_size=AT_ONCE)
            return sum(map(len, found))

        ways = {"obstore": by_obstore, "s3fs": by_s3fs}
        rng, n_bytes = np.random.default_rng(0), size * N_OBJECTS
        print("| requests | obstore GB/s | s3fs GB/s | ratio | obstore s/GB | s3fs s/GB | ratio |\n" + "|---" * 7 + "|")
        for label, step in SIZES.items():
            pieces = [(i, at, min(at + step, size)) for i in range(N_OBJECTS) for at in range(0, size, step)]
            pieces = [pieces[i] for i in rng.permutation(len(pieces))]
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for i in range(arguments.rounds + 1):  # The first one is not counted: connections are made.
                for name in [*ways][:: 1 if i % 2 else -1]:
                    found[name].append(measured(ways[name], pieces, n_bytes))
            (a, b), cells = ([*zip(*rows[1:], strict=True)] for rows in found.values()), []
            for ours, theirs in zip(a, b, strict=True):
                ratio = median(one / other for one, other in zip(ours, theirs, strict=True))
                cells += [f"{median(ours):.2f}", f"{median(theirs):.2f}", f"{ratio:.2f}"]
            print(f"| {label} | {' | '.join(cells)} |", flush=True)
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="of all objects together")
    parser.add_argument("--rounds", type=int, default=3)
    run(parser.parse_args())
