"""The parts of an analysis that need the transformer: downstream quality, and the tokens of latents.

How: `find_model` tells before the long work whether the store's model is here, without a network unless it was asked
for outright; `run_model` loads it once and makes the parts. Where the model was not asked for and is not to be had, the
analysis goes without and says why. Not here: the numbers (`analysis.model.downstream`, `analysis.latents.tokens`), the
prompt view (`analysis.prompt.prompt`).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.config import AnalyzeConfig
from analysis.latents import tokens as latent_tokens
from analysis.latents.tokens import LatentTokens, find_latent_tokens, write_latent_tokens
from analysis.model.downstream import Downstream, measure_downstream, sae_reconstruction
from analysis.model.downstream_summary import downstream_summary
from analysis.model.transformer import lens_of_store, load_of_store, spec_of_store
from analysis.selection import Selection
from analysis.uncertainty import Interval
from harvest.lens.translators import SPACE, TunedLens
from harvest.model.load import LoadedModel
from harvest.model.names import ModelSpec
from harvest.options_file import recorded_place
from residscope.errors import ResidscopeError, UsageError
from store.activations import ActivationStore
from train.model import MLSAE

LATENT_LOGITS = "latent_logits.parquet"

DOWNSTREAM_FLOPS = 7.5e12
"""Arithmetic that the default number of downstream tokens may take: about a minute on two cores."""

FEWEST_TOKENS, MOST_TOKENS = 256, 4096
"""Bounds of the default number."""


class FoundModel(NamedTuple):
    """The store's model and lens, or why they are not to be had."""

    spec: ModelSpec | None
    lens: TunedLens | None
    reason: str | None
    """One sentence; None if the model is there, or if nothing asked for it."""


@dataclass(frozen=True, kw_only=True)
class ModelFindings:
    """What the transformer told."""

    downstream: Downstream | None = None
    intervals: Mapping[str, Sequence[Interval | None]] = field(default_factory=dict)
    """Of `Downstream.intervals`."""

    which: str = ""
    """Of which tokens downstream quality was measured: "validation" or "analysed"."""

    tokens: LatentTokens | None = None
    reason: str | None = None
    """Why there is none of a part that was not turned off; None if all is there."""

    seconds: float = 0.0


def find_model(config: AnalyzeConfig, store: ActivationStore) -> FoundModel:
    """Look for what `config` needs. Raises `ResidscopeError` where it was asked for outright and is not to be had."""
    if config.downstream_tokens == 0 and not config.latent_logits:
        return FoundModel(None, None, None)
    asked = asked_for(config)
    try:
        return locate(store, config.model, config.lens, offline=not asked)
    except ResidscopeError as error:
        if asked:
            raise
        return FoundModel(None, None, _sentence(error))


def asked_for(config: AnalyzeConfig) -> bool:
    """Whether the model is wanted outright, so that its absence is an error and the network may be used."""
    return bool(config.downstream_tokens) or config.model is not None or config.lens is not None


def locate(store: ActivationStore, model: str | None, lens: str | None, *, offline: bool) -> FoundModel:
    """The model and lens of `store`; offline looks for those of the hub in the local cache only."""
    spec = spec_of_store(store, model, offline=offline)
    lens = lens or recorded_place(store.path, "lens")
    if offline and lens is None and store.meta.lens and not _lens_is_cached(str(store.meta.lens.get("id"))):
        raise UsageError(
            f"lens {store.meta.lens.get('id')!r}, which {store.path} went through, is not here: say where with --lens"
        )
    return FoundModel(spec, lens_of_store(store, lens), None)


def run_model(
    config: AnalyzeConfig,
    found: FoundModel,
    store: ActivationStore,
    sae: MLSAE,
    layers: Sequence[int],
    selection: Selection,
    live: NDArray[np.int64],
    folder: Path,
) -> ModelFindings:
    """Load the model and make the parts; latent_logits.parquet is written into `folder`.

    layers: the analysed ones, indices into the store's. live: latents that fired. Raises as `find_model` does.
    """
    if found.spec is None:
        return ModelFindings(reason=found.reason)
    started = time.monotonic()
    try:
        model = load_of_store(store, found.spec, device="cuda" if torch.cuda.is_available() else "cpu")
        tokens = None
        if config.latent_logits and len(live):
            tokens = find_latent_tokens(sae, live, model, found.lens, config.seed)
            write_latent_tokens(folder / LATENT_LOGITS, tokens, model.tokenizer)
        downstream = _downstream(config, found, model, store, sae, layers, selection)
    except ResidscopeError as error:
        if asked_for(config):
            raise
        (folder / LATENT_LOGITS).unlink(missing_ok=True)
        return ModelFindings(reason=_sentence(error))
    return ModelFindings(
        downstream=downstream,
        intervals=downstream.intervals() if downstream and config.intervals else {},
        which="validation" if selection.validation.any() else "analysed",
        tokens=tokens,
        seconds=time.monotonic() - started,
    )


def _downstream(
    config: AnalyzeConfig,
    found: FoundModel,
    model: LoadedModel,
    store: ActivationStore,
    sae: MLSAE,
    layers: Sequence[int],
    selection: Selection,
) -> Downstream | None:
    if config.downstream_tokens == 0:
        return None
    blocks = [store.meta.layers[layer] for layer in layers]
    return measure_downstream(
        store,
        model,
        sae_reconstruction(sae.to(model.device), found.lens),
        lens=found.lens,
        layers=blocks,
        counted=selection.validation if selection.validation.any() else selection.analysed,
        max_tokens=config.downstream_tokens or default_tokens(model, len(layers)),
    )


def default_tokens(model: LoadedModel, n_layers: int) -> int:
    """Tokens for downstream quality of `n_layers` layers within `DOWNSTREAM_FLOPS`: three conditions for each layer,
    each of which runs half of the blocks on average, and the unembedding."""
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    unembedding = sum(parameter.numel() for parameter in model.unembedding.parameters())
    per_token = 2 * 3 * n_layers * (blocks / 2 + unembedding)
    return int(np.clip(DOWNSTREAM_FLOPS / per_token, FEWEST_TOKENS, MOST_TOKENS))


def _lens_is_cached(lens: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = {lens, lens.rpartition("/")[2]}
    if Path(lens).expanduser().is_dir():
        return True
    return any(
        isinstance(try_to_load_from_cache(SPACE, f"lens/{name}/params.pt", repo_type="space"), str) for name in names
    )


def _sentence(error: ResidscopeError) -> str:
    return str(error).rstrip(".") + "."


def summary_of(found: ModelFindings) -> dict[str, Any]:
    """The keys of summary.json that the transformer gave."""
    return {
        "transformer": {"reason": found.reason, "seconds": found.seconds},
        "downstream": downstream_summary(found.downstream, found.intervals, found.which),
        "latent_logits": latent_tokens.summary_of(found.tokens),
    }
