"""How well the loader mixes real activations: the design effect of batch means, beside other orders of the same rows.

    python benchmarks/bench_shuffle.py STORE [--batch-rows N] [--seeds N] [--json]

The design effect of an order: the variance over batches of the batch mean of a dimension, divided by what independent
draws give (the dimension's variance over the number of rows in a batch), averaged over dimensions. 1.0 is as good as
independent draws; at 2.0 a batch is worth half its rows. Vectors are standardised as the autoencoder does (each by its
own mean and deviation), then each dimension over all rows. All batches of an epoch count but a short last one, and
the variance over them is the unbiased one, so that drawing without replacement gives 1.0 too. Numbers are means over
shuffles of several seeds, with the standard error of that mean (lower is better, 1.0 the best).

Orders: as stored (token by token, all layers of each; one order, so that there is no error); all rows at random, the
best there is; blocks of a chunk's tokens at all layers, mixed in windows; and the loader's own, blocks of one layer,
mixed in the same windows. A window that holds the whole store mixes it fully in either way, so smaller windows are
shown too: what counts for a big store is the window's size.
What it does not do: read through the loader (tests/store/test_loader.py shows that it serves rows in this order).

Shapes: K kept tokens, L layers, d dimensions looked at; rows are (token, layer) pairs, n = K * L of them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from residscope.console import human_bytes
from store.activations import ActivationStore
from store.loader import DEFAULT_WINDOW_BYTES
from store.shuffle import RowOrder, chunk_row_counts
from train.config import DataConfig

EPSILON = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description="Design effect of batch means by the order of rows.")
    parser.add_argument("store", type=Path, help="store of real activations")
    parser.add_argument("--batch-rows", type=int, default=DataConfig.batch_size, help="rows in a batch (train's own)")
    parser.add_argument("--dimensions", type=int, default=64, help="dimensions to look at, evenly spread")
    parser.add_argument("--seeds", type=int, default=5, help="shuffles to average over")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    options = parser.parse_args()
    store = ActivationStore.open(options.store)
    meta = store.meta
    mask = store.tokens.keep
    rows = standardised_rows(store, options.dimensions)
    block_bytes = meta.chunk_tokens * meta.d_model * meta.itemsize
    needed = int(mask.sum()) * meta.bytes_per_token
    print(
        f"{options.store}: {len(rows):,} rows of {meta.n_layers} layers ({human_bytes(needed)}), "
        f"{meta.chunk_tokens} tokens in a chunk, batches of {options.batch_rows} rows"
    )
    found = {"unshuffled": (design_effect(rows, np.arange(len(rows)), options.batch_rows), 0.0)}
    print(f"{'as stored':<60}{found['unshuffled'][0]:>8.3f}")

    def show(name: str, key: str, order: Callable[[int], np.ndarray]) -> None:
        effects = [design_effect(rows, order(seed), options.batch_rows) for seed in range(options.seeds)]
        error = np.std(effects, ddof=1) / np.sqrt(options.seeds) if options.seeds > 1 else np.nan
        found[key] = float(np.mean(effects)), float(error)
        print(f"{name:<60}{found[key][0]:>8.3f} +- {error:.3f}", flush=True)

    show("all rows at random", "independent", lambda seed: np.random.default_rng(seed).permutation(len(rows)))
    default = int(DataConfig.window_gb * 1e9 / 2)
    for window in (default, DEFAULT_WINDOW_BYTES, 64 << 20, 16 << 20):
        shapes = mask, meta.n_layers, meta.chunk_tokens, max(window // block_bytes, 1)
        name = human_bytes(window) + (", the default of train" if window == default else "")
        name = f"window {name}{' (all of it)' if window >= needed else ''}"
        show(f"{name}, all layers", f"all_layer_blocks_{window}", lambda seed, at=shapes: all_layer_order(*at, seed))
        show(f"{name}, one layer (ours)", f"loader_{window}", lambda seed, at=shapes: loader_order(*at, seed))
    if options.json:
        numbers = {key: {"mean": round(mean, 4), "error": round(error, 4)} for key, (mean, error) in found.items()}
        print(json.dumps({"default_window": default, "batch_rows": options.batch_rows, **numbers}))


def standardised_rows(store: ActivationStore, n_dimensions: int) -> np.ndarray:
    """Rows of the kept tokens at some dimensions, float32 [n, d], each dimension of mean 0 and variance 1."""
    chosen = np.linspace(0, store.meta.d_model - 1, min(n_dimensions, store.meta.d_model)).astype(int)
    parts = []
    for shard in range(store.meta.n_shards):
        tokens = slice(*store.meta.shard_bounds(shard))
        x = store.read(tokens)[store.tokens.keep[tokens]]
        mean, deviation = x.mean(axis=2, keepdims=True), x.std(axis=2, ddof=1, keepdims=True)
        parts.append((x[:, :, chosen] - mean) / (deviation + EPSILON))
    rows = np.concatenate(parts).reshape(-1, len(chosen))
    rows -= rows.mean(axis=0, dtype=np.float64)
    rows /= rows.std(axis=0, ddof=1)
    return rows


def design_effect(rows: np.ndarray, order: np.ndarray, batch_rows: int) -> float:
    """Of serving `rows` [n, d], of mean 0 and variance 1, in `order` (int64 [n]) in batches."""
    n_batches = len(order) // batch_rows
    batches = order[: n_batches * batch_rows].reshape(n_batches, batch_rows)
    means = np.stack([rows[batch].mean(axis=0, dtype=np.float64) for batch in batches])
    return float(means.var(axis=0, ddof=1).mean() * batch_rows)


def loader_order(mask: np.ndarray, n_layers: int, chunk_tokens: int, blocks: int, seed: int) -> np.ndarray:
    """The rows in the order in which the loader serves them: int64 [n]."""
    served = RowOrder(
        chunk_rows=chunk_row_counts(mask, chunk_tokens),
        layers=tuple(range(n_layers)),
        blocks_per_window=blocks,
        seed=seed,
    )
    place = row_places(mask, chunk_tokens)
    epoch = served.epoch(0)
    order = []
    for window in range(len(epoch.row_ends)):
        chunk, layer = epoch.window(window)
        token = place[chunk]  # [W, C]
        rows = (token * n_layers + layer[:, None])[token >= 0]
        order.append(served.shuffled(rows, 0, window))
    return np.concatenate(order)


def all_layer_order(mask: np.ndarray, n_layers: int, chunk_tokens: int, blocks: int, seed: int) -> np.ndarray:
    """As `loader_order`, for blocks that hold all layers of a chunk's tokens; a window has as many rows."""
    rng = np.random.default_rng(seed)
    place = row_places(mask, chunk_tokens)

    def windows() -> Iterator[np.ndarray]:
        chunks = rng.permutation(len(place))
        per_window = max(blocks // n_layers, 1)
        for start in range(0, len(chunks), per_window):
            token = place[chunks[start : start + per_window]]
            yield rng.permutation((token[token >= 0][:, None] * n_layers + np.arange(n_layers)).reshape(-1))

    return np.concatenate(list(windows()))


def row_places(mask: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """Which of the kept tokens each token is, by chunk, -1 for one that is not kept: int64 [chunks, C]."""
    place = np.full(-(-len(mask) // chunk_tokens) * chunk_tokens, -1)
    place[np.flatnonzero(mask)] = np.arange(mask.sum())
    return place.reshape(-1, chunk_tokens)


if __name__ == "__main__":
    main()
