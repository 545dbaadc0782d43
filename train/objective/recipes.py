"""Values for the flags that a run leaves open: batch size, learning rate and its schedule, Adam's betas, initial scale.

A flag that is given counts; else, on a resume, what the checkpoint was begun with; else the recipe's. How the laws of
`best` were found: benchmarks/results/*-defaults.md. Imports nothing heavy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from residscope.options import to_flat, with_values
from train.config import RecipeName, SecondMoment, TrainConfig

USUAL_BATCH = 2048
"""Vectors in a step if no law sets them."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a run is trained: the flags of the same names, all resolved."""

    recipe: RecipeName
    batch_size: int
    lr: float
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float | None = None
    """None: no clipping."""
    encoder_scale: float = 1.0
    encoder_lr: float = 1.0
    second_moment: SecondMoment = "weight"
    loss_space: Literal["standardized", "raw"] = "standardized"


BEFORE_RECIPES: dict[str, Any] = {"recipe": "gao"} | {
    name: Recipe.__dataclass_fields__[name].default
    for name in ("beta1", "beta2", "clip_norm", "encoder_scale", "encoder_lr", "second_moment")
}
"""Values used by checkpoints that do not record them."""


def recorded_flags(record: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's flags as a checkpoint records them, and the seed of the held-out documents, which in earlier versions
    was the run's seed."""
    found = {field.name: record.get(field.name, BEFORE_RECIPES.get(field.name)) for field in fields(Recipe)}
    found["validation_seed"] = record.get("validation_seed", record.get("seed"))
    return found | {"clip_norm": found["clip_norm"] or 0.0}


def fill(config: TrainConfig, flags: Mapping[str, Any]) -> TrainConfig:
    """`config`, with its open flags taken from `flags`."""
    given = to_flat(config)
    return with_values(config, **{name: value for name, value in flags.items() if given[name] is None})


def batch_size(config: TrainConfig, vectors_per_epoch: int) -> int:
    """Vectors in a step of a run over a store with `vectors_per_epoch` vectors to train on."""
    if config.data.batch_size is not None:
        return config.data.batch_size
    if config.data.steps is not None or config.recipe not in (None, "best"):
        return USUAL_BATCH
    return best_batch((config.data.epochs or 1) * vectors_per_epoch)


def best_batch(vectors: int) -> int:
    """Vectors in a step of a run of `vectors`: the power of two, from 128, that makes 500 to 1,000 steps; from 1,024 on
    it grows with the square root of the run, up to 65,536."""
    batch = 128
    while batch < 65_536 and vectors > 1000 * batch * max(1, batch / 512):
        batch *= 2
    return batch


def best_lr(n_latents: int, batch_size: float, vectors: float) -> float:
    """The peak learning rate: a fit to runs of 1e5 to 2e7 vectors, batches of 128 to 8,192 and 4,608 to 18,432
    latents. A batch that is larger than the run counts as no larger."""
    batch_size, factor = min(batch_size, vectors), _decoder_factor(vectors)
    return 5e-3 * factor * (4608 / n_latents) ** 0.25 * (batch_size / 1024) ** 0.35 * (5e5 / max(vectors, 5e4)) ** 0.25


def _decoder_factor(vectors: float) -> float:
    """Undoes the fall of the rate between 1e6 and 2e7 vectors, for all weights but the encoder's."""
    return min(max(vectors / 1e6, 1), 20) ** 0.25


def complete(config: TrainConfig, *, n_latents: int, batch_size: int, vectors: int, share: float = 1) -> Recipe:
    """The recipe of a run over a stream of known batch size and length, with the flags that `config` gives; share: the
    part of the stream that it is trained on."""
    name = config.recipe or "best"
    if name == "best":
        lr = best_lr(n_latents, batch_size * share, vectors * share)
        # A small initial scale lowers FVU, but a short run has no time to revive the latents that it leaves dead.
        small = config.model.activation in ("topk", "batchtopk", "jumprelu")
        scale = min(max(20 * batch_size / vectors, 0.1), 0.4) if small else 0.4
        values: dict[str, Any] = {"lr": lr, "decay_fraction": 0.5, "beta1": 0.8, "beta2": 0.95, "encoder_scale": scale}
        # From 4,608 latents on the encoder's rate does not depend on their number.
        encoder_lr = max(n_latents / 4608, 1) ** 0.25 / 3 / _decoder_factor(vectors * share)
        values |= {"encoder_lr": encoder_lr, "second_moment": "latent"}
    elif name == "gao":  # Gao et al. 2024, figure 3: the best rate falls with the square root of the dictionary's size
        values = {"lr": 2e-4 / (n_latents / 2**14) ** 0.5}
    else:  # paper: Lawson et al. 2025 and its code
        values = {"lr": 1e-4, "warmup_fraction": 0.0, "decay_fraction": 0.0, "loss_space": "raw"}
    given = to_flat(config)
    values |= {field.name: given[field.name] for field in fields(Recipe) if given[field.name] is not None}
    values |= {"recipe": name, "batch_size": batch_size, "clip_norm": values.get("clip_norm") or None}
    return Recipe(**values)
