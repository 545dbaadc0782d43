"""What a store of 1e9 tokens of pythia-1b (16 layers, d_model 2,048: 65.5 TB) asks of memory and time, without data.

    python benchmarks/bench_scale.py [--json] [--tokens N]

Each part runs in a process of its own, on made-up metadata. Columns that have one number a token are made for a share
of the tokens, and their memory, which is in proportion, is given for all. Peaks are above what the process held when
the part began. Exit code 1 where a part is above its limit: the limits are what this code took, and a quarter more.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from analysis.config import TokenOptions
from analysis.selection import select
from harvest.table import pack
from harvest.text.packing import Packing
from store.arrays import TokenTable
from store.manifest import FILE, FOLDER, ShardRecord, read_manifest, sealed, write_header
from store.meta import StoreMeta, chunk_and_shard_tokens
from store.shuffle import RowOrder, chunk_row_counts

N_LAYERS, D_MODEL = 16, 2048
DOCUMENT_TOKENS, CONTEXT = 800, 2048
SHARE = 50
"""Columns are made for this part of the tokens."""

N_LATENTS = 131_072

LIMITS = {"pack": 32e9, "manifest": 0.5e9, "plan": 0.6e9, "split": 5e9, "selection": 10e9}
"""Bytes at 1e9 tokens."""


def meta_of(n_tokens: int) -> StoreMeta:
    """The store."""
    chunk, shard = chunk_and_shard_tokens(n_tokens, N_LAYERS, D_MODEL, 2)
    return StoreMeta(
        n_tokens=n_tokens,
        layers=tuple(range(N_LAYERS)),
        n_model_layers=N_LAYERS,
        d_model=D_MODEL,
        chunk_tokens=chunk,
        shard_tokens=shard,
        context_length=CONTEXT,
        config_hash="0" * 32,
    )


def table_of(n_tokens: int) -> TokenTable:
    """A table of made-up tokens."""
    document = np.arange(n_tokens, dtype=np.int32) // DOCUMENT_TOKENS
    position = np.arange(n_tokens, dtype=np.int32) % CONTEXT
    return TokenTable(position, document, position, position > 0)


def packing(n_tokens: int) -> Callable[[], object]:
    """harvest: documents to a token table."""
    rng = np.random.default_rng(0)
    text = rng.integers(2, 50_000, 2 * DOCUMENT_TOKENS, dtype=np.int32)
    how = Packing("|", (1,), (), (1,), CONTEXT, keep_first_position=False)
    n_documents = 2 * n_tokens // DOCUMENT_TOKENS
    return lambda: pack((text[: 1 + i % len(text)].copy() for i in range(n_documents)), how, n_tokens)


def manifest(n_tokens: int) -> Callable[[], object]:
    """Opening: the manifest's lines."""
    meta = meta_of(n_tokens)
    folder = Path(tempfile.mkdtemp(prefix="bench-scale-"))
    (folder / FOLDER).mkdir()
    write_header(folder, meta.config_hash, {"token_id/c.0": "0" * 32})
    norms = np.random.default_rng(0).random(N_LAYERS).tolist()
    with (folder / FILE).open("ab") as file:
        for shard in range(meta.n_shards):
            record = ShardRecord(shard, meta.shard_tokens, 0, 2**30, "0" * 32, "0" * 32, norms, meta.config_hash)
            file.write(sealed(record._asdict()))
    return lambda: read_manifest(folder)


def plan(n_tokens: int) -> Callable[[], object]:
    """train: where a resumed run goes on in its second epoch."""
    meta = meta_of(n_tokens)
    mask = np.ones(meta.chunk_tokens * 1000, bool)
    mask[::CONTEXT] = False
    rows = np.resize(chunk_row_counts(mask, meta.chunk_tokens), meta.n_chunks)

    def run() -> object:
        order = RowOrder(chunk_rows=rows, layers=tuple(range(N_LAYERS)), blocks_per_window=511, seed=0)
        found = order.locate(int(order.row_ends[-1]) * 3 // 2)
        return found.blocks.window(found.window)

    return run


def split(n_tokens: int) -> Callable[[], object]:
    """train: which tokens are held out."""
    tokens = table_of(n_tokens)
    held_out = np.zeros(int(tokens.document[-1]) + 1, bool)
    held_out[::100] = True

    def run() -> object:
        of_token = held_out[tokens.document]
        return tokens.keep & ~of_token, tokens.keep & of_token

    return run


def selection(n_tokens: int) -> Callable[[], object]:
    """analyze: which tokens are analysed, in which group."""
    tokens = table_of(n_tokens)
    held_out = np.zeros(int(tokens.document[-1]) + 1, bool)
    held_out[::100] = True
    return lambda: select(tokens, held_out, TokenOptions(), N_LATENTS)


PARTS: dict[str, tuple[Callable[[int], Callable[[], object]], int]] = {
    "pack": (packing, SHARE),
    "manifest": (manifest, 1),
    "plan": (plan, 1),
    "split": (split, SHARE),
    "selection": (selection, SHARE),
}


def measure(name: str, n_tokens: int) -> None:
    """Run one part; its seconds and the bytes that it took, for all tokens, as a line of JSON."""
    make, share = PARTS[name]
    part = make(n_tokens // share)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    began = time.perf_counter()
    kept = part()
    seconds = time.perf_counter() - began
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    del kept
    print(json.dumps({"seconds": seconds * share, "bytes": (peak - held) * share}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of a store of many tokens, without its data.")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--tokens", type=float, default=1e9, help="tokens of the store (default: 1e9)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    n_tokens = int(args.tokens)
    if args.part:
        measure(args.part, n_tokens)
        return
    meta = meta_of(n_tokens)
    moments = meta.n_shards * 2 * 8 * N_LAYERS * D_MODEL / (n_tokens * meta.bytes_per_token)
    print(
        f"{n_tokens:,} tokens: {n_tokens * meta.bytes_per_token / 1e12:.1f} TB in {meta.n_shards:,} shards of ", end=""
    )
    print(f"{meta.shard_tokens:,} tokens; moments are {moments:.3%} of that")
    print(f"{'part':<10}  {'seconds':>8}  {'peak GB':>8}  {'B/token':>8}  what")
    found, failed = {}, []
    for name, (make, _) in PARTS.items():
        command = [sys.executable, __file__, "--part", name, "--tokens", str(n_tokens)]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, env=dict(os.environ)).stdout)
        seconds, taken = found[name]["seconds"], found[name]["bytes"]
        print(f"{name:<10}  {seconds:8.1f}  {taken / 1e9:8.2f}  {taken / n_tokens:8.2f}  {make.__doc__}")
        if taken > LIMITS[name] * n_tokens / 1e9:
            failed.append(f"{name} takes {taken / 1e9:.2f} GB, the limit is {LIMITS[name] * n_tokens / 1e9 / 1e9:.2f}")
    if args.json:
        print(json.dumps({"tokens": n_tokens, "parts": found}))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
