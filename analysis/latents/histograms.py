"""How large a latent's activations are, by layer: counts in fixed bins, half an octave wide.

Bin b holds activations from 2^(-5 + b / 2) up to the next bin's; the first holds all smaller and the last all larger
ones too. Bins are the same for all latents, layers and runs, so counts add over tokens and histograms of runs can be
laid over each other. Activations are those of standardised vectors, so that their size is about that of a coordinate of
a vector of length sqrt(d_model). Not here: which tokens they are at (`analysis.latents.examples`).

Shapes: M n_latents, L layers, B bins.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.loops import compiled

LOWEST = -5
"""Base-2 logarithm of the first bin's lower edge."""

N_BINS = 24

EDGES: tuple[float, ...] = tuple(2.0 ** (LOWEST + b / 2) for b in range(N_BINS + 1))
"""Of the bins; the first is open below and the last above."""

COLUMNS = pa.schema([("latent", pa.int64()), ("layer", pa.int64()), ("counts", pa.list_(pa.int64(), N_BINS))])
"""histograms.parquet: a row for each latent and layer at which it fired, sorted; layer as the model counts."""


def no_counts(n_latents: int, n_layers: int) -> NDArray[np.uint32]:
    """[M, L, B] zeros."""
    return np.zeros((n_latents, n_layers, N_BINS), np.uint32)


def add_counts(counts: NDArray[np.uint32], values: NDArray[np.floating], indices: NDArray[np.int64]) -> None:
    """Count the positive activations of tokens, in place: values [T, L, k], indices [T, L, k]."""
    _add_histogram(np.ascontiguousarray(values), np.ascontiguousarray(indices), LOWEST, counts)


def write_histograms(path: Path, counts: NDArray[np.uint32], layer_numbers: Sequence[int]) -> None:
    """Write histograms.parquet; `layer_numbers` [L] are the model's block indices. The edges are in the metadata."""
    latent, layer = np.nonzero(counts.any(axis=2))
    rows = pa.FixedSizeListArray.from_arrays(pa.array(counts[latent, layer].astype(np.int64).ravel()), N_BINS)
    columns = [pa.array(latent), pa.array(np.asarray(layer_numbers, np.int64)[layer]), rows]
    table = pa.table(dict(zip(COLUMNS.names, columns, strict=True)), schema=COLUMNS)
    pq.write_table(table.replace_schema_metadata({"edges": repr(list(EDGES))}), path, compression="zstd")


@compiled()
def _add_histogram(values, indices, lowest, counts):
    """Count the positive activations of T tokens by size.

    values [T, L, k], indices int64 [T, L, k]. Added to in place: counts uint32 [M, L, B]; bin b holds activations from
    2^(lowest + b / 2) up to the next bin's, the first bin all smaller and the last all larger ones too.
    """
    n_tokens, n_layers, k = values.shape
    last = counts.shape[2] - 1
    for t in range(n_tokens):
        for layer in range(n_layers):
            for i in range(k):
                value = np.float64(values[t, layer, i])
                if value > 0:
                    mantissa, exponent = math.frexp(value)  # value = mantissa * 2^exponent, 0.5 <= mantissa < 1
                    upper = 1 if mantissa * mantissa >= 0.5 else 0
                    place = min(max(2 * (exponent - 1 - lowest) + upper, 0), last)
                    counts[indices[t, layer, i], layer, place] += np.uint32(1)
