"""What `residscope fit-lens` is asked to do: one frozen dataclass, from which the command line is generated.

Text options mean what they mean to `harvest`. What it does not do: resolve anything (`harvest.lens.fit` does).
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harvest.config import DEFAULT_SPLIT, HarvestConfig
from residscope.errors import UsageError

_TEXT = (
    "dataset",
    "dataset_config",
    "dataset_revision",
    "split",
    "text_column",
    "max_tokens",
    "context_length",
    "keep_first_position",
    "document_separator",
)
"""What a store has settled already."""


@dataclass(frozen=True, kw_only=True)
class FitLensConfig:
    """Options of `fit-lens`; see the text under each field."""

    model: str
    """Model: a short name, a hub id (owner/name), a local folder, or a GGUF file."""
    out: Path
    """Folder to make, with the lens (config.json, params.pt) and how good it is (fit.json)."""
    store: Path | None = None
    """Take the vectors from this store: of the same model, all layers, no lens. Default: run the model over text."""
    method: Literal["ridge", "kl"] = "kl"
    """ridge: linear regression, cheap. kl: then train on the KL divergence to the model's final logits, too."""
    init: Literal["ridge", "zero"] = "ridge"
    """Where KL training begins: at the ridge translators, far better at the budgets below, or at zero, as published
    lenses did (with 65 million tokens)."""
    kl_steps: int = 32
    """Steps of KL training; the learning rate decays linearly over them."""
    kl_batch: int = 256
    """Tokens in a step, mixed over the text."""
    lr: float | None = None
    """Learning rate of the first step; default 0.3 from ridge, 1 from zero (which published lenses used)."""
    weight_decay: float = 1e-3
    """Weight decay of KL training, towards the identity."""
    max_condition: float = 1000.0
    """Highest condition number of a translator: smaller singular values of I + W are raised, so that the inverse does
    not drown in rounding. 0: as fitted."""
    eval_tokens: int = 2048
    """Held-out tokens to measure on, at most."""
    validation_fraction: float = 0.05
    """Share of the documents held out; with the same share and seed, those that `train` holds out."""
    dataset: str = "monology/pile-uncopyrighted"
    """Text: a hub data set (streamed), local files, or pydoc, as for `harvest`."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub data set that has several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set; default its newest."""
    split: str = DEFAULT_SPLIT
    """Split of a hub data set; local files have none."""
    text_column: str = "text"
    """Column that holds the text."""
    max_tokens: int = 100_000
    """Tokens of text."""
    context_length: int | None = None
    """Tokens in a packed sequence; default 2048, or the model's longest if that is less."""
    keep_first_position: bool = False
    """Also fit on position 0 of each sequence, where norms can be a hundred times the median."""
    document_separator: str | None = None
    """Text put after each document; default the model's end-of-text token. Give "" for none."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model's weights; translators are float32. auto: bfloat16 on CUDA, float32 on a CPU."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; default its newest."""
    seed: int = 0
    """Seed of the choice of held-out documents and of the order of KL training."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one."""
    json: bool = False
    """Print one JSON line on stdout."""

    def __post_init__(self) -> None:
        """Refuse what can never work, with `UsageError`."""
        for name in ("kl_steps", "kl_batch", "eval_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} should be at least 1, found {getattr(self, name)}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"--lr should be a finite number above 0, found {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"--weight-decay should be a finite number, 0 or more, found {self.weight_decay}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed should be at least 0 and below 2^63, found {self.seed}")
        if not (self.max_condition == 0 or self.max_condition > 1):
            raise UsageError(f"--max-condition should be above 1, or 0 for no limit, found {self.max_condition}")
        if not 0 < self.validation_fraction < 1:
            raise UsageError(f"--validation-fraction should be between 0 and 1, found {self.validation_fraction}")
        if self.store is not None:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name in _TEXT:
                if getattr(self, name) != defaults[name]:
                    raise UsageError(
                        f"--{name.replace('_', '-')} says how to make text into tokens, which --store {self.store} has"
                        " done: give one of the two"
                    )
        self.for_harvest()

    @property
    def first_lr(self) -> float:
        """The learning rate, with its default filled in."""
        if self.lr is not None:
            return self.lr
        return 0.3 if self.init == "ridge" else 1.0

    def for_harvest(self) -> HarvestConfig:
        """The same model and text, as options of `harvest`, which knows how to resolve them."""
        names = ("model", "out", "dtype", "revision", "device", *_TEXT)
        return HarvestConfig(**{name: getattr(self, name) for name in names})
