"""The model and the autoencoder of an analysis, loaded once to answer many questions.

The numbers are those of `analyze --prompt`: the same functions make them (`analysis.prompt`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from numbers import Integral
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.inputs import Inputs
from analysis.model.findings import FoundModel
from analysis.model.transformer import load_of_store
from analysis.prompt.attribution import attribute
from analysis.prompt.intervene import LARGEST, Intervention, PromptedModel, changing
from analysis.prompt.run import plain_effect, plain_prompt, plain_tokens
from analysis.prompt.view import (
    Activations,
    PromptView,
    Tokens,
    Usual,
    check_interventions,
    check_positions,
    read_prompt,
    view_prompt,
)
from harvest.lens.translators import TunedLens
from harvest.model.blocks import find_blocks, longest_context, n_layers_of
from harvest.model.checks import check_logits, check_model
from residscope.errors import ResidscopeError, UsageError
from train.model import MLSAE

MOST_NEW_TOKENS = 64


class Attributed(NamedTuple):
    """Effects of a text's activations on a prediction."""

    activations: Activations
    effect: NDArray[np.float64]
    """Effect of each activation, nats."""
    texts: list[str]
    """The tokens of the text."""
    position: int
    """Position of the token after which the prediction is made."""
    token: str
    """The predicted token."""
    missed: dict[int, float]
    """By layer, the effect of the reconstruction's error."""


class LiveModel:
    """Answers questions about texts of the user."""

    def __init__(self, inputs: Inputs, found: FoundModel, usual: Usual, stop: Event) -> None:
        """Load the weights. usual: how active latents are in the analysis; stop: while it is set, no text is run.
        Raises `ResidscopeError` if model, store and autoencoder do not fit together."""
        assert found.spec is not None
        self.store, self.layers, self._usual = inputs.store, inputs.layer_numbers, usual
        model = load_of_store(self.store, found.spec)
        check_model(self.store, model, found.lens)
        sae, dtype = inputs.sae.to(model.device), self.store.meta.stored_dtype
        self._stop = stop
        self.prompted = PromptedModel(model, sae, found.lens, dtype, self._check)
        for block in model.blocks:
            block.register_forward_pre_hook(self._check)
        self.tokenizer = model.tokenizer
        check_logits(model, torch.from_numpy(self.tokens("a").ids)[None])
        self._read = lru_cache(maxsize=8)(self._read_anew)

    def _check(self, *_: object) -> None:
        if self._stop.is_set():
            raise ResidscopeError("stopped: nobody is waiting for the answer")

    def tokens(self, text: str) -> Tokens:
        """A text's tokens, as `analyze --prompt` reads it; `UsageError` if it is empty or too long."""
        return read_prompt(self.store, self.tokenizer, self.prompted.model.causal_lm.config, text)

    def _read_anew(self, text: str) -> PromptView:
        return view_prompt(self.prompted, text, self.tokens(text), self.layers, [], self._usual)

    def activations(self, text: str) -> Activations:
        """All activations above zero at kept positions."""
        return self._read(text).activations

    def effects(self, text: str, token: str | None, against: str | None, position: int | None) -> Attributed:
        """The effects of all activations on a prediction; arguments as for `Analysis.attribute`."""
        view = self._read(text)
        n = len(view.tokens.ids)
        place = n - 1 if position is None else position
        if not isinstance(place, Integral) or isinstance(place, bool) or not 0 <= place < n:
            raise UsageError(f"position should be 0 to {n - 1}, found {place!r}")
        target = view.run.next_at[place][0][0] if token is None else self._token_id(token)
        other = None if against is None else self._token_id(against)
        if target == other:
            raise UsageError(f"against should be another token than the predicted one, found {against!r} for both")
        effect, missed = attribute(self.prompted, view.tokens, self.layers, view.activations, place, target, other)
        return Attributed(view.activations, effect, view.tokens.texts, place, self.tokenizer.text([target])[0], missed)

    def _token_id(self, text: str) -> int:
        """The token that reads as `text` after another one. Parts of a character are refused: they look alike."""
        own, rows = self.tokenizer.encode([text])[0], self.prompted.model.causal_lm.config.get_text_config().vocab_size
        whole = text and "\ufffd" not in text
        for ids in (own, sorted(self.tokenizer.ids)) if whole else ():  # a tokenizer may put a space in front of a text
            for i, read in zip(ids, self.tokenizer.text(ids), strict=True):
                if read == text and i < rows:
                    return i
        parts = ", ".join(map(repr, self.tokenizer.texts(own))) or "none"
        raise UsageError(f"{text!r} should be one token of the model, such as ' the', found {parts}")

    def prompt(
        self, text: str, most: int, effects_after: int | None = None, effects_against: str | None = None
    ) -> dict[str, Any]:
        """A prompt's part of prompt.json, with at most `most` latents, each with its activations in `cells`; see
        `Analysis.prompt`."""
        found, with_effects = self.activations(text), effects_after is not None
        candidates = len(found.latent) if with_effects else most  # all, if effects choose among them
        data = plain_prompt(self._read(text), self.tokenizer, candidates)
        del data["interventions"], data["silent"]
        order = np.argsort(found.latent, kind="stable")
        latents = found.latent[order]
        columns: list[NDArray[Any]] = [values[order] for values in (found.position, found.layer, found.activation)]
        if with_effects:
            attributed = self.effects(text, None, effects_against, effects_after)
            columns.append(attributed.effect[order])
            data["effects"] = {"after": effects_after, "token": attributed.token, "against": effects_against}
        for row in data["latents"]:
            own = slice(*np.searchsorted(latents, [row["latent"], row["latent"] + 1]))
            row["cells"] = [list(cell) for cell in zip(*(values[own].tolist() for values in columns), strict=True)]
            if with_effects:
                layers, index = np.unique(columns[1][own], return_inverse=True)
                sums = np.bincount(index, columns[3][own])
                best = np.abs(sums).argmax()
                row["effect"], row["effect_layer"] = float(sums[best]), int(layers[best])
        if with_effects:
            data["latents"] = sorted(data["latents"], key=lambda row: -abs(row["effect"]))[:most]
        return {**data, "layers": self.layers}

    def intervene(
        self, text: str, changes: Sequence[Mapping[str, Any]], n_tokens: int, tokens: Sequence[str]
    ) -> dict[str, Any]:
        """What all changes together do to the next token, and how the text continues, for at most n_tokens."""
        interventions, watched = [*map(intervention_of, changes)], [*map(self._token_id, tokens)]
        check_interventions(interventions, self.prompted.sae.config.n_latents, self.layers)
        if not 0 <= n_tokens <= MOST_NEW_TOKENS:
            raise UsageError(f"continue_tokens should be 0 to {MOST_NEW_TOKENS}, found {n_tokens}")
        placed, view = [change.at(self.layers) for change in interventions], self._read(text)
        check_positions(interventions, text, view.tokens)
        limit, n = longest_context(self.prompted.model.causal_lm.config), len(view.tokens.ids)
        if limit is not None and n + n_tokens > limit:
            raise UsageError(f"{n} tokens and {n_tokens} new ones: the model takes at most {limit}; ask for fewer")
        effect = plain_effect(view.run.effect(placed, watched), self.tokenizer)
        for token in effect["next_changed"]:
            token["p"] = token.pop("p_changed")
        continued = (view.run.continued(n_tokens, made) if n_tokens else [] for made in ([], placed))
        true, changed = ("".join(self.tokenizer.texts(ids)) for ids in continued)
        next_true = plain_tokens(view.run.next_tokens, self.tokenizer, "p")
        found, silent = view.activations, []
        for change in placed:
            on = (found.latent == change.latent) & np.isin(found.layer, change.layers or ())
            on &= change.positions is None or np.isin(found.position, change.positions)
            if change.kind == "ablate" and not on.any():
                where = "layers" if change.positions is None else "layers and positions"
                silent.append(f"Latent {change.latent} is not on at any of these {where} in this text.")
        return {**effect, "notes": silent, "next_true": next_true, "text_true": true, "text_changed": changed}


