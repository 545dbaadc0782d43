"""The training loop: one stream of batches feeds one run or many; plan, start or resume, step, log, validate, save.

Exactness: a run's step is a function of its state, which its checkpoint holds, and of batch number `step` of the
loader's stream, which is a function of the seed. There is no other random state. So a run that is killed and resumed
ends with the same bits as an unbroken one, on the same kind of device with the same number of threads; and a run among
many ends with the same bits as alone. After a kill, the runs of a sweep may have been saved at different steps: the
stream then starts where the last of them stands, and each run waits for its own next batch.

Not here: what a run does with a batch (`train.trainer`), which runs there are (`train.grid`), how rows are ordered
(`store.shuffle`), what is said on the way (`train.reporting.announce`).
"""

import contextlib
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from residscope.console import counted, stop_on_signals
from residscope.errors import Interrupted, ResidscopeError
from store.activations import ActivationStore
from store.loader import Batch, WindowLoader
from train.config import TrainConfig
from train.data import VectorSource
from train.determinism import deterministic
from train.grid import RunSpec, expand
from train.hardware import resolve_device
from train.metrics import Stopwatch
from train.model import Checkpoint
from train.objective.statistics import DENOMINATOR_VECTORS, StatisticsSums, sample
from train.reporting.announce import announce, bar_words, progress_bar, refuse_too_large, spread
from train.reporting.dry_run import MEASURED_SECONDS, MEASURED_STEPS, WARM_STEPS, DryRun, foresee
from train.reporting.outputs import check_hub, push, write_outputs
from train.reporting.trackers import check_installed
from train.resolve import RunPlan, make_plan, memory_estimate, split_tokens, stored_layers
from train.resume import check_output, check_resumable, load_saved, say, set_threads
from train.trainer import Run, Shared
from train.validation import Validation, ValidationData

INTERIM_VALIDATION_TOKENS = 256
"""Held-out tokens of a validation on the way: enough to see a trend, little enough not to be felt."""

