"""What one looks at of a latent: its maximally activating examples at each layer, the sizes of its activations, and
whether its top contexts agree between layers.

How: one pass over the codes fills what the three need, a second one reads the examples' windows. Text needs the
tokenizer of the store's model, and nothing else of it; where that is not on this machine, ids are written, and the
reason is in summary.json. Tested in tests/analysis/latents/test_examples.py. Not here: how examples are found
(`analysis.latents.examples`) and shown (`analysis.report.page`).

Shapes: M n_latents, L layers.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.inputs import Inputs, TaskSpec
from analysis.latents.contexts import agreement_summary, context_agreement, contexts_per_layer
from analysis.latents.example_rows import write_found
from analysis.latents.examples import REACH, TopExamples, examples_per_layer
from analysis.latents.histograms import add_counts, no_counts, write_histograms
from analysis.latents.table import LatentTable
from analysis.model.transformer import spec_of_store
from analysis.results.folder import EXAMPLES, HISTOGRAMS
from analysis.selection import Selection
from analysis.task import codes_again
from harvest.model.load import load_tokenizer
from residscope.errors import ResidscopeError
from store.activations import ActivationStore


class LatentViews(NamedTuple):
    """What is said of them elsewhere than in their own files."""

    summary: dict[str, Any]
    """The key `examples` of summary.json."""

    columns: dict[str, NDArray[np.float64]]
    """[M] each: columns of latents.parquet; NaN for what is not defined."""


def view_latents(
    spec: TaskSpec, inputs: Inputs, selection: Selection, table: LatentTable, model: str | None, folder: Path
) -> LatentViews:
    """Look at the latents of the analysed tokens and write the files. model: where the store's model is, if the user
    said so."""
    tokens, codes, layer_numbers = inputs.store.tokens, partial(codes_again, spec), inputs.layer_numbers
    n_latents, n_layers = table.probs.shape
    n = examples_per_layer(n_latents, n_layers)
    top = TopExamples.zeros(n_latents, n_layers, n)
    strongest = TopExamples.zeros(n_latents, n_layers, contexts_per_layer(n_latents, n_layers))
    counts = no_counts(n_latents, n_layers)
    for tile in codes(selection.analysed):
        top.add(tile, tokens.document[tile.token])
        strongest.add(tile, tile.token)  # each token its own document: simply the most active
        add_counts(counts, tile.values, tile.indices)
    write_histograms(folder / HISTOGRAMS, counts, layer_numbers)
    tokenizer, reason = tokenizer_of_store(inputs.store, model)
    n_rows = write_found(folder / EXAMPLES, top.found(), tokens, tokenizer, codes, selection.analysed, layer_numbers)
    agreement = context_agreement(strongest.token, table.n_tokens)
    return LatentViews(
        summary={
            "rows": n_rows,
            "per_layer": n,
            "tokens_around": REACH,
            "no_text": reason,
            "agreement": agreement_summary(agreement),
        },
        columns={"context_overlap": agreement.overlap, "context_chance": agreement.chance},
    )


def tokenizer_of_store(store: ActivationStore, model: str | None) -> tuple[Any, str | None]:
    """The tokenizer of the store's model, or None and why. A model of the hub is looked for in the local cache only."""
    try:
        return load_tokenizer(spec_of_store(store, model, offline=True)), None
    except ResidscopeError as error:
        return None, str(error)
