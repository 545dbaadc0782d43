"""Whether a run may write its checkpoint or continue from the one that is there, and with how many threads."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residscope.destinations import require_name
from residscope.errors import IncompatibleError, UsageError
from residscope.options import with_values
from residscope.reading import reading
from store.activations import ActivationStore
from store.folder import refuse_inside_store
from train.checkpoint import Checkpoint, check_weights, config_path, load_checkpoint, refuse_anothers
from train.config import ONLY_FOR, TrainConfig
from train.data import TrainingData
from train.determinism import differences, surroundings
from train.formats.files import read_sae
from train.grid import RunSpec
from train.model import MLSAE
from train.objective.recipes import fill, recorded_flags
from train.parallel.ranks import ALONE, Ranks
from train.reporting.announce import say
from train.reporting.convergence import is_curve
from train.resolve import ADDED_LATER, RECORDED, RunPlan
from train.validation import Validation


def _check_output(config: TrainConfig) -> None:
    """Raise `UsageError` unless the checkpoint may be written to `--out`."""
    out = config.out
    refuse_inside_store(out)
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder: name a file, such as {out / 'ckpt.pt'}")
    if out.suffix == ".safetensors":
        other = out.with_suffix(".pt")
        raise UsageError(f"--out {out} is where the weights alone are written; name the checkpoint, such as {other}")
    if out.exists() and not out.is_file():
        raise UsageError(f"--out {out} is not a regular file: choose another name")
    require_name(out)
    refuse_anothers(out)
    if out.exists() and not (config.resume or config.overwrite):
        raise UsageError(f"{out} exists already: use --resume to continue it or --overwrite to replace it")
    if out.exists() and not config_path(out).exists():
        with out.open("rb") as file:
            if file.read(2) not in (b"PK", b""):  # whole or cut short
                raise UsageError(f"--out {out} exists but is not a checkpoint: choose another name")


def load_saved(specs: Sequence[RunSpec], ranks: Ranks = ALONE) -> list[Checkpoint | None]:
    """The checkpoints to resume; raises `UsageError` if one may not be written. Among several runs, one that diverged
    must not stop the others, so its weights may be NaN. Ranks that share the latents each read their own."""
    for spec in specs:
        _check_output(spec.config)
    return [_load(spec.config, ranks, several=len(specs) > 1) for spec in specs]


def _load(config: TrainConfig, ranks: Ranks, *, several: bool) -> Checkpoint | None:
    if not (config.resume and config.out.exists()):
        return None
    try:
        saved = load_checkpoint(config.out, finite=False, mapped=ranks.latents.size > 1)
        with suppress(UsageError):  # Its size differs from the flags, which is refused later.
            saved = replace(saved, sae=saved.sae.part(ranks.latents))
        if not several:
            check_weights(saved.sae.state_dict(), str(config.out))
    except IncompatibleError as error:
        again = "delete that file and run the same command to train it again with the others"
        raise IncompatibleError(f"{error}; {again if several else _START_AGAIN}") from None
    return saved


def as_begun(specs: Sequence[RunSpec], saved: Sequence[Checkpoint | None]) -> list[RunSpec]:
    """The runs, with flags left to defaults taken from the checkpoints that they continue, as the defaults may have
    changed. Batches and held-out documents are the same for all runs."""
    begun, stream = list[RunSpec](), dict[str, int | None]()
    for spec, checkpoint in zip(specs, saved, strict=True):
        config, record = spec.config, None if checkpoint is None else checkpoint.trainer.get("config")
        if isinstance(record, dict):
            with reading(f"{config.out}: its training state is damaged", _START_AGAIN):
                source = config.start_from or record.get("start_from")
                config = with_values(fill(config, recorded_flags(record)), start_from=source and Path(source))
            first = {"batch_size": config.data.batch_size, "validation_seed": config.validation.validation_seed}
            stream = stream or first
        begun.append(replace(spec, config=config))
    return [replace(spec, config=with_values(spec.config, **stream)) for spec in begun]


def check_resumable(saved: Checkpoint, store: ActivationStore, plan: RunPlan, ranks: Ranks) -> None:
    """Raise `IncompatibleError` unless the checkpoint is of a run with this plan over this store."""
    path = plan.config.out
    if saved.config.d_model != plan.model.d_model:
        what = f"{store.path} has {plan.model.d_model}; name the store that it was trained on, or {_START_AGAIN}"
        raise IncompatibleError(f"{path} has d_model {saved.config.d_model}, {what}")
    if not {"step", "finished", "config"} <= set(saved.trainer):
        raise IncompatibleError(f"{path} has no training state, so it cannot be resumed; {_START_AGAIN}")
    with reading(f"{path}: its training state is damaged", _START_AGAIN):
        _check_state(path, saved.trainer, saved.config.n_latents * saved.sae.latents.size)
    warnings = compare_plans(saved.trainer["config"], plan, longer=is_longer(plan, saved))
    now = surroundings(plan.device, plan.kernels, plan.product_dtype, ranks)
    if changed := differences(saved.trainer.get("surroundings", {}), now):
        warnings.append(f"since {path} was saved: {changed}: {_NOT_BIT_FOR_BIT}")
    if not saved.trainer["finished"]:
        for warning in warnings:
            say(f"warning: {warning}")
    if saved.store.get("content_hash") != store.content_hash:
        raise IncompatibleError(
            f"{path} was trained on another store: content {saved.store.get('content_hash')} there, "
            f"{store.content_hash} in {store.path}; name that store, or {_START_AGAIN}"
        )


def require_alike(
    store: ActivationStore, plans: Sequence[RunPlan], saved: Sequence[Checkpoint | None], ranks: Ranks
) -> None:
    """Raise `IncompatibleError` unless all ranks train the same runs, on the same store, from the same checkpoints."""
    begun = [None if one is None else (one.trainer["step"], one.trainer["metrics"]) for one in saved]
    records = [plan.to_dict() for plan in plans]
    chosen = {name: [record[name] for record in records] for name in RECORDED if name not in _REPORTED_ONLY}
    ranks.require_same(store=store.content_hash, checkpoint=begun, **chosen)


def is_longer(plan: RunPlan, saved: Checkpoint) -> bool:
    """Whether a finished run is to be continued for more steps: from its weights, with a new schedule and a fresh state
    of Adam."""
    return saved.trainer["finished"] and plan.steps > saved.trainer["step"]


def restart_warning(plan: RunPlan, saved: Checkpoint) -> str:
    """A warning if a finished run is continued for too few steps to gain from it, else ""."""
    done = saved.trainer["step"]
    more = "the learning rate rises again first, and FVU may end higher than it was; twice the steps make up for it"
    return f"from {done} to {plan.steps} steps: {more}" if is_longer(plan, saved) and plan.steps < 1.5 * done else ""


_START_AGAIN = "use --overwrite to start again"
_NOT_BIT_FOR_BIT = "the result will not be bit for bit that of an uninterrupted run"
_REPORTED_ONLY = ("device", "kernels", "tile_mb")
"""What changes only the last bits of a run: a resume that differs in these gives a warning."""


_LENGTH = ("steps", "vectors", "epochs", "dead_vectors")


def compare_plans(saved: dict[str, Any], plan: RunPlan, *, longer: bool = False) -> list[str]:
    """Warnings about how a checkpoint's record differs from this plan; `IncompatibleError` if it cannot be resumed."""
    warnings, now = [], plan.to_dict()
    saved = {**ADDED_LATER, "validation_seed": saved.get("seed"), **saved}  # earlier versions had one seed for both
    for name in RECORDED:
        before, after = saved.get(name), now[name]
        used = plan.model.activation in ONLY_FOR.get(name, (plan.model.activation,))
        if before == after or not used or (longer and name in _LENGTH):
            continue
        found = f"{name} was {before} when {plan.config.out} was saved and is {after} now"
        if name not in _REPORTED_ONLY:
            same = f"the same flags (--config {config_path(plan.config.out)} has them)"
            if name == "product_dtype":  # --dtype auto depends on the machine
                if before in ("float16", "int16"):
                    raise IncompatibleError(f"{found}; {before} products are no longer supported: {_START_AGAIN}")
                same = f"--dtype {before}"
            raise IncompatibleError(f"{found}; give {same} to resume, or {_START_AGAIN}")
        warnings.append(f"{found}: {_NOT_BIT_FOR_BIT}")
    return warnings


