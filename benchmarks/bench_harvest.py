"""What a harvest costs beside the transformer's forward passes: tokens per second of both, in one run.

    python benchmarks/bench_harvest.py [--dtypes bfloat16 float32] [--tokens N] [--rounds N] [--json]

"forward" is the bare model over the same batches, nothing hooked and nothing kept. "harvest" is the whole of `harvest`
with the model in memory already: options, tokenizer, text, plan, forward passes, copies, rounding, statistics,
checksums, hashes, writing with its syncs, and the end. Both go by the clock and take turns, and a ratio is the median
over rounds of what ran side by side. "fill" is the part of the harvest from its first forward pass to its last write.

Peak memory is that of the process (resident, without the page cache): after forward passes alone, and after harvests.
`harvest_over_forward` is the first dtype's. Higher is better for all but memory. `--batch-sizes` asks instead how fast
the bare forward is at several batch sizes, which is where the default comes from.
What it does not do: load models against the clock, or measure how fast the disk could be (bench_store.py).
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import harvest.run
from harvest.config import HarvestConfig
from harvest.model.hub import quiet
from harvest.model.load import LoadedModel
from harvest.sequences import sequence_batches, token_ids
from harvest.settings import load_weights, resolve
from harvest.stored_values import host_bytes, n_writers
from harvest.table import make_table
from harvest.text.sources import open_sources
from residscope.cluster import n_cores
from residscope.console import human_bytes
from residscope.options import from_flat, with_values
from store.activations import ActivationStore
from store.arrays import TokenTable


class Round(NamedTuple):
    """Tokens per second of one round."""

    forward: float
    harvest: float
    fill: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of a whole harvest against the bare forward pass.")
    parser.add_argument("--model", default="smollm2-135m", help="as harvest's")
    parser.add_argument("--random-init", action="store_true", help="as harvest's")
    parser.add_argument("--dataset", default="pydoc", help="as harvest's")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="compute dtypes to measure")
    parser.add_argument("--device", default="auto", help="as harvest's")
    parser.add_argument("--context-length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--batch-size", type=int, help="sequences in a forward pass (default: harvest's)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="measure the bare forward at these and stop")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each dtype")
    parser.add_argument("--folder", type=Path, help="where to write stores (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    options = parser.parse_args()
    quiet()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-harvest-", dir=options.folder))
    found: dict[str, Any] = {}
    try:
        for dtype in options.dtypes:
            flags = {
                "model": options.model,
                "random_init": options.random_init,
                "dataset": options.dataset,
                "dtype": dtype,
                "device": options.device,
                "context_length": options.context_length,
                "batch_size": options.batch_size,
                "max_tokens": options.tokens,
                "out": folder / "acts.zarr",
                "overwrite": True,
            }
            config = from_flat(HarvestConfig, flags)
            if options.batch_sizes:
                batch_sizes(config, options.batch_sizes, options.rounds)
            else:
                found |= compare(config, options.rounds)
    finally:
        shutil.rmtree(folder)
    if options.json and found:
        print(json.dumps({"harvest_over_forward": found[f"harvest_over_forward_{options.dtypes[0]}"], **found}))


def compare(config: HarvestConfig, rounds: int) -> dict[str, float]:
    """Measure one dtype, print a line, and give its numbers for the JSON line."""
    settings = resolve(config)
    model = load_weights(settings)
    tokens = make_table(
        open_sources(config.text, known=settings.known_ids), settings.tokenizer, settings.packing, config.max_tokens
    )[0]
    batch_tokens = settings.batch_size * settings.packing.context_length
    forward(model, TokenTable(*(column[:batch_tokens] for column in tokens)), batch_tokens)  # Warm-up.
    after_forward = peak_bytes()
    results = []
    with mock.patch.object(harvest.run, "load_weights", return_value=model):
        harvest.run.harvest(with_values(config, max_tokens=batch_tokens))
        for _ in range(rounds):
            bare = forward(model, tokens, batch_tokens)
            began = time.perf_counter()
            made = harvest.run.harvest(config)
            whole = made.tokens / (time.perf_counter() - began)
            results.append(Round(bare, whole, made.tokens_per_second or 0.0))
    columns = Round(*np.array(results).T)
    print(
        f"{model.architecture}, {config.weights.dtype} on {settings.device}, {torch.get_num_threads()} threads,"
        f" {settings.batch_size} x {settings.packing.context_length} tokens a batch, {len(tokens.token_id):,} a round"
    )
    print(
        "  tokens/s, median (best):",
        *(f"{n} {np.median(c):,.0f} ({c.max():,.0f})" for n, c in columns._asdict().items()),
        sep="  ",
    )
    ratio = float(np.median(columns.harvest / columns.forward))
    fill = float(np.median(columns.fill / columns.forward))
    meta = ActivationStore.open(config.out).meta
    print(
        f"  harvest over forward {ratio:.3f}, fill over forward {fill:.3f}; peak memory {human_bytes(peak_bytes())},"
        f" after forward passes alone {human_bytes(after_forward)}; stated for activations at most"
        f" {human_bytes(host_bytes(meta, settings.batch_size, n_writers(settings.device, n_cores())))}"
    )
    name = config.weights.dtype
    return {
        f"harvest_over_forward_{name}": round(ratio, 3),
        f"fill_over_forward_{name}": round(fill, 3),
        f"forward_tokens_per_second_{name}": round(float(np.median(columns.forward)), 1),
        f"peak_bytes_{name}": peak_bytes(),
        f"peak_bytes_of_forward_{name}": after_forward,
    }


def batch_sizes(config: HarvestConfig, sizes: list[int], rounds: int) -> None:
    """Print how fast the bare forward is at several batch sizes, which take turns."""
    settings = resolve(config)
    model = load_weights(settings)
    length = settings.packing.context_length
    tokens = make_table(
        open_sources(config.text, known=settings.known_ids), settings.tokenizer, settings.packing, config.max_tokens
    )[0]
    speeds = np.array([[forward(model, tokens, length * size) for size in sizes] for _ in range(rounds + 1)])[1:]
    dtype = config.weights.dtype
    print(f"{model.architecture}, {dtype} on {settings.device}: tokens/s of the forward pass, median (best)")
    for size, column in zip(sizes, speeds.T, strict=True):
        print(f"  {size:>4} x {length} = {size * length:>6} tokens  {np.median(column):>8,.0f} ({column.max():,.0f})")


@torch.inference_mode()
def forward(model: LoadedModel, tokens: TokenTable, batch_tokens: int) -> float:
    """Tokens per second of the bare model over all batches of `tokens`."""
    began = time.perf_counter()
    for batch in sequence_batches(tokens.position, batch_tokens):
        ids = torch.from_numpy(token_ids(tokens.token_id, batch))
        model.base(input_ids=ids.to(model.device), use_cache=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return len(tokens.token_id) / (time.perf_counter() - began)


def peak_bytes() -> int:
    """Most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
