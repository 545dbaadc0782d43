"""A small model, its store and an autoencoder, and a text read as a prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from analysis.prompt.intervene import PromptedModel
from analysis.prompt.view import read_prompt
from tests.support.harvested import Harvested
from train.model import MLSAE

TEXT = "mary and john"


class Setting(NamedTuple):
    made: Harvested
    sae: MLSAE
    checkpoint: Path

    @property
    def subject(self) -> PromptedModel:
        return PromptedModel(self.made.model, self.sae, self.made.lens, self.made.store.meta.stored_dtype)

    @property
    def layers(self) -> list[int]:
        return list(self.made.store.meta.layers)


Make = Callable[..., Setting]


def read(setting: Setting, text: str = TEXT) -> Any:
    model = setting.made.model
    return read_prompt(setting.made.store, model.tokenizer, model.causal_lm.config, text)
