"""Stores at a URL, on a real S3 server (SeaweedFS) on this machine: the same results as on a disk, killed clients, a
server that stops, and how fast the loader is beside plain parallel requests.

    python benchmarks/bench_urls.py [--kills 20] [--parts same,kills,stops,speed]

Prints a table, and exits with 1 where a promise of docs/promises.md fails. Commands run in processes forked from this
one, which has imported everything, so that a kill falls into the work. Shards are made small (2 MiB) where clients are
killed, so that there are many uploads to be killed in.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch loads; a forked process must not need its parent's threads
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import analysis.run  # noqa: E402, F401
import harvest.run  # noqa: E402, F401
import store.meta  # noqa: E402
import train.run  # noqa: E402, F401
from residscope.cli import main  # noqa: E402
from tests.support.models import tiny_tokenizer  # noqa: E402
from tests.support.s3 import Server  # noqa: E402

FORK = multiprocessing.get_context("fork")
SHARD_BYTES = 2 << 20
BUCKET = "s3://data"
rows: list[tuple[str, str, bool]] = []


def note(what: str, found: str, kept: bool = True) -> None:
    rows.append((what, found, kept))
    print(f"{'ok  ' if kept else 'FAIL'} {what}: {found}", flush=True)


def start(log: Path, *words: str) -> Any:
    """A command in a process of its own."""

    def run() -> None:
        with log.open("ab", buffering=0) as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        store.meta._SHARD_BYTES = SHARD_BYTES
        torch.set_num_threads(1)
        sys.exit(main(words))

    process = FORK.Process(target=run)
    process.start()
    return process


def finish(log: Path, *words: str) -> None:
    process = start(log, *words)
    process.join()
    if process.exitcode:
        sys.exit(f"{' '.join(words)}: exit code {process.exitcode}: {log.read_text()[-2000:]}")


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives, called in a forked process, so that this one never talks to the server."""
    queue = FORK.SimpleQueue()

    def call() -> None:
        try:
            queue.put(function(*arguments))
        except BaseException as error:
            queue.put(error)

    process = FORK.Process(target=call)
    process.start()
    found = queue.get()
    process.join()
    if isinstance(found, BaseException):
        raise found
    return found


def facts(place: str) -> tuple[str, list[str]]:
    """Content hash of a store, and what is wrong with the shards that it lists."""
    from store.activations import ActivationStore
    from store.care.verify import verify

    bad = [found.reason for found in verify(place)]
    return ActivationStore.open(place, partial=True).content_hash, [why for why in bad if "no line for it" not in why]


def is_there(place: str) -> bool:
    from residscope.urls import as_path
    from store.folder import is_store

    return is_store(as_path(place))


