"""Options of `residscope fit-lens`; it shares components with `harvest`."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from harvest.config import HarvestConfig, ModelConfig, SequenceConfig
from harvest.text.config import TextConfig
from residscope.errors import UsageError
from residscope.options import require_at_least, require_seed, to_flat


@dataclass(frozen=True, kw_only=True)
class FittingConfig:
    """How translators are fitted."""

    method: Literal["ridge", "kl"] = "kl"
    """ridge: linear regression, cheap. kl: then also train on the KL divergence to the model's final logits."""
    init: Literal["ridge", "zero"] = "ridge"
    """Where KL training begins: at the ridge translators, which is far better at the budgets below, or at zero, as for
    published lenses (which used 65 million tokens)."""
    kl_steps: int = 32
    """Steps of KL training; the learning rate decays linearly over them."""
    kl_batch: int = 256
    """Tokens in a step, shuffled over the text."""
    lr: float | None = None
    """Learning rate of the first step; default 0.3 from ridge, 1 from zero (as for published lenses)."""
    weight_decay: float = 1e-3
    """Weight decay of KL training, towards the identity."""
    max_condition: float = 1000.0
    """Maximum condition number of a translator: smaller singular values of I + W are raised, so that the inverse is not
    dominated by rounding errors. 0: no limit."""

    def __post_init__(self) -> None:
        require_at_least(1, kl_steps=self.kl_steps, kl_batch=self.kl_batch)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"--lr should be a finite number above 0, found {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"--weight-decay should be a finite number, 0 or more, found {self.weight_decay}")
        if not (self.max_condition == 0 or self.max_condition > 1):
            raise UsageError(f"--max-condition should be above 1, or 0 for no limit, found {self.max_condition}")

    @property
    def first_lr(self) -> float:
        """The learning rate, with its default filled in."""
        return self.lr if self.lr is not None else 0.3 if self.init == "ridge" else 1.0


@dataclass(frozen=True, kw_only=True)
class FitLensConfig:
    """Options of `fit-lens`."""

    FIRST_FLAGS: ClassVar = ("model", "out", "store", "dataset", "max_tokens", "context_length", "method", "device")

    weights: ModelConfig
    out: Path
    """Folder to make, for the lens (config.json, params.pt) and its quality (fit.json)."""
    store: Path | None = None
    """Take the vectors from this store: of the same model, all layers, no lens. Default: run the model on text."""
    text: TextConfig = field(default_factory=TextConfig)
    max_tokens: int = 100_000
    """Tokens of text."""
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    fitting: FittingConfig = FittingConfig()
    eval_tokens: int = 2048
    """Maximum number of held-out tokens to measure on."""
    validation_fraction: float = 0.05
    """Share of the documents to hold out; with the same share and seed, `train` holds out the same documents."""
    seed: int = 0
    """Seed for the choice of held-out documents and the order of KL training."""
    json: bool = False
    """Print one JSON line on stdout."""

    def __post_init__(self) -> None:
        require_at_least(1, eval_tokens=self.eval_tokens, max_tokens=self.max_tokens)
        require_seed(self.seed)
        if not 0 < self.validation_fraction < 1:
            raise UsageError(f"--validation-fraction should be between 0 and 1, found {self.validation_fraction}")
        if self.store is not None:
            self._refuse_text_options()

    def _refuse_text_options(self) -> None:
        """`UsageError` for options that make tokens, since a store has its tokens already."""
        given = {**to_flat(self.text), **to_flat(self.sequences), "max_tokens": self.max_tokens}
        defaults = {option.name: option.default for option in fields(self)}
        defaults |= {**to_flat(TextConfig()), **to_flat(SequenceConfig())}
        for name, value in given.items():
            if value != defaults[name]:
                reason = f"but --store {self.store} already has tokens: give only one of them"
                raise UsageError(f"--{name.replace('_', '-')} says how to turn text into tokens, {reason}")

    def for_harvest(self) -> HarvestConfig:
        """The same model and text as options of `harvest`, for `harvest.settings.resolve`."""
        shared = {"weights": self.weights, "text": self.text, "sequences": self.sequences}
        return HarvestConfig(**shared, out=self.out, max_tokens=self.max_tokens)

    def for_record(self) -> dict[str, Any]:
        """The options recorded in fit.json, by flag name; those of a single text are plain values, not lists."""
        found = {name: value for name, value in to_flat(self).items() if name not in ("out", "json")}
        for name in to_flat(self.text):
            found[name] = found[name] if len(found[name]) > 1 else next(iter(found[name]), None)
        return found | {"store": self.store and self.store.name}
