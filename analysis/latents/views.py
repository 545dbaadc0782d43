"""What one wants to see of a latent: its maximally activating examples at each layer, others drawn at random, the
histogram of its activations, and whether its top contexts agree between layers.

How: one pass over the codes collects what these need, a second one reads the examples' windows. Text needs the
tokenizer of the store's model, which is looked for on this machine only; if it is not found, token ids are written, and
the reason is in summary.json.

Histograms have fixed bins, half an octave wide: bin b counts activations from 2^(-5 + b / 2) up to the next bin; the
first also counts all smaller ones and the last all larger ones. Bins are the same for all latents, layers and runs, so
counts add over tokens and the histograms of several runs can be compared. Activations are those of standardised
vectors, so they are about as large as a coordinate of a vector of length sqrt(d_model).

Shapes: M n_latents, L layers, B bins.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.inputs import Inputs, TaskSpec
from analysis.latents.contexts import agreement_summary, context_agreement, contexts_per_layer
from analysis.latents.examples import (
    REACH,
    Examples,
    TopExamples,
    contexts_of,
    examples_per_layer,
    windows_of,
    write_found,
)
from analysis.latents.sampled import SampledTokens
from analysis.latents.table import LatentTable
from analysis.latents.words import find_words
from analysis.loops import compiled
from analysis.model.transformer import spec_of_store
from analysis.results.folder import EXAMPLES, HISTOGRAMS, RANDOM_EXAMPLES
from analysis.results.tables import write_table
from analysis.selection import Selection
from analysis.task import codes_again
from harvest.model.load import load_tokenizer, refuse_exchanged
from residscope.errors import ResidscopeError

LOWEST = -5
"""Base-2 logarithm of the first bin's lower edge."""

N_BINS = 24

EDGES: tuple[float, ...] = tuple(2.0 ** (LOWEST + b / 2) for b in range(N_BINS + 1))
"""Edges of the bins; the first bin is open below and the last above."""

COLUMNS = pa.schema([("latent", pa.int64()), ("layer", pa.int64()), ("counts", pa.list_(pa.int64(), N_BINS))])
"""histograms.parquet: a row for each latent and layer at which it fired, sorted; layer: the model's block index."""


class LatentViews(NamedTuple):
    """What goes into other files than their own."""

    summary: dict[str, Any]
    """The key `examples` of summary.json."""
    columns: dict[str, pa.Array]
    """[M] each: columns of latents.parquet."""


def view_latents(
    spec: TaskSpec, inputs: Inputs, selection: Selection, table: LatentTable, model: str | None, folder: Path
) -> LatentViews:
    """Examine the latents on the analysed tokens and write the files. model: where it is, if the user said so."""
    tokens, codes, layer_numbers = inputs.store.tokens, partial(codes_again, spec), inputs.layer_numbers
    n_latents, n_layers = table.probs.shape
    n = examples_per_layer(n_latents, n_layers)
    top = TopExamples.zeros(n_latents, n_layers, n)
    strongest = TopExamples.zeros(n_latents, n_layers, contexts_per_layer(n_latents, n_layers))
    sample, counts = SampledTokens.zeros(n_latents), np.zeros((n_latents, n_layers, N_BINS), np.uint32)
    for tile in codes(selection.analysed):
        top.add(tile, tokens.document[tile.token])
        strongest.add(tile, tile.token)  # each token its own document: simply the most active
        sample.add(tile)
        add_counts(counts, tile.values, tile.indices)
    write_histograms(folder / HISTOGRAMS, counts, layer_numbers)
    tokenizer = reason = None
    try:
        place = spec_of_store(inputs.store, model, offline=True)
        loaded = load_tokenizer(place)
        refuse_exchanged(place)
        tokenizer = loaded
    except ResidscopeError as error:
        reason = str(error)
    found, drawn = top.found(), sample.found(tokens.document)
    both: Any = map(np.concatenate, zip(found, drawn, strict=True))
    all_windows, cut = windows_of(Examples(*both), tokens, codes, selection.analysed), len(found.latent)
    windows, around_drawn = all_windows.rows(slice(cut)), all_windows.rows(slice(cut, None))
    words = find_words(found, windows, tokens, selection.analysed, tokenizer, layer_numbers, n_latents)
    texts = contexts_of(tokens, tokenizer, np.unique(np.r_[found.token, drawn.token])), "tokens" if tokenizer else "ids"
    n_rows = write_found(folder / EXAMPLES, found, windows, *texts, layer_numbers)
    write_found(folder / RANDOM_EXAMPLES, drawn, around_drawn, *texts, layer_numbers)
    agreement = context_agreement(strongest.token, table.n_tokens)
    summary = {"rows": n_rows, "per_layer": n, "random": sample.token.shape[1], "tokens_around": REACH}
    summary["no_text"] = reason
    summary["agreement"] = agreement_summary(agreement)
    shares = {"context_overlap": agreement.overlap, "context_chance": agreement.chance}
    columns = {name: pa.array(values, mask=np.isnan(values)) for name, values in shares.items()}
    columns["fires_on"] = pa.array(words.words, pa.list_(pa.string()))
    columns["fires_on_layers"] = pa.array(words.layers, pa.list_(pa.list_(pa.int64())))
    return LatentViews(summary, columns)


def write_histograms(path: Path, counts: NDArray[np.uint32], layer_numbers: Sequence[int]) -> None:
    """Write histograms.parquet, with the bins' edges in its metadata. layer_numbers [L]: the model's block indices."""
    latent, layer = np.nonzero(counts.any(axis=2))
    rows = pa.FixedSizeListArray.from_arrays(pa.array(counts[latent, layer].astype(np.int64).ravel()), N_BINS)
    columns = [pa.array(latent), pa.array(np.asarray(layer_numbers, np.int64)[layer]), rows]
    table = pa.table(dict(zip(COLUMNS.names, columns, strict=True)), schema=COLUMNS)
    write_table(table.replace_schema_metadata({"edges": repr(list(EDGES))}), path)


@compiled()
def add_counts(counts, values, indices):
    """Add positive activations to the histograms, counts uint32 [M, L, B]; values and indices (int64) [T, L, k]."""
    n_tokens, n_layers, k = values.shape
    last = counts.shape[2] - 1
    for t in range(n_tokens):
        for layer in range(n_layers):
            for i in range(k):
                value = np.float64(values[t, layer, i])
                if value > 0:
                    mantissa, exponent = math.frexp(value)  # value = mantissa * 2^exponent, 0.5 <= mantissa < 1
                    upper = 1 if mantissa * mantissa >= 0.5 else 0
                    place = min(max(2 * (exponent - 1 - LOWEST) + upper, 0), last)
                    counts[indices[t, layer, i], layer, place] += np.uint32(1)