def make_inputs(folder: Path) -> list[str]:
    """A random model of 48 KB a token... and a text; the flags of `harvest` for them."""
    config = transformers.GPTNeoXConfig(
        vocab_size=260, hidden_size=256, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=257, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    tiny_tokenizer(bos=False).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    lines = ["".join(map(chr, rng.integers(97, 123, 500))) for _ in range(100)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return [
        *("harvest", "--model", str(folder / "model"), "--dataset", str(folder / "text.jsonl"), "--device", "cpu"),
        *("--max-tokens", "40000", "--context-length", "128", "--dtype", "float32"),
    ]


TRAIN = ["train", "--n-latents=512", "--k=8", "--batch-size=1024", "--device=cpu", "--seed=1", "--window-gb=0.01"]
TRAIN += ["--epochs=3", "--resume"]


def same(folder: Path, harvest_words: list[str]) -> tuple[str, bytes]:
    """The three commands on a disk and at a URL."""
    log, found = folder / "same.log", {}
    for kind, place in (("disk", str(folder / "acts.zarr")), ("url", f"{BUCKET}/acts.zarr")):
        out = folder / kind
        out.mkdir()
        finish(log, *harvest_words, "--out", place)
        finish(log, *TRAIN, "--store", place, "--out", str(out / "ckpt.pt"))
        finish(log, "analyze", "--store", place, "--sae", str(out / "ckpt.pt"), "--out", str(out / "analysis"))
        summary = json.loads((out / "analysis" / "summary.json").read_text())["content_hash"]
        found[kind] = in_child(facts, place), (out / "ckpt.pt").read_bytes(), summary
    note("content hash, disk and URL", found["url"][0][0], found["disk"][0] == found["url"][0])
    note("bits of ckpt.pt", f"{len(found['url'][1]):,} bytes", found["disk"][1] == found["url"][1])
    note("content_hash of summary.json", found["url"][2], found["disk"][2] == found["url"][2])
    return found["disk"][0][0], found["disk"][1]


def kills(folder: Path, harvest_words: list[str], expected: str, n: int) -> None:
    """kill -9 of harvest at random moments, again and again until it has been killed n times."""
    random.seed(0)
    killed, rounds, bad, log = 0, 0, 0, folder / "kills.log"
    stages = {"before the store": 0, "filling": 0}
    while killed < n:
        place = f"{BUCKET}/kills{rounds}.zarr"
        rounds += 1
        while killed < n:
            process = start(log, *harvest_words, "--out", place)
            process.join(random.uniform(0.5, 6))
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
            there = in_child(is_there, place)
            stages["filling" if there else "before the store"] += 1
            bad += bool(there and in_child(facts, place)[1])
        finish(log, *harvest_words, "--out", place)
        hash_, wrong = in_child(facts, place)
        bad += bool(wrong) or hash_ != expected
    note(f"harvest killed {killed} times in {rounds} stores", f"{stages}, {bad} with wrong content", not bad)


def stops(folder: Path, server: Server, harvest_words: list[str], expected: str, weights: bytes) -> None:
    """The server stopped for ten seconds, as a process that hangs and as one that is gone, in harvest and in train."""
    log = folder / "stops.log"

    def gone() -> None:
        server.close()
        time.sleep(10)
        server.start()

    for name, stop in (("hangs", lambda: server.pause(10)), ("is gone", gone)):
        out = folder / f"stops {name}"
        out.mkdir()
        place = f"{BUCKET}/stops-{name.replace(' ', '-')}.zarr"
        for what, words, wait in (
            ("harvest", [*harvest_words, "--out", place], 4.0),
            ("train", [*TRAIN, "--store", f"{BUCKET}/acts.zarr", "--out", str(out / "ckpt.pt")], 2.0),
        ):
            process = start(log, *words)
            time.sleep(wait)
            running = process.is_alive()
            stop()
            process.join()
            right = not process.exitcode and running
            if right and what == "harvest":
                right = in_child(facts, place) == (expected, [])
            elif right:
                right = (out / "ckpt.pt").read_bytes() == weights
            note(f"server {name} for 10 s during {what}", "the same result" if right else log.read_text()[-500:], right)


def speed(megabytes: int) -> tuple[float, ...]:
    """GB/s: plain requests of 8 MiB (before and after), of one inner chunk by 32 threads, and of 8 MiB whose bytes stay
    in memory; the loader's first and second epoch by chunks, and with all shards held in memory."""
    from residscope.urls import as_path
    from store.activations import ActivationStore
    from store.loader import WindowLoader
    from store.remote.held import hold
    from tests.support.stores import make_meta, token_table

    place = as_path(f"{BUCKET}/speed.zarr")
    n_layers, d_model = 12, 512
    meta = make_meta(megabytes * 2**20 // (n_layers * d_model * 2), n_layers, d_model)
    rng = np.random.default_rng(0)
    with ActivationStore.create(place, meta, token_table(meta.n_tokens)) as writer:
        for shard in range(meta.n_shards):
            begin, end = meta.shard_bounds(shard)
            writer.write_shard(shard, rng.standard_normal((end - begin, n_layers, d_model), np.float32))
        writer.finalize()
    reader = ActivationStore.open(place)
    sizes = {place / f"resid_post/c.{shard}.0.0": reader.record(shard).bytes for shard in range(meta.n_shards)}
    n_bytes = sum(sizes.values())
    block = meta.chunk_tokens * d_model * 2 + 4

    def get(piece: tuple[Any, int, int]) -> int:
        return len(piece[0].get(*piece[1:]).data)

    def kept() -> float:
        began, memory = time.perf_counter(), {url: np.empty(size, np.uint8) for url, size in sizes.items()}

        def keep(piece: tuple[Any, int, int]) -> None:
            url, start, stop = piece
            memory[url][start:stop] = np.frombuffer(url.get(start, stop).data, np.uint8)

        with ThreadPoolExecutor(32) as pool:
            list(pool.map(keep, pieces_of(8 << 20)))
        return n_bytes / (time.perf_counter() - began) / 1e9

    def pieces_of(step: int) -> list[tuple[Any, int, int]]:
        return [(url, i, min(i + step, size)) for url, size in sizes.items() for i in range(0, size, step)]

    def plain(step: int, order: bool) -> float:
        pieces = pieces_of(step)
        chosen = rng.permutation(len(pieces)) if order else range(len(pieces))
        began = time.perf_counter()
        with ThreadPoolExecutor(32) as pool:
            assert sum(pool.map(get, [pieces[i] for i in chosen])) == n_bytes
        return n_bytes / (time.perf_counter() - began) / 1e9

    long, before = plain(8 << 20, False), plain(block, True)

    def epochs(reader: ActivationStore) -> list[float]:
        mask, window = np.ones(meta.n_tokens, bool), 128 << 20
        loader = WindowLoader(reader, mask, 16384, 0, window, epochs=2)
        times, served = [time.perf_counter()], 0
        for batch in loader:
            served += len(batch.rows)
            if served * 2 >= loader.n_rows * len(times):
                times.append(time.perf_counter())
        return [n_bytes / seconds / 1e9 for seconds in np.diff(times)]

    by_chunks = epochs(reader)
    # The first use of memory costs a virtual machine more than the requests: once to warm up, in both.
    keeping, held = 0.0, [0.0]
    for _ in range(2):
        keeping, holding = kept(), ActivationStore.open(place)
        hold(holding, n_bytes)
        held = epochs(holding)
        del holding
    # Other work on the machine comes and goes: before and after.
    long, before = (long + plain(8 << 20, False)) / 2, (before + plain(block, True)) / 2
    return long, before, (keeping + kept()) / 2, *by_chunks, *held


def run(arguments: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench_urls"))
    server = Server(folder)
    os.environ.update(server.environment)
    parts = arguments.parts.split(",")
    try:
        if {"same", "kills", "stops"} & {*parts}:
            words = make_inputs(folder)
            expected, weights = same(folder, words)
            if "kills" in parts:
                kills(folder, words, expected, arguments.kills)
            if "stops" in parts:
                stops(folder, server, words, expected, weights)
        if "speed" in parts:
            long, short, keeping, *found = in_child(speed, arguments.megabytes)
            note("plain requests of 8 MiB, 32 at once", f"{long:.2f} GB/s")
            note("plain requests of one inner chunk, at random, 32 at once", f"{short:.2f} GB/s")
            note("plain requests of 8 MiB whose bytes stay in memory", f"{keeping:.2f} GB/s")
            for i, rate in enumerate(found):
                words = f"{rate:.2f} GB/s, {rate / short:.2f} of plain ones of its size, {rate / long:.2f} of long ones"
                words += f", {rate / keeping:.2f} of long ones whose bytes stay"
                which = f"{('first', 'second')[i % 2]} epoch{', shards held in memory' if i > 1 else ''}"
                note(f"loader, {which}", words, rate >= 0.7 * (keeping if i > 1 else short))
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)
    print("\n| what | found | kept |\n|---|---|---|\n" + "\n".join(f"| {a} | {b} | {c} |" for a, b, c in rows))
    sys.exit(not all(kept for _, _, kept in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parts", default="same,kills,stops,speed")
    parser.add_argument("--megabytes", type=int, default=768, help="of the store that speed is measured on")
    run(parser.parse_args())
