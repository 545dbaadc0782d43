"""A user's own text, seen through the autoencoder: which latents are active at which token and layer, and what happens
when one is ablated or steered.

A prompt begins like the store's sequences: with the tokens that the tokenizer puts in front of a text, or else with the
separator of documents. So its first word is not at position 0, which is masked as in the store. Vectors go through the
store's lens and number format, so that the codes are those of an analysis of the same text.

Shapes: N positions, A activations that are not zero, J latents active in the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.prompt.intervene import Effect, Intervention, PromptedModel, PromptRun
from harvest.model.blocks import longest_context
from harvest.model.tokenizer import Tokenizer
from harvest.residual import ResidualRecorder
from residscope.errors import UsageError
from store.activations import ActivationStore

N_ABLATED = 8
"""Number of latents to ablate by default."""


class Tokens(NamedTuple):
    """A prompt as the model sees it, [N] each."""

    ids: NDArray[np.int64]
    texts: list[str]
    kept: NDArray[np.bool_]
    """False for the opening and for special tokens, which autoencoders are not trained on."""


class Activations(NamedTuple):
    """All activations above zero, each column [A], sorted by position, layer, and falling activation."""

    position: NDArray[np.int64]
    layer: NDArray[np.int64]
    """The model's block index."""
    latent: NDArray[np.int64]
    activation: NDArray[np.float32]


class Usual(NamedTuple):
    """How active latents are in an analysis, to find what is special about a prompt."""

    total: NDArray[np.float64]  # [M] sum of each latent's activations
    n_tokens: int


class PromptLatents(NamedTuple):
    """The latents active in a prompt, each column [J], by falling specificity."""

    latent: NDArray[np.int64]
    mass: NDArray[np.float64]
    """Sum of its activations over positions and layers."""
    layer_mean: NDArray[np.float64]
    """Mean layer, by mass."""
    peak_layer: NDArray[np.int64]
    """The layer with the most mass; if there are several, the first."""
    peak: NDArray[np.float32]
    """Its highest activation."""
    peak_position: NDArray[np.int64]
    """The position of that."""
    specificity: NDArray[np.float64]
    """mass ln(mass / expected mass): low for a latent that is always on, however strong it is."""


class Result(NamedTuple):
    intervention: Intervention
    """With its layers as numbers."""
    effect: Effect


@dataclass(frozen=True, kw_only=True)
class PromptView:
    text: str
    tokens: Tokens
    activations: Activations
    latents: PromptLatents
    run: PromptRun
    """The run without interventions."""
    results: list[Result]
    silent: list[int]
    """Latents that were not ablated, because they are not active in the prompt."""


def opening_of(store: ActivationStore, tokenizer: Tokenizer) -> list[int]:
    """Ids to put in front of a prompt: those that open the store's sequences, else its separator of documents; without
    one (`--no-pack`), the tokenizer's end of text, or a line end if it has none."""
    provenance, end = store.meta.provenance, tokenizer.end_of_text
    bos = provenance.get("bos_id")  # the opening in earlier stores
    before = provenance.get("opening_ids") or ([] if bos is None else [bos]) or provenance.get("separator_ids")
    return [int(i) for i in before or (tokenizer.separator_ids(end) if end else tokenizer.encode(["\n"])[0])]


def read_prompt(store: ActivationStore, tokenizer: Tokenizer, config: Any, text: str) -> Tokens:
    """Tokens of a prompt. config: the model's. `UsageError` if it is empty, too long, or has unknown token ids."""
    opening = opening_of(store, tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"prompt {text!r} is not valid UTF-8") from None
    (own,) = tokenizer.encode([text])
    if not own:
        raise UsageError(f"prompt {text!r}: the tokenizer returns no tokens for it")
    ids = np.array(opening + own, np.int64)
    limit = longest_context(config)
    if limit is not None and len(ids) > limit:
        raise UsageError(f"the prompt has {len(ids)} tokens, and the model takes at most {limit}: give a shorter text")
    rows = config.get_text_config().vocab_size
    if ids.max() >= rows:
        raise UsageError(f"prompt {text!r}: the model has no token {ids.max()}: its embedding has {rows} rows")
    kept = ~np.isin(ids, list(tokenizer.masked_ids(store.meta.provenance.get("separator") or "")))
    kept[: len(opening)] = False
    if not kept.any():
        raise UsageError(f"prompt {text!r}: all its tokens are special: give another text")
    return Tokens(ids, tokenizer.texts(ids), kept)