@contextmanager
def steer(
    model: Any,
    sae: MLSAE,
    changes: Sequence[Mapping[str, Any]],
    *,
    layers: Sequence[int] | None = None,
    lens: TunedLens | None = None,
) -> Iterator[None]:
    """A context in which a `transformers` model runs and generates with `changes`, given as for `Analysis.intervene`.

    They are hooks on its blocks and nothing else, so they also work under nnsight and TransformerLens, given the module
    inside. All positions are changed except the first of a longer sequence. `positions` index the tokens of a pass over
    several, padding included; a token generated alone, with a cache, is then left as it is. layers: those the
    autoencoder was trained on, which "all" stands for; default: those it standardises by, else all blocks. lens: the
    one that its store went through."""
    blocks = find_blocks(model, n_layers_of(model.config))
    every = layers or sae.config.layers or range(len(blocks))
    interventions = [intervention_of(change).at(every) for change in changes]
    check_interventions(interventions, sae.config.n_latents, every)
    prompted = PromptedModel(model, sae.to(next(blocks.parameters()).device), lens, "float32")
    with changing(prompted, blocks, interventions):
        yield


def intervention_of(change: Mapping[str, Any]) -> Intervention:
    """An intervention from {kind, latent, layers: [int] or "all", coefficient, positions}; `UsageError` for others."""
    kind, latent, layers, positions = (change.get(name) for name in ("kind", "latent", "layers", "positions"))
    coefficient = change.get("coefficient") if kind == "steer" else None
    chosen, places = (given if isinstance(given, list | tuple) else () for given in (layers, positions))
    numbers = [latent, *chosen, *places]
    if (
        kind not in ("ablate", "steer")
        or change.keys() - {"kind", "latent", "layers", "coefficient", "positions"}
        or not all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers)
        or not (layers == "all" or chosen)
        or not (positions is None or places)
        or not all(0 < place < 2**31 for place in places)
        or (kind == "steer" and not (isinstance(coefficient, int | float) and abs(coefficient) < LARGEST))
    ):
        wanted = '{"kind": "ablate" or "steer", "latent": 17, "layers": [3, 4] or "all"}, with a "coefficient" to steer'
        wanted += ', and "positions": [5], above 0, to change only those'
        raise UsageError(f"a change should be {wanted}, found {dict(change)!r:.200}")
    assert latent is not None
    layers = tuple(sorted({int(layer) for layer in chosen})) or "all"
    at = tuple(int(place) for place in places) or None
    return Intervention(kind=kind, latent=int(latent), layers=layers, coefficient=coefficient, positions=at)