def _check_state(path: Path, trainer: dict[str, Any], n_latents: int) -> None:
    """Raise `IncompatibleError` unless `train` can have written this record."""
    step, config, validation = trainer["step"], trainer["config"], trainer["validation"]
    metrics, finished = trainer.get("metrics"), trainer["finished"]
    measured = ("step", "vectors", "loss", "fvu", "l0", "dead_fraction") if finished is True else ()
    whole: dict[str, bool] = {
        "config": isinstance(config, dict),
        "step": type(step) is int and isinstance(config, dict) and 0 <= step <= config.get("steps", step),
        "finished": isinstance(finished, bool),
        "metrics": isinstance(metrics, dict)
        and isinstance(metrics.get("loss"), float | int | None)
        and set(measured) <= set(metrics)
        and all(isinstance(metrics[n], float | int) or (metrics[n] is None and n in measured[2:5]) for n in measured),
        "validation": validation is None or _is_validation(validation),
        "curve": is_curve(trainer.get("curve", [])),
    }
    ranges = {"updates": (0, step), "vectors": (0, 2**63), "threads": (1, 4096)}  # more threads would take all memory
    numbers = {name: trainer.get(name, least) for name, (least, _) in ranges.items()}
    whole |= {n: type(x) is int and whole["step"] and ranges[n][0] <= x <= ranges[n][1] for n, x in numbers.items()}
    if finished is False:
        silent = trainer.get("silent")
        whole["silent"] = isinstance(silent, Tensor) and silent.shape == (n_latents,)
        whole |= {name: isinstance(trainer.get(name), dict) for name in ("statistics", "optimizer", "window")}
    begun, source = trainer.get("begun", [0, 0]), trainer.get("started_from")
    whole["started_from"] = source is None or (isinstance(source, dict) and set(source) == {"name", "hash"})
    latest = (step, trainer.get("updates", step))
    whole["begun"] = (whole["step"] and whole["updates"] and isinstance(begun, list) and len(begun) == 2) and all(
        type(n) is int and 0 <= n <= most for n, most in zip(begun, latest, strict=True)
    )
    whole["surroundings"] = isinstance(trainer.get("surroundings", {}), dict)
    for name, good in whole.items():
        if not good:
            reason = f"its training state is damaged ({name} is not what `train` writes)"
            raise IncompatibleError(f"{path}: {reason}; use another checkpoint, or {_START_AGAIN}")


