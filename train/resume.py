"""Whether a run may write its checkpoint, and go on from the one that is there; and with how many threads.

All refusals come before anything is computed or written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residscope.errors import IncompatibleError, UsageError
from store.activations import ActivationStore
from store.folder import refuse_inside_store
from train.checkpoint import Checkpoint, load_checkpoint
from train.config import TrainConfig
from train.determinism import differences, surroundings
from train.grid import RunSpec
from train.reporting.announce import say
from train.resolve import ADDED_LATER, RECORDED, RunPlan
from train.validation import Validation


def _check_output(config: TrainConfig) -> None:
    """Raise `UsageError` unless the checkpoint may be written there."""
    refuse_inside_store(config.out)
    if config.out.is_dir():
        raise UsageError(f"--out {config.out} is a folder: name a file, such as {config.out / 'ckpt.pt'}")
    if config.out.suffix == ".safetensors":
        raise UsageError(
            f"--out {config.out}: the weights alone go there, beside the checkpoint: name that "
            f"{config.out.with_suffix('.pt')}"
        )
    if config.out.exists() and not config.out.is_file():
        raise UsageError(f"--out {config.out} is not a regular file: choose another name")
    if config.out.exists() and not (config.resume or config.overwrite):
        raise UsageError(f"{config.out} exists already: --resume continues it, --overwrite starts anew")


def load_saved(specs: Sequence[RunSpec]) -> list[Checkpoint | None]:
    """What a --resume finds of each run; raises `UsageError` where a checkpoint may not be written.

    A run that diverged among others must not keep them from going on, so its weights may be NaN.
    """
    for spec in specs:
        _check_output(spec.config)
    found: list[Checkpoint | None] = []
    for spec in specs:
        there = spec.config.resume and spec.config.out.exists()
        try:
            found.append(load_checkpoint(spec.config.out, finite=len(specs) == 1) if there else None)
        except IncompatibleError as error:
            way_out = "delete that file, and the same command trains it anew"
            raise IncompatibleError(f"{error}; {way_out}{' beside the others' if len(specs) > 1 else ''}") from None
    return found


def check_resumable(saved: Checkpoint, store: ActivationStore, plan: RunPlan) -> None:
    """Raise `IncompatibleError` unless the checkpoint is a run of this plan over this store."""
    path = plan.config.out
    if saved.config.d_model != plan.model.d_model:
        raise IncompatibleError(f"{path} has d_model {saved.config.d_model}, {store.path} has {plan.model.d_model}")
    if not {"step", "finished", "config"} <= set(saved.trainer):
        raise IncompatibleError(f"{path} holds no training state to resume; --overwrite starts anew")
    _check_state(path, saved.trainer, saved.config.n_latents)
    for warning in compare_plans(saved.trainer["config"], plan):
        if saved.trainer["finished"] is False:
            say(f"warning: {warning}")
    now = surroundings(plan.device, plan.kernels, plan.product_dtype)
    changed = differences(saved.trainer.get("surroundings", {}), now)
    if changed and saved.trainer["finished"] is False:
        say(f"warning: since {path} was saved: {changed}: not bit for bit the result of an unbroken run")
    if saved.store.get("content_hash") != store.content_hash:
        raise IncompatibleError(
            f"{path} was trained on another store: content {saved.store.get('content_hash')} there, "
            f"{store.content_hash} in {store.path}; name that store, or --overwrite to start anew"
        )


_REPORTED_ONLY = ("device", "kernels", "tile_mb")
"""What changes the last bits of a run, not its meaning: a resume that differs in it is warned of."""


def compare_plans(saved: dict[str, Any], plan: RunPlan) -> list[str]:
    """Check that a checkpoint's record is of this plan; returns warnings, raises `IncompatibleError` naming what
    differs."""
    warnings, now = [], plan.to_dict()
    for name in RECORDED:
        before, after = saved.get(name, ADDED_LATER.get(name)), now[name]
        if before == after:
            continue
        found = f"{name} was {before} when {plan.config.out} was saved and is {after} now"
        if name not in _REPORTED_ONLY:
            way_out = "give the same flags to resume, or --overwrite to start anew"
            if name == "product_dtype":  # what "auto" stands for depends on the machine
                way_out = f"give --dtype {before} to resume, or --overwrite to start anew"
            if name == "product_dtype" and before in ("float16", "int16"):
                way_out = f"{before} products are no longer supported: give --overwrite to start anew"
            raise IncompatibleError(f"{found}; {way_out}")
        warnings.append(f"{found}: the result will not be bit for bit that of an unbroken run")
    return warnings


def _check_state(path: Path, trainer: dict[str, Any], n_latents: int) -> None:
    """Raise `IncompatibleError` unless the record is one that `train` can have written."""
    step, config, validation = trainer["step"], trainer["config"], trainer.get("validation")
    needed = set(Validation._fields) - set(Validation._field_defaults)
    metrics = trainer.get("metrics")
    measured = {"loss", "dead_fraction", "vectors"} if trainer["finished"] is True else set()
    whole: dict[str, bool] = {
        "config": isinstance(config, dict),
        "step": type(step) is int and isinstance(config, dict) and 0 <= step <= config.get("steps", step),
        "finished": isinstance(trainer["finished"], bool),
        "metrics": isinstance(metrics, dict)
        and measured <= set(metrics)
        and isinstance(metrics.get("loss"), float | int | None),
        "validation": validation is None
        or (isinstance(validation, dict) and needed <= set(validation) <= set(Validation._fields)),
    }
    whole |= {name: isinstance(trainer.get(name, 1), int) for name in ("updates", "vectors", "threads")}
    if trainer["finished"] is False:
        silent = trainer.get("silent")
        whole["silent"] = isinstance(silent, Tensor) and silent.shape == (n_latents,)
        whole |= {name: isinstance(trainer.get(name), dict) for name in ("statistics", "optimizer", "window")}
    whole["surroundings"] = isinstance(trainer.get("surroundings", {}), dict)
    damaged = [name for name, good in whole.items() if not good]
    if damaged:
        raise IncompatibleError(
            f"{path}: its training state is damaged: {damaged[0]} is not what `train` writes; take another checkpoint,"
            " or --overwrite starts anew"
        )


def set_threads(asked: int | None, saved: Sequence[Checkpoint | None]) -> None:
    """Use the asked number of CPU threads, or the checkpoints': sums are split by thread, so the last bits differ."""
    before = next((one.trainer.get("threads") for one in saved if one is not None), None)
    threads = asked or before
    if threads is not None:
        torch.set_num_threads(threads)
    if before is not None and threads != before:
        say(f"warning: {before} threads before, {threads} now: not bit for bit the result of an unbroken run")
