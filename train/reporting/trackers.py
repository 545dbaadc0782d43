"""TensorBoard and Weights & Biases beside the metrics file: off by default. Tested in test_outputs.py.

Both get every line of `ckpt.metrics.jsonl` by step: train/NAME, validation/NAME, and lists over layers as NAME/LAYER.
"""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from residscope.errors import ResidscopeError, said
from residscope.names import beside, stem
from train.resolve import RunPlan


class Tracker(NamedTuple):
    """Receives the numbers of every line of metrics, and its step."""

    log: Callable[[Mapping[str, float], int], object]
    close: Callable[[], object]


def open_trackers(plan: RunPlan, resume_step: int) -> list[Tracker]:
    """The trackers that a run's flags ask for; resume_step: its checkpoint's step, 0 for a fresh run."""
    found: list[Tracker] = []
    out, publish = plan.config.out, plan.config.publish
    if publish.tensorboard:
        found.append(_tensorboard(beside(out, ".tensorboard"), resume_step))
    if publish.wandb is not None:
        found.append(_wandb(publish.wandb, plan.spec.name or stem(out), out, plan.to_dict(), fresh=resume_step == 0))
    return found


def numbers_of(line: Mapping[str, Any], layers: tuple[int, ...]) -> dict[str, float]:
    """A line of metrics as flat numbers; what is not a number (an absent layer) is left out."""
    prefix = line.get("split", "train")
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, int | float):
            found[f"{prefix}/{name}"] = value
        elif isinstance(value, list):
            found |= {f"{prefix}/{name}/{n}": v for n, v in zip(layers, value, strict=True) if v is not None}
    return found


def _tensorboard(folder: Path, resume_step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # The steps after a checkpoint are repeated: TensorBoard hides the old ones.
    writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(project: str, name: str, out: Path, plan: Mapping[str, Any], *, fresh: bool) -> Tracker:
    import wandb  # type: ignore[import-not-found]

    note = beside(out, ".wandb-id")
    if fresh or not note.exists():
        note.write_text(secrets.token_hex(8), encoding="utf-8")
    try:
        options = {"id": note.read_text(encoding="utf-8"), "resume": "allow", "config": dict(plan)}
        # create_new: several runs of one process, side by side
        run = wandb.init(project=project, name=name, reinit="create_new", **options)
    except Exception as error:  # wandb's error classes differ by version
        way_out = "log in with `wandb login`, or set WANDB_MODE=offline"
        raise ResidscopeError(f"--wandb {project}: {said(error)}; {way_out}") from None
    return Tracker(lambda numbers, step: run.log(dict(numbers), step=step), run.finish)
