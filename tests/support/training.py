"""Configurations, plans and options of a step from flat values, what a run wrote, and a signal that stops it."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from residscope.options import from_flat
from store.activations import ActivationStore
from train.config import ObjectiveConfig, TrainConfig
from train.data import TrainingData
from train.grid import RunSpec
from train.objective.variants import StepOptions, Variant
from train.resolve import RunPlan, make_plan


def train_config(**flags: Any) -> TrainConfig:
    """A configuration from flags by name, whatever component they belong to."""
    return from_flat(TrainConfig, flags)


def metrics_lines(out: Path) -> list[dict[str, Any]]:
    """The lines of the metrics file beside a checkpoint."""
    return [json.loads(line) for line in out.with_name(f"{out.stem}.metrics.jsonl").read_text().splitlines()]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without what differs between two equal runs."""
    return [{k: v for k, v in line.items() if k not in ("vectors_per_second", "data_wait_fraction")} for line in lines]


class StopAt:
    """Stands in for the signal handler: tells the loop to stop after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __enter__(self) -> "StopAt":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def plan_of(store: ActivationStore, **flags: Any) -> RunPlan:
    """The plan of a run over this store."""
    config = train_config(store=store.path, **flags)
    return make_plan(RunSpec(config=config), TrainingData.open(config, store))


def step_options(variant: Variant, **values: Any) -> StepOptions:
    """Options of a step from flat values, those of the objective included."""
    own = {field.name for field in fields(StepOptions)}
    objective = {name: value for name, value in values.items() if name not in own}
    rest = {name: value for name, value in values.items() if name in own}
    return StepOptions(variant=variant, objective=ObjectiveConfig(**objective), **rest)


def with_options(options: StepOptions, **changes: Any) -> StepOptions:
    """The options of a step with some values changed, those of the objective included."""
    own = {field.name: getattr(options, field.name) for field in fields(StepOptions)}
    del own["variant"], own["objective"]
    return step_options(options.variant, **{**asdict(options.objective), **own, **changes})