_STATISTICS_SEED = 2**31
"""Added to the seed for the stream that the fixed statistics come from, so that it is not the training stream."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

    spec: RunSpec
    """Which run of the invocation it is."""

    checkpoint: Path
    """The file that holds the autoencoder."""

    plan: RunPlan
    """What was run."""

    metrics: dict[str, Any]
    """The last line of training metrics, or what the checkpoint says of it."""

    validation: Validation | None
    """On held-out documents; None if none were held out."""

    seconds: float
    """Time of this invocation, from the start to the last checkpoint."""


def train(config: TrainConfig) -> TrainResult:
    """Train the one run that `config` says, from the start or from its checkpoint.

    Raises `UsageError`, `IncompatibleError` and `ResidscopeError` for what the user can mend, and `Interrupted` after a
    signal, once the state is saved.
    """
    (result,) = train_all(config)
    return result


def train_all(config: TrainConfig) -> list[TrainResult]:
    """As `train`, for all the runs of a sweep or of single layers, in one pass over the data."""
    began = time.perf_counter()
    check_installed(config)
    check_hub(config)
    with (
        ActivationStore.open(config.store) as store,
        deterministic(resolve_device(config.device), config.deterministic),
    ):
        specs = _specs(config, store)
        for spec in specs:
            check_output(spec.config)
        saved = load_saved(specs)
        shared = _shared(config, store)
        plans = [make_plan(spec.config, store, shared.split, spec.layer) for spec in specs]
        for spec, plan, checkpoint in zip(specs, plans, saved, strict=True):
            if checkpoint is not None:
                check_resumable(spec.config.out, checkpoint, store, plan)
        set_threads(config, saved)
        trainers: dict[int, dict[str, Any]] = {}
        left: list[tuple[Run, Checkpoint | None]] = []
        for index, (spec, plan, checkpoint) in enumerate(zip(specs, plans, saved, strict=True)):
            if checkpoint is not None and checkpoint.trainer["finished"]:
                sound = math.isfinite(checkpoint.trainer["metrics"]["loss"] or 0)
                how = "" if sound else ", and its loss was no number: start it anew by itself, with a lower --lr"
                say(f"{spec.config.out} is finished ({plan.steps} steps): nothing to do{how}")
                trainers[index] = checkpoint.trainer
            else:
                left.append((Run(spec, plan, shared), checkpoint))
        finished = set(trainers)
        if left:
            done = iter(_Stream(config, shared, left, len(specs)).execute())
            trainers |= {index: next(done) for index in range(len(specs)) if index not in trainers}
    seconds = time.perf_counter() - began
    results = [_result(*pair, trainers[i], seconds) for i, pair in enumerate(zip(specs, plans, strict=True))]
    for index, result in enumerate(results):
        validated = 0 if result.validation is None else result.validation.fvu
        if math.isfinite((result.metrics["loss"] or 0) + validated):  # what diverged is nothing to give away
            write_outputs(result, anew=index not in finished)
    if config.push_to_hub is not None:
        say(f"uploaded to {push(results, config.push_to_hub, private=config.hub_private, license=config.hub_license)}")
    return results


def try_run(config: TrainConfig) -> DryRun:
    """What `train_all` would take: a few of its steps are made and thrown away, and nothing is written."""
    device = resolve_device(config.device)
    with ActivationStore.open(config.store) as store, deterministic(device, config.deterministic):
        set_threads(config, [])
        shared = _shared(config, store)
        specs = _specs(config, store)
        runs = [Run(spec, make_plan(spec.config, store, shared.split, spec.layer), shared) for spec in specs]
        return _Stream(config, shared, [(run, None) for run in runs], len(runs)).measure()


def _specs(config: TrainConfig, store: ActivationStore) -> list[RunSpec]:
    return expand(config, [store.meta.layers[i] for i in stored_layers(store, config.layers)])


def _shared(config: TrainConfig, store: ActivationStore) -> Shared:
    layers = stored_layers(store, config.layers)
    device = resolve_device(config.device)
    split = split_tokens(store, config.validation_fraction, config.seed)
    return Shared(
        store=store,
        split=split,
        device=device,
        layers=tuple(store.meta.layers[i] for i in layers),
        source=VectorSource(layers, store.meta.stored_dtype, device),
        validation=ValidationData(store, split.validation, layers, config.seed),
    )


def _result(spec: RunSpec, plan: RunPlan, trainer: dict[str, Any], seconds: float) -> TrainResult:
    return TrainResult(
        spec=spec,
        checkpoint=spec.config.out,
        plan=plan,
        metrics=trainer["metrics"],
        validation=None if trainer["validation"] is None else Validation(**trainer["validation"]),
        seconds=seconds,
    )


class _Stream:
    """One pass of the data through all runs that are not finished; `execute` is the whole of it."""

    def __init__(
        self, config: TrainConfig, shared: Shared, runs: Sequence[tuple[Run, Checkpoint | None]], n_runs: int
    ) -> None:
        """n_runs: of the whole invocation, finished ones too."""
        self.config, self.shared, self.n_runs = config, shared, n_runs
        self.saved = dict(runs)
        self.runs = list(self.saved)
        self.plans = [run.plan for run in self.runs]
        self.plan = self.plans[0]  # of which only what all plans share is used here
        self.layers = [shared.store.meta.layers.index(layer) for layer in shared.layers]  # stored layers
        self.step = 0
        self.watch = Stopwatch()
        self.waited = 0.0
        self.memory = memory_estimate(self.plans, shared.store)

    def execute(self) -> list[dict[str, Any]]:
        """Run to the end; the `trainer` entry of each run's last checkpoint."""
        plan, config = self.plan, self.config
        announce(self.plans, len(self.layers), self.n_runs, self.memory)
        refuse_too_large(self.memory, self.shared.device, self.n_runs)
        with contextlib.ExitStack() as stack:
            for run in self.runs:
                stack.enter_context(run.files(self.saved[run]))
            stopped = stack.enter_context(stop_on_signals())
            for run in self.runs:
                if self.saved[run] is None:
                    run.begin_anew()
                run.write_flags()
            self._start()
            loader = self._loader(plan.seed, plan.window_bytes, start_batch=self.step, epochs=plan.epochs)
            batches = stack.enter_context(_closing(loader))
            bar = stack.enter_context(progress_bar(self.step, plan.steps))
            self.watch.start()
            while self.step < plan.steps:
                taking = [run for run in self.runs if run.step == self.step]
                self._train_on(next(batches), taking)
                bar.update()
                last = self.step == plan.steps
                if self.step % config.log_every == 0 or last:
                    bar.set_postfix_str(self._log(taking, loader), refresh=False)
                if last:
                    break
                stop = stopped()
                self.watch.stop()
                if self._due(config.validate_every, default=-(-plan.steps // 4)):
                    self._validate(taking, INTERIM_VALIDATION_TOKENS, bar)
                if stop or self._due(config.checkpoint_every, default=0):
                    for run in taking:
                        run.save(finished=False)
                self.watch.start()
                if stop:
                    raise Interrupted(
                        f"stopped after step {self.step} of {plan.steps}; {self._outputs()} saved, and the same "
                        "command with --resume continues"
                    )
            self._validate(self.runs, config.validation_tokens, bar)
            return [run.save(finished=True) for run in self.runs]

    def measure(self) -> DryRun:
        """Time some steps without writing anything."""
        plan = self.plan
        announce(self.plans, len(self.layers), self.n_runs, None)  # the result says how much memory
        refuse_too_large(self.memory, self.shared.device, self.n_runs)
        self._start()
        seconds: list[float] = []
        with _closing(self._loader(plan.seed, plan.window_bytes, epochs=plan.epochs)) as batches:
            while self.step < plan.steps and (len(seconds) < MEASURED_STEPS and sum(seconds) < MEASURED_SECONDS):
                began = time.perf_counter()
                self._train_on(next(batches), self.runs)
                if self.shared.device.type == "cuda":
                    torch.cuda.synchronize(self.shared.device)
                if self.step > WARM_STEPS or self.step == plan.steps:
                    seconds.append(time.perf_counter() - began)
        return foresee(self.plans, self.shared.store, self.memory, seconds)

    def _start(self) -> None:
        """Bring each run to where its checkpoint stands, or to its beginning; one pass gathers all statistics."""
        fresh = [run for run in self.runs if self.saved[run] is None]
        sums: dict[tuple[Any, int | None], StatisticsSums] = {}  # runs that look at their data alike share them
        for run in fresh:
            key = (run.plan.sae_config.standardize, run.position)
            sums.setdefault(key, run.statistics_sums())
        if fresh:
            meta, plan = self.shared.store.meta, self.plan
            sample_bytes = DENOMINATOR_VECTORS * meta.d_model * meta.itemsize
            loader = self._loader(plan.seed + _STATISTICS_SEED, min(plan.window_bytes, sample_bytes), epochs=1)
            views = {key: next(r for r in fresh if r.position == key[1]) for key in sums}
            with _closing(loader) as batches:
                for batch in sample(self.shared.source.stream(batches)):
                    for key, view in views.items():
                        sums[key].add(*view.own(batch))
        found = {key: each.finish() for key, each in sums.items()}
        for run in self.runs:
            # Popped, so that a checkpoint's optimiser is not held beside the run's own.
            run.start(self.saved.pop(run) or found[run.plan.sae_config.standardize, run.position])
        if all(run.diverged for run in self.runs) and len(self.runs) == self.n_runs:
            self._stop_or_warn(self.runs)
        self.step = self.logged = min(run.step for run in self.runs)

    def _loader(self, seed: int, window_bytes: int, *, epochs: int, start_batch: int = 0) -> WindowLoader:
        return WindowLoader(
            self.shared.store,
            self.shared.split.train,
            self.plan.batch_size,
            seed,
            window_bytes,
            layers=self.layers,
            epochs=epochs,
            start_batch=start_batch,
            check_places=True,
        )

    def _train_on(self, batch: Batch, taking: Sequence[Run]) -> None:
        """One step of each of the runs `taking`, `self.step` counts it."""
        vectors = self.shared.source(batch)
        for run in taking:
            run.take(vectors)
        self.step += 1

    def _log(self, taking: Sequence[Run], loader: WindowLoader) -> str:
        """Write the metrics since the last line, and start a new window; words for the progress bar."""
        self.watch.stop()
        seconds = self.watch.seconds
        waited, self.waited = loader.wait_seconds - self.waited, loader.wait_seconds
        sound = [run for run in taking if not run.diverged]
        lines = [run.log(seconds=seconds, waited=waited) for run in taking]
        self._stop_or_warn([run for run in sound if run.diverged])
        streamed, self.logged = (self.step - self.logged) * self.plan.batch_size, self.step
        self.watch = Stopwatch()
        self.watch.start()
        return bar_words(
            lines, self.shared.store, vectors=streamed, n_layers=len(self.layers), seconds=seconds, waited=waited
        )

    def _stop_or_warn(self, diverged: Sequence[Run]) -> None:
        """Say which runs' loss has just become no number; without a sound run left there is nothing to go on for."""
        where = f"step {self.step} of {self.plan.steps}: the loss is no number any more"
        way_out = "lower --lr, or set --clip-norm"
        if diverged and all(run.diverged for run in self.runs):
            raise ResidscopeError(f"{where}: {way_out}")
        for run in diverged:
            say(f"warning: {run.path}: {where}, and its weights are worth nothing: {way_out}")

    def _validate(self, taking: Sequence[Run], tokens: int, bar: tqdm) -> None:
        data = self.shared.validation
        if not data:
            return
        found = data.evaluate_all([run.subject() for run in taking], self.shared.source, tokens=tokens)
        for run, validated in zip(taking, found, strict=True):
            run.record(validated)
        text = f"validation FVU {spread([validated.fvu for validated in found], '.3f')}"
        bar.set_description(text, refresh=False)
        if bar.disable:
            say(f"step {self.step} of {self.plan.steps}: {text}")

    def _due(self, every: int | None, *, default: int) -> bool:
        every = default if every is None else every
        return every > 0 and self.step % every == 0

    def _outputs(self) -> str:
        return f"{self.config.out} is" if self.n_runs == 1 else f"{counted(self.n_runs, 'checkpoint')} are"


def _closing(loader: WindowLoader) -> contextlib.closing[Generator[Batch]]:
    """The loader's batches; on leaving, its reading thread is told to stop."""
    return contextlib.closing(cast("Generator[Batch]", iter(loader)))
