"""Which runs one invocation trains: one, one for each point of a `--sweep`, one for each layer, or their product.

Every run of an invocation sees the same stream of batches, so only fields that do not change the stream can be swept: a
run's checkpoint is then, bit for bit, that of the single run with the same flags. Imports nothing heavy.
"""

import itertools
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from residscope.errors import UsageError
from residscope.options import read_word, with_values
from train.config import HardwareConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig

STREAM_FIELDS = (
    *("store", "layers", "seed", "batch_size", "steps", "epochs", "window_gb"),
    *("validation_fraction", "validation_seed"),
)
"""The fields that the stream of batches depends on: the same for all runs."""

_NOT_SWEPT = ("device", "threads", "deterministic")
"""Fields of the groups that can be swept which are the same for all runs of a process."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run of an invocation."""

    config: TrainConfig
    """The configuration of this run alone, with its own `out`."""
    name: str = ""
    """What distinguishes it from the others, also in file names: "k=16.expansion_factor=8"; empty for a single run."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The swept fields and their values."""
    layer: int | None = None
    """With --per-layer, the model's number of the layer that it is trained on."""


def expand(config: TrainConfig, layers: Sequence[int]) -> list[RunSpec]:
    """The runs that `config` asks for; layers: the model's numbers of the layers in the stream, for --per-layer."""
    axes = sweep_axes(config)
    if not axes and config.per_layer is None:
        return [RunSpec(config=config)]
    specs = []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        for layer in [None] if config.per_layer is None else layers:
            parts = [f"{name}={as_written(value)}" for name, value in settings.items()]
            name = ".".join(parts if layer is None else [*parts, f"layer={layer}"])
            run_config = with_values(config, sweep=None, out=run_path(config.out, name), **settings)
            specs.append(RunSpec(config=run_config, name=name, settings=settings, layer=layer))
    return specs


def as_written(value: Any) -> str:
    """A swept value as users write it: 8, true and none, where Python prints 8.0, True and None."""
    text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    return text.lower() if isinstance(value, bool | None) else text


def run_path(out: Path, name: str) -> Path:
    """The checkpoint of run `name`: beside ckpt.pt it is ckpt.NAME.pt; any other `out` is the folder to put it in."""
    in_folder = out.suffix != ".pt" or out.is_dir()
    return out / f"ckpt.{name}.pt" if in_folder else out.with_name(f"{out.stem}.{name}.pt")


def sweep_axes(config: TrainConfig) -> dict[str, list[Any]]:
    """Fields and values of `--sweep k=16,32 lr=1e-3,2e-3`, in the order given; `UsageError` names what is wrong."""
    hints = _swept_types()
    listed = ", ".join(sorted(hints))
    axes: dict[str, list[Any]] = {}
    for word in config.sweep or ():
        name, equals, values = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not equals or not values:
            raise UsageError(f"--sweep {word}: expected a field and its values, such as k=16,32,64")
        if name in STREAM_FIELDS:
            reason = f"which all runs of a sweep share: run `train` once for each value; a sweep takes {listed}"
            raise UsageError(f"--sweep {word}: {name} changes the stream of batches, {reason}")
        if name not in hints:
            raise UsageError(f"--sweep {word}: {name} cannot be swept; a sweep takes {listed}")
        if name in axes:
            raise UsageError(f"--sweep names {name} twice: give all its values in one word, such as {name}=1,2")
        read = [read_word(value, hints[name], f"--sweep {name}") for value in values.split(",")]
        if len(set(read)) != len(read):
            raise UsageError(f"--sweep {word}: a value is given twice")
        axes[name] = read
    sizes = {"n_latents", "expansion_factor"}
    if axes.keys() & sizes and all(name in axes or getattr(config.model, name) is not None for name in sizes):
        both = "n_latents and expansion_factor both set the number of latents"
        raise UsageError(f"--sweep: {both}: give only one, in the sweep or for all its runs")
    return axes


def _swept_types() -> dict[str, Any]:
    """The fields that may be swept, and the types of their values."""
    groups = (ModelConfig, ObjectiveConfig, OptimizerConfig, HardwareConfig)
    hints = {name: hint for group in groups for name, hint in typing.get_type_hints(group).items()}
    return {name: hint for name, hint in hints.items() if name not in _NOT_SWEPT and "tuple" not in str(hint)}
