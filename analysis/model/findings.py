"""What needs the store's transformer: downstream quality, and the tokens that latents promote.

How: `find_model` checks before the long work whether the store's model is on this machine, and uses the network only if
a flag requires the model; `run_model` loads it once and measures. If no flag requires the model and it cannot be found,
this part of the analysis is skipped and the reason is recorded.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.config import AnalyzeConfig, TransformerOptions
from analysis.inputs import Inputs
from analysis.latents.logits import LatentTokens, find_latent_tokens, write_latent_tokens
from analysis.model.downstream import measure_downstream, sae_reconstruction
from analysis.model.downstream_numbers import Downstream, downstream_summary
from analysis.model.together import groups_of, together_summary
from analysis.model.transformer import lens_of_store, load_of_store, spec_of_store
from analysis.results.folder import LATENT_LOGITS
from analysis.selection import Selection
from analysis.uncertainty import Interval
from harvest.lens.translators import SPACE, TunedLens
from harvest.model.load import LoadedModel
from harvest.model.names import ModelSpec
from harvest.options_file import recorded_place
from residscope.errors import ResidscopeError, UsageError
from store.activations import ActivationStore
from train.model import MLSAE

DOWNSTREAM_FLOPS = 7.5e12
"""FLOPs for the default number of downstream tokens: about a minute on two cores."""

FEWEST_TOKENS, MOST_TOKENS = 256, 4096
"""Bounds of that number."""

TOGETHER_TOKENS, TOGETHER_SHARE = 64, 0.25
"""Several layers are replaced at once on this share of the tokens, but on at least this number if there are enough."""


class FoundModel(NamedTuple):
    """The store's model and lens, or why there are none."""

    spec: ModelSpec | None
    lens: TunedLens | None
    reason: str | None
    """One sentence; None if the model was found, or is not needed."""


@dataclass(frozen=True, kw_only=True)
class ModelFindings:
    downstream: Downstream | None = None
    intervals: Mapping[str, Sequence[Interval | None]] = field(default_factory=dict)
    """From `Downstream.intervals`."""
    which: str = ""
    """The tokens on which downstream quality was measured: "validation" or "analysed"."""
    together: dict[str, Any] | None = None  # the summary's entry for several layers replaced at once
    tokens: LatentTokens | None = None
    reason: str | None = None
    """Why a part that was not turned off is missing; None if none is."""
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The keys of summary.json that need the transformer."""
        found = downstream_summary(self.downstream, self.intervals, self.which)
        return {
            "transformer": {"reason": self.reason, "seconds": self.seconds},
            "downstream": found and found | {"together": self.together},
            "latent_logits": self.tokens.summary() if self.tokens else None,
        }


def find_model(options: TransformerOptions, store: ActivationStore) -> FoundModel:
    """Find what `options` need. Raises `ResidscopeError` if a flag requires it and it cannot be found."""
    if options.downstream_tokens == 0 and not options.latent_logits:
        return FoundModel(None, None, None)
    try:
        return locate(store, options.model, options.lens, offline=not options.asked_for)
    except ResidscopeError as error:
        if options.asked_for:
            raise
        return FoundModel(None, None, _sentence(error))


def locate(store: ActivationStore, model: str | None, lens: str | None, *, offline: bool) -> FoundModel:
    """The model and lens of `store`; with `offline`, those of the hub only if they are in the local cache."""
    spec = spec_of_store(store, model, offline=offline)
    lens = lens or recorded_place(store.path, "lens")
    if offline and lens is None and store.meta.lens and not _lens_is_cached(str(store.meta.lens.get("id"))):
        which = f"lens {store.meta.lens.get('id')!r}, with which {store.path} was harvested"
        raise UsageError(f"{which}, was not found: give its folder with --lens")
    return FoundModel(spec, lens_of_store(store, lens), None)


def run_model(
    config: AnalyzeConfig,
    found: FoundModel,
    inputs: Inputs,
    selection: Selection,
    live: NDArray[np.int64],
    folder: Path,
    pca: MLSAE | None,
) -> ModelFindings:
    """Load the model and measure; writes latent_logits.parquet into `folder`.

    live: latents that fired. pca: the baseline as an autoencoder, if there is one. Raises like `find_model`.
    """
    if found.spec is None:
        return ModelFindings(reason=found.reason)
    started, options = time.monotonic(), config.transformer
    tokens, downstream, together, held_out = None, None, None, bool(selection.validation.any())
    try:
        model = load_of_store(inputs.store, found.spec)
        if options.latent_logits and len(live):
            tokens = find_latent_tokens(inputs.sae, live, model, found.lens, config.statistics.seed)
            write_latent_tokens(folder / LATENT_LOGITS, tokens, model.tokenizer)
        if options.downstream_tokens != 0:
            n_tokens = options.downstream_tokens or default_tokens(model, len(inputs.layers))
            measured = partial(
                measure_downstream,
                inputs.store,
                model,
                sae_reconstruction(inputs.sae.to(model.device), found.lens),
                lens=found.lens,
                layers=inputs.layer_numbers,
                counted=selection.validation if held_out else selection.analysed,
            )
            downstream = measured(max_tokens=n_tokens)
            if groups := groups_of(inputs.layer_numbers):
                sample = max(min(n_tokens, TOGETHER_TOKENS), int(TOGETHER_SHARE * n_tokens))
                alone = [(layer,) for layer in inputs.layer_numbers]
                linear = pca and sae_reconstruction(pca.to(model.device), found.lens)
                asked = [*(group.layers for group in groups), *alone]
                several = measured(groups=asked, n_lean=len(alone), pca=linear, max_tokens=sample)
                together = together_summary(groups, several, pca is not None, config.statistics.intervals)
    except ResidscopeError as error:
        if options.asked_for:
            raise
        if tokens is None:
            return ModelFindings(reason=_sentence(error))
        return ModelFindings(reason=_sentence(error), tokens=tokens, seconds=time.monotonic() - started)
    return ModelFindings(
        downstream=downstream,
        together=together,
        intervals=downstream.intervals() if downstream and config.statistics.intervals else {},
        which="validation" if held_out else "analysed",
        tokens=tokens,
        seconds=time.monotonic() - started,
    )


def default_tokens(model: LoadedModel, n_layers: int) -> int:
    """Number of tokens for which downstream quality of `n_layers` layers takes `DOWNSTREAM_FLOPS`: there are three
    conditions for each layer, and each runs half of the blocks on average, and the unembedding."""
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    unembedding = sum(parameter.numel() for parameter in model.unembedding.parameters())
    per_token = 2 * 3 * n_layers * (blocks / 2 + unembedding)
    return int(np.clip(DOWNSTREAM_FLOPS / per_token, FEWEST_TOKENS, MOST_TOKENS))


def _lens_is_cached(lens: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if Path(lens).expanduser().is_dir():
        return True
    files = (f"lens/{name}/params.pt" for name in {lens, lens.rpartition("/")[2]})
    return any(isinstance(try_to_load_from_cache(SPACE, file, repo_type="space"), str) for file in files)


def _sentence(error: ResidscopeError) -> str:
    return str(error).rstrip(".") + "."
