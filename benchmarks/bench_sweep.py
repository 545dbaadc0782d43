"""A sweep of six in one pass against the six runs one after another, and against one run where reading is slow.

Six runs (k times lr) of one store: alone, one after another; then all in one pass. The same again with a reader that
gives a fixed number of bytes a second, as a slow disk or an object store does: there the sweep should take about as
long as a single run. Every file is checked to be the same, byte for byte, both ways, and bytes read are counted.

    python benchmarks/bench_sweep.py [--tokens 6000] [--throttle-mb 12] [--json]
"""

import argparse
import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from residscope.options import from_flat, with_values
from store.activations import ActivationStore
from store.arrays import TokenTable
from store.meta import StoreMeta, chunk_and_shard_tokens
from train.config import TrainConfig
from train.run import train, train_all

N_LAYERS, D_MODEL = 8, 256
SWEEP = ("k=8,16,32", "lr=0.001,0.003")


@dataclass
class Reader:
    """Counts the bytes that are read from stores, and lets `limit` of them a second through (None: any number)."""

    limit: float | None = None
    total: int = 0

    def install(self) -> None:
        """Put itself between the loader and the store."""
        original: Callable[..., Any] = ActivationStore.read_blocks
        lock = threading.Lock()

        def read_blocks(store: ActivationStore, chunk: Any, layer: Any, out: np.ndarray, threads: int) -> None:
            began = time.perf_counter()
            original(store, chunk, layer, out, threads)
            with lock:
                self.total += out.nbytes
                if self.limit is not None:
                    time.sleep(max(0.0, out.nbytes / self.limit - (time.perf_counter() - began)))

        ActivationStore.read_blocks = read_blocks  # type: ignore[method-assign]


def make_store(path: Path, n_tokens: int) -> None:
    """Random activations with a mean and a scale for each layer, in documents of 64 tokens."""
    chunk, shard = chunk_and_shard_tokens(n_tokens, N_LAYERS, D_MODEL, 2)
    meta = StoreMeta(
        n_tokens=n_tokens,
        d_model=D_MODEL,
        stored_dtype="bfloat16",
        chunk_tokens=chunk,
        shard_tokens=shard,
        layers=tuple(range(N_LAYERS)),
        n_model_layers=N_LAYERS,
        context_length=64,
        provenance={"model": "random"},
        config_hash="0" * 32,
    )
    index = np.arange(n_tokens, dtype=np.int32)
    keep = index % 64 != 0
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(512, D_MODEL)).astype(np.float32)
    with ActivationStore.create(path, meta, TokenTable(index % 251, index // 64, index % 64, keep)) as store:
        for i in range(meta.n_shards):
            start, stop = meta.shard_bounds(i)
            codes = rng.exponential(size=(stop - start, N_LAYERS, 512)) * (
                rng.random((stop - start, N_LAYERS, 512)) < 0.03
            )
            rows = codes.astype(np.float32) @ basis * 2.0 ** np.arange(N_LAYERS)[:, None]
            store.write_shard(i, rows.astype(np.float32), keep[start:stop])
        store.finalize()


def measure(config: TrainConfig, reader: Reader, singles: bool) -> dict[str, float]:
    """Times and bytes of the sweep and of a single run, or of all six one after another; checks that files agree."""
    began, reader.total = time.perf_counter(), 0
    swept = train_all(with_values(config, sweep=SWEEP, out=config.out.with_name("swept.pt"), overwrite=True))
    together, bytes_together = time.perf_counter() - began, reader.total
    alone, bytes_alone, same = [], [], True
    for result in swept if singles else swept[:1]:
        began, reader.total = time.perf_counter(), 0
        train(with_values(config, overwrite=True, **result.spec.settings))
        alone.append(time.perf_counter() - began)
        bytes_alone.append(reader.total)
        same &= config.out.read_bytes() == result.checkpoint.read_bytes()
    assert same, "a sweep's checkpoint differs from that of the single run"
    return {
        "runs": len(swept),
        "sweep_s": together,
        "single_s": sum(alone) / len(alone),
        "one_after_another_s": sum(alone) if singles else math.nan,
        "sweep_bytes": bytes_together,
        "single_bytes": bytes_alone[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--throttle-mb", type=float, default=0.0, help="MB/s of the slow reader; 0: an eighth of need")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_store(root / "acts.zarr", options.tokens)
        reader = Reader()
        reader.install()
        flags = {
            "store": root / "acts.zarr",
            "out": root / "ckpt.pt",
            "n_latents": options.latents,
            "batch_size": 1024,
            "threads": options.threads,
            "window_gb": 0.004,
            "validate_every": 0,
            "checkpoint_every": 0,
        }
        config = from_flat(TrainConfig, flags)
        train(with_values(config, steps=3))  # compiles the kernels
        fast = measure(with_values(config, overwrite=True), reader, singles=True)
        # Slow enough that reading takes about eight times as long as one run's computing.
        limit = options.throttle_mb * 1e6 or fast["single_bytes"] / (8 * fast["single_s"])
        reader.limit = limit
        slow = measure(with_values(config, overwrite=True), reader, singles=False)
    result = {
        "sweep_over_one_after_another": fast["sweep_s"] / fast["one_after_another_s"],
        "throttled_sweep_over_single": slow["sweep_s"] / slow["single_s"],
        "bytes_over_single": fast["sweep_bytes"] / fast["single_bytes"],
        "throttle_mb_per_s": limit / 1e6,
        "fast": fast,
        "slow": {name: value for name, value in slow.items() if not math.isnan(value)},
    }
    print(
        f"{fast['runs']:.0f} runs of {options.latents} latents, {options.tokens} tokens x {N_LAYERS} layers x {D_MODEL}"
    )
    print("reader      sweep, s   single, s   six in turn, s   bytes read: sweep / single")
    for label, row in (("warm", fast), (f"{limit / 1e6:.1f} MB/s", slow)):
        turn = "-" if math.isnan(row["one_after_another_s"]) else f"{row['one_after_another_s']:.1f}"
        ratio = row["sweep_bytes"] / row["single_bytes"]
        print(f"{label:<10} {row['sweep_s']:9.1f} {row['single_s']:11.1f} {turn:>16} {ratio:18.2f}")
    print("checkpoints of the sweep and of the single runs: the same bytes")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