def _is_validation(found: Any) -> bool:
    known = set(Validation._fields)
    if not isinstance(found, dict) or not known - set(Validation._field_defaults) <= set(found) <= known:
        return False
    return all(isinstance(n, float | int | None) for v in found.values() for n in (v if type(v) is list else [v]))


def set_threads(asked: int | None, saved: Sequence[Checkpoint | None], ranks: Ranks = ALONE) -> None:
    """Use the requested number of CPU threads, else that of the checkpoints: sums are split by thread, so the last bits
    depend on it. If other processes of this training run on this machine, the default is a share of the cores."""
    records = [one.trainer for one in saved if one is not None]
    processes = [record.get("surroundings", {}).get("processes", "1") for record in records]
    before = next((record.get("threads") for record in records), None) if {*processes} <= {str(ranks)} else None
    if (threads := asked or before or ranks.share_of_cores()) is not None:
        torch.set_num_threads(threads)
    if before is not None and threads != before:
        say(f"warning: {before} threads before, {threads} now: {_NOT_BIT_FOR_BIT}")


def read_source(plan: RunPlan, data: TrainingData) -> tuple[MLSAE, str]:
    """The autoencoder at --start-from, and a warning or ""; raises `UsageError` if it is the run's own output, is of
    another kind or size, or was trained on documents that are held out here."""
    source, out = plan.config.start_from, plan.config.out
    assert source is not None
    if source.exists() and out.exists() and source.samefile(out):
        raise UsageError(f"--start-from {source} would be replaced by the run's own checkpoint: choose another --out")
    sae, known = read_sae(str(source))
    its, wanted = asdict(sae.config), asdict(plan.model)
    if differing := [name for name in wanted if name != "k" and its[name] != wanted[name]]:
        found = ", ".join(f"{name} is {its[name]} there and {wanted[name]} here" for name in differing)
        raise UsageError(f"--start-from {source}: {found}; give the flags of that autoencoder")
    if not data.split.validation.any():
        return sae, ""
    split = known.store.get("validation") if known.store.get("content_hash") == data.store.content_hash else None
    if not split:
        return sae, f"{source} does not record training on this store: it may have seen the documents held out here"
    here = data.held_out  # With one seed, a smaller fraction is a subset of a larger one.
    if split["seed"] != here["seed"] or split["fraction"] < here["fraction"]:
        flags = f"--validation-fraction {split['fraction']} --validation-seed {split['seed']}"
        raise UsageError(f"--start-from {source} was trained on documents that are held out here: give {flags}")
    return sae, ""