@torch.inference_mode()
def run_prompt(prompted: PromptedModel, tokens: Tokens, layers: Sequence[int]) -> tuple[PromptRun, Activations]:
    """The model's run on a prompt, and the activations at kept positions and `layers`, the model's block indices."""
    ids, place = torch.from_numpy(tokens.ids)[None], np.flatnonzero(tokens.kept)
    streams = ResidualRecorder(prompted.model).record(ids)
    kept = torch.from_numpy(place).to(prompted.model.device)
    parts: list[list[NDArray[Any]]] = []
    for number in layers:
        values, indices = prompted.codes(streams[number][0][kept], number)
        row, column = (values > 0).nonzero(as_tuple=True)
        found = [place[row.cpu().numpy()], np.full(len(row), number)]
        parts.append([*found, indices[row, column].cpu().numpy(), values[row, column].float().cpu().numpy()])
    position, layer, latent, activation = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((-activation, layer, position))
    found = Activations(position[order], layer[order], latent[order], activation[order])
    return PromptRun(prompted, ids, torch.from_numpy(tokens.kept)[None], streams[-1]), found


def latents_of(found: Activations, usual: Usual, n_tokens: int) -> PromptLatents:
    """The latents of a prompt with `n_tokens` kept tokens. A latent's expected mass is its average over analysis and
    prompt together, for as many tokens."""
    latent, member = np.unique(found.latent, return_inverse=True)
    activation = found.activation.astype(np.float64)
    layers, at = np.unique(found.layer, return_inverse=True)
    by_layer = np.zeros((len(latent), len(layers)))
    np.add.at(by_layer, (member, at), activation)
    mass = by_layer.sum(axis=1)
    peak_row = np.lexsort((-found.activation, member))[np.unique(np.sort(member), return_index=True)[1]]
    expected = (usual.total[latent] + mass) * n_tokens / (usual.n_tokens + n_tokens)
    specificity = mass * np.log(mass / expected)
    order = np.lexsort((latent, -specificity))
    columns = (
        latent,
        mass,
        by_layer @ layers / mass,
        layers[by_layer.argmax(axis=1)] if len(layers) else layers,
        found.activation[peak_row],
        found.position[peak_row],
        specificity,
    )
    ordered: list[Any] = [column[order] for column in columns]
    return PromptLatents(*ordered)


def view_prompt(
    prompted: PromptedModel,
    text: str,
    tokens: Tokens,
    layers: Sequence[int],
    interventions: Sequence[Intervention] | None,
    usual: Usual,
) -> PromptView:
    """The view of one prompt. layers: the model's block indices. interventions: made one at a time; None: ablate each
    of the `N_ABLATED` most specific latents at its strongest layer. usual: of the same autoencoder."""
    run, found = run_prompt(prompted, tokens, layers)
    latents = latents_of(found, usual, int(tokens.kept.sum()))
    strongest = dict(zip(latents.latent.tolist(), latents.peak_layer.tolist(), strict=True))
    if interventions is None:
        interventions = [Intervention(kind="ablate", latent=one, layers=None) for one in list(strongest)[:N_ABLATED]]
    results, silent = [], []
    for intervention in interventions:
        placed = intervention.at(layers, strongest.get(intervention.latent))
        if placed.layers and (intervention.kind != "ablate" or intervention.latent in strongest):
            results.append(Result(placed, run.effect([placed])))
        else:
            silent.append(intervention.latent)
    return PromptView(
        text=text, tokens=tokens, activations=found, latents=latents, run=run, results=results, silent=silent
    )


def check_interventions(interventions: Sequence[Intervention], n_latents: int, layers: Sequence[int]) -> None:
    """`UsageError` if one names a latent or a layer that does not exist."""
    for one in interventions:
        if not 0 <= one.latent < n_latents:
            raise UsageError(f"{one.kind}: the autoencoder has latents 0 to {n_latents - 1}, found {one.latent}")
        other = [] if one.layers in (None, "all") else [layer for layer in one.layers if layer not in layers]
        if other:
            trained = " ".join(map(str, layers))
            raise UsageError(f"{one.kind}: the autoencoder was trained on layers {trained}, found {other[0]}")


def check_positions(interventions: Sequence[Intervention], text: str, tokens: Tokens) -> None:
    """`UsageError` if one names a position that the text does not have, or that is masked."""
    kept = np.flatnonzero(tokens.kept)
    for one in interventions:
        if other := set(one.positions or ()).difference(kept.tolist()):
            wanted = f"positions should be {kept[0]} to {kept[-1]}, and not of special tokens"
            raise UsageError(f"prompt {text!r}: {one.kind}: {wanted}, found {min(other)}")
