"""What one looks at of a latent: its maximally activating examples at each layer, the sizes of its activations, and
whether its top contexts agree between layers.

How: one pass over the codes fills what the three need, a second one reads the examples' windows. Text needs the
tokenizer of the store's model, and nothing else of it; where that is not on this machine, ids are written, and the
reason is in summary.json. Not here: how examples are found (`analysis.latents.examples`) and shown
(`analysis.report.page`).
"""

from typing import Any

from analysis.latents.contexts import agreement_summary, context_agreement, contexts_per_layer
from analysis.latents.example_rows import write_found
from analysis.latents.examples import REACH, TopExamples, examples_per_layer
from analysis.latents.histograms import add_counts, no_counts, write_histograms
from analysis.parts import Context, Part
from residscope.errors import ResidscopeError
from store.activations import ActivationStore

EXAMPLES, HISTOGRAMS = "examples.parquet", "histograms.parquet"


def make(context: Context) -> dict[str, Any]:
    """Write the files; what summary.json says of them."""
    tokens, analysed = context.store.tokens, context.selection.analysed
    n_latents, n_layers = context.table.probs.shape
    layer_numbers = context.moments.layers.tolist()
    n = examples_per_layer(n_latents, n_layers)
    top = TopExamples.zeros(n_latents, n_layers, n)
    strongest = TopExamples.zeros(n_latents, n_layers, contexts_per_layer(n_latents, n_layers))
    counts = no_counts(n_latents, n_layers)
    for tile in context.codes(analysed):
        top.add(tile, tokens.document[tile.token])
        strongest.add(tile, tile.token)  # each token its own document: simply the most active
        add_counts(counts, tile.values, tile.indices)
    write_histograms(context.folder / HISTOGRAMS, counts, layer_numbers)
    tokenizer, reason = tokenizer_of_store(context.store, context.config.model)
    n_rows = write_found(
        context.folder / EXAMPLES, top.found(), tokens, tokenizer, context.codes, analysed, layer_numbers
    )
    agreement = context_agreement(strongest.token, context.table.n_tokens)
    context.columns["context_overlap"] = agreement.overlap
    context.columns["context_chance"] = agreement.chance
    return {
        "rows": n_rows,
        "per_layer": n,
        "tokens_around": REACH,
        "no_text": reason,
        "agreement": agreement_summary(agreement),
    }


def tokenizer_of_store(store: ActivationStore, model: str | None) -> tuple[Any, str | None]:
    """The tokenizer of the store's model, or None and why. A model of the hub is looked for in the local cache only."""
    from analysis.model.transformer import spec_of_store
    from harvest.model.load import load_tokenizer

    try:
        return load_tokenizer(spec_of_store(store, model, offline=True)), None
    except ResidscopeError as error:
        return None, str(error)


PART = Part(name="examples", files=(EXAMPLES, HISTOGRAMS), wanted=lambda config: config.examples, make=make)
