"""The training loop: one stream of batches feeds one run or many; resolve, start or resume, step, log, validate, save.

Exactness: a run's step is a function of its state, which its checkpoint holds, and of batch number `step` of the
loader's stream, which is a function of the seed. There is no other random state. So a run that is killed and resumed
ends with the same bits as an uninterrupted one, on the same kind of device with the same number of threads; and a run
among many ends with the same bits as it would alone. After a kill, the runs of a sweep may stand at different steps:
the stream then starts at the earliest of these, and each run waits for its own next batch.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from residscope.console import counted, stop_on_signals
from residscope.errors import IncompatibleError, Interrupted, UsageError
from residscope.options import with_values
from store.activations import ActivationStore
from store.care.outliers import few_tokens
from train.checkpoint import Checkpoint
from train.config import TrainConfig
from train.data import TrainingData, Vectors, stored_layers
from train.determinism import deterministic
from train.grid import RunSpec, expand
from train.hardware import resolve_device
from train.kernels.interface import WeightGradients
from train.objective.statistics import statistics_of
from train.parallel.follow import wait_for_store
from train.parallel.ranks import ALONE, Ranks
from train.reporting import announce
from train.reporting.dry_run import DryRun, foresee, time_steps
from train.reporting.outputs import check_publish, push, write_outputs
from train.reporting.report import TrainResult, table_path
from train.resolve import RunPlan, make_plan, memory_estimate
from train.resume import as_begun, check_resumable, is_longer, load_saved, require_alike, restart_warning, set_threads
from train.trainer import Trainer
from train.validation import INTERIM_CHUNKS, INTERIM_TOKENS, Validation, ValidationData, ValidationTarget


def train(config: TrainConfig) -> TrainResult:
    """Train the single run that `config` describes, from the start or from its checkpoint.

    Raises `ResidscopeError` or a subclass for what the user can fix, `Interrupted` after a signal, with all saved.
    """
    (result,) = train_all(config)
    return result


def train_all(config: TrainConfig, ranks: Ranks = ALONE) -> list[TrainResult]:
    """Like `train`, for all runs of a sweep or of --per-layer, in one pass over the data. All `ranks` take part; only
    the first prints and writes files."""
    began = time.perf_counter()
    check_publish(config.publish)
    with _opened(config, ranks) as store:
        specs = _specs(config, store)
        saved = load_saved(specs, ranks)
        if config.sweep or config.per_layer:
            table_path(config.out, specs[0].config.out)
        data, plans = _planned(config, store, as_begun(specs, saved), ranks)
        if data.follower:
            data.follower.require_once(plans[0].epochs, ranks.size)
        for plan, checkpoint in zip(plans, saved, strict=True):
            if checkpoint is not None:
                check_resumable(checkpoint, store, plan, ranks)
        require_alike(store, plans, saved, ranks)
        announce.warn({restart_warning(plan, c) for plan, c in zip(plans, saved, strict=True) if c is not None})
        set_threads(config.hardware.threads, saved, ranks)
        finished = [
            None if c is None or not c.trainer["finished"] or is_longer(plan, c) else c.trainer
            for plan, c in zip(plans, saved, strict=True)
        ]
        records = _train_unfinished(data, plans, saved, finished)
    seconds = time.perf_counter() - began
    results = []
    for plan, before, record in zip(plans, finished, records, strict=True):
        held_out = None if record["validation"] is None else Validation(**record["validation"])
        curve = record.get("curve", [])
        result = TrainResult(plan=plan, metrics=record["metrics"], validation=held_out, curve=curve, seconds=seconds)
        results.append(result)
        if not result.diverged and ranks.first:  # the weights of a diverged run are useless
            write_outputs(result, anew=before is None)
    if config.publish.push_to_hub is not None and ranks.first:
        announce.say(f"uploaded to {push(results, config.publish)}")
    return results


def try_run(config: TrainConfig, ranks: Ranks = ALONE) -> DryRun:
    """Estimate the time, memory and disk of `train_all` by timing a few of its steps; write nothing."""
    with _opened(config, ranks) as store:
        set_threads(config.hardware.threads, [], ranks)
        specs, memory = _specs(config, store), dict[int, WeightGradients]()
        saved = load_saved(specs, ranks) if config.resume else [None] * len(specs)
        data, plans = _planned(config, store, as_begun(specs, saved), ranks)
        trainers, resumed = [Trainer(plan, data, memory) for plan in plans], [one is not None for one in saved]
        del saved
        announce.warn({t.read_source() for t, is_resumed in zip(trainers, resumed, strict=True) if not is_resumed})
        return _Stream(data, dict.fromkeys(trainers), len(trainers)).measure()


@contextlib.contextmanager
def _opened(config: TrainConfig, ranks: Ranks) -> Iterator[ActivationStore]:
    """The open store, with torch in deterministic mode if wanted."""
    if max(config.n_procs, config.shard_latents) > ranks.size:
        raise UsageError("--n-procs and --shard-latents are for the command `train`, which starts the processes")
    device = resolve_device(config.hardware.device)
    if config.follow:
        wait_for_store(config.store)
    only_deterministic = deterministic(device, config.hardware.deterministic)
    with ActivationStore.open(config.store, follow=True) as store, only_deterministic:
        yield store


def _specs(config: TrainConfig, store: ActivationStore) -> list[RunSpec]:
    return expand(config, [store.meta.layers[i] for i in stored_layers(store, config.data.layers)])


def _planned(
    config: TrainConfig, store: ActivationStore, specs: Sequence[RunSpec], ranks: Ranks
) -> tuple[TrainingData, list[RunPlan]]:
    """The data that all runs share, and the plan of each."""
    first = specs[0].config
    stream = {"batch_size": first.data.batch_size, "validation_seed": first.validation.validation_seed}
    data = TrainingData.open(with_values(config, **stream), store, ranks)
    return data, [make_plan(spec, data) for spec in specs]


def _train_unfinished(
    data: TrainingData,
    plans: Sequence[RunPlan],
    saved: list[Checkpoint | None],
    finished: Sequence[dict[str, Any] | None],
) -> list[dict[str, Any]]:
    """Train all runs to the end; returns the `trainer` entry of each run's last checkpoint, for runs in `finished` as
    it is there. Empties `saved`, so that a checkpoint stays in memory only until its run has taken what it needs."""
    memory, warnings = dict[int, WeightGradients](), set[str]()
    left: dict[Trainer, Checkpoint | None] = {}
    for plan, record in zip(plans, finished, strict=True):
        if record is not None:
            saved.pop(0)
            announce.tell_finished(plan, record["metrics"])
            continue
        left[trainer := Trainer(plan, data, memory)] = saved.pop(0)
        if left[trainer] is None:
            warnings.add(trainer.read_source())
    data.ranks.require_same(**{"--start-from": [trainer.started_from for trainer in left]})
    announce.warn(warnings)
    if data.follower and data.config.follow and not left:  # A new store, or a crash before `harvest` was told.
        data.follower.end()
    done = iter(_Stream(data, left, len(plans)).execute() if left else ())
    return [next(done) if record is None else record for record in finished]


class _Stream:
    """One pass of the data through all unfinished runs: `execute` does everything."""

    def __init__(self, data: TrainingData, saved: dict[Trainer, Checkpoint | None], n_runs: int) -> None:
        """saved: the trainers and the checkpoints they continue from; n_runs: all runs, finished ones included."""
        self.config, self.data, self.saved, self.n_runs, self.ranks = data.config, data, saved, n_runs, data.ranks
        self.trainers = list(saved)
        self.plans = [trainer.plan for trainer in self.trainers]
        self.plan = self.plans[0]  # only used for what all plans share
        self.validation = ValidationData(data.store, data.split.validation, data.stored, data.held_out["seed"])
        self.waited, self.step = 0.0, 0
        self.memory = memory_estimate(self.plans, data.store, data.ranks)

    def execute(self) -> list[dict[str, Any]]:
        """Train to the end; returns the `trainer` entry of each run's last checkpoint."""
        announce.tell_plans(self.plans, self.n_runs, self.memory)
        announce.refuse_too_large(self.memory, self.data.device, self.n_runs)
        split, follower = self.data.split, self.data.follower
        while follower and not follower.ready(0):
            time.sleep(0.05)
        if follower:  # Raises if this training comes too late, before anything is replaced.
            done = min(0 if one is None else one.trainer["step"] for one in self.saved.values())
            follower.expect(self.data.loader(0, 1).part_ends, self.data.batch_size, done)
        looked_at = split.validation if follower else split.train | split.validation
        if few := few_tokens(self.data.store, looked_at, layers=self.data.stored):
            announce.say(f"warning: {few.words}")
        self.ranks.any(False)  # a barrier: every rank has seen the files and the free memory before they change
        with contextlib.ExitStack() as stack:
            for trainer in self.trainers if self.ranks.first else ():
                stack.enter_context(trainer.files(self.saved[trainer]))
            stopped = stack.enter_context(stop_on_signals())
            for trainer in self.trainers if self.ranks.first else ():
                trainer.claim(self.saved[trainer])
            if follower:
                follower.begin(stopped)
            self._start()
            whole = {"epochs": self.plan.epochs, "start_batch": self.step, "ranks": self.ranks.rows}
            loader = self.data.loader(self.config.data.seed, self.plan.window_bytes, **whole)
            batches = stack.enter_context(self.data.arriving(loader))
            bar = stack.enter_context(announce.progress_bar(self.step, self.plan.steps))
            behind = [each for each in self.trainers if each.step == self.step and each.last_looked < self.step]
            if behind and self.step < self.plan.steps and self._validation_is_due():
                self._validate(behind, bar)  # A damaged store may have cut it short.
            self.began = time.perf_counter()
            while self.step < self.plan.steps:
                taking = [trainer for trainer in self.trainers if trainer.step == self.step]
                with self._keeping(taking):
                    asked = time.perf_counter()
                    vectors = next(batches)
                    self.waited += time.perf_counter() - asked
                self._train_on(vectors, taking)
                bar.update()
                last = self.step == self.plan.steps
                if self.step % self.config.logging.log_every == 0 or last:
                    bar.set_postfix_str(self._log(taking), refresh=False)
                if not last:
                    self._between_steps(taking, bar, stop=self.ranks.any(stopped()))
            self._validate(self.trainers, bar, last=True)
            records = [trainer.save(finished=True) for trainer in self.trainers]
            if follower:
                follower.end()
            return records

    def measure(self) -> DryRun:
        """Time some steps without writing anything."""
        announce.tell_plans(self.plans, self.n_runs, None)  # the result says how much memory
        announce.refuse_too_large(self.memory, self.data.device, self.n_runs)
        self.ranks.any(False)  # a barrier: every rank has seen the free memory before it is taken
        self._start()
        whole = {"epochs": self.plan.epochs, "ranks": self.ranks.rows}
        loader = self.data.loader(self.config.data.seed, self.plan.window_bytes, **whole)
        with self.data.arriving(loader) as batches:
            ends = self.plan, self.data.device, self.ranks
            seconds = time_steps(lambda: self._train_on(next(batches), self.trainers), *ends)
        return foresee(self.plans, self.data.store, self.memory, seconds)

    def _start(self) -> None:
        """Bring each run to the state of its checkpoint, or to its beginning."""
        fresh = [trainer.view for trainer in self.trainers if self.saved[trainer] is None]
        found = statistics_of(fresh, self.data, self.plan.window_bytes)
        for trainer in self.trainers:
            # Popped, so that a checkpoint's moments are not in memory together with the run's own.
            trainer.start(self.saved.pop(trainer) or found[trainer.view])
        if all(trainer.diverged for trainer in self.trainers) and len(self.trainers) == self.n_runs:
            self._stop_or_warn(self.trainers)
        self.step = self.logged = min(trainer.step for trainer in self.trainers)

    def _train_on(self, vectors: Vectors, taking: Sequence[Trainer]) -> None:
        """One step of each trainer in `taking`; `self.step` counts it."""
        for trainer in taking:
            trainer.take(vectors)
        self.step += 1

    def _between_steps(self, taking: Sequence[Trainer], bar: tqdm, *, stop: bool) -> None:
        """Validate and save when due, and stop if a signal has come; none of this counts as training time."""
        paused = time.perf_counter()
        if self._validation_is_due():
            self._validate(taking, bar)
        if stop:
            raise Interrupted(self._stopped(taking))
        follower = self.data.follower
        part_used = follower is not None and follower.is_due(self.step)
        if self._due(self.config.logging.checkpoint_every) or part_used:
            for trainer in taking:
                trainer.save(finished=False)
        if follower and part_used:
            follower.publish(self.step)
        self.began += time.perf_counter() - paused

    @contextlib.contextmanager
    def _keeping(self, taking: Sequence[Trainer]) -> Iterator[None]:
        """Save the runs if the store turns out to be damaged or replaced: none of the bad data has been used."""
        try:
            yield
        except Interrupted:
            raise Interrupted(self._stopped(taking)) from None
        except IncompatibleError as error:
            if self.ranks.size > 1:  # saving needs all ranks, and the others wait elsewhere
                raise
            raise IncompatibleError(f"{error}. Training {self._stopped(taking)}") from None

    def _stopped(self, taking: Sequence[Trainer]) -> str:
        """Save the runs before training ends early; returns a message for the user."""
        where = f"stopped after step {self.step} of {self.plan.steps}"
        if self.step == 0:
            return f"{where}; nothing is saved"
        for trainer in taking:
            trainer.save(finished=False)
        saved = f"{self.config.out} is" if self.n_runs == 1 else f"{counted(self.n_runs, 'checkpoint')} are"
        return f"{where}; {saved} saved. Continue with the same command and --resume"

    def _validation_is_due(self) -> bool:
        every = self.config.validation.validate_every
        return self._due(-(-self.plan.steps // 4) if every is None else every)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log(self, taking: Sequence[Trainer]) -> str:
        """Write the metrics since the last line and start a new window; returns the text of the progress bar."""
        seconds, waited, self.waited = time.perf_counter() - self.began, self.waited, 0.0
        sound = [trainer for trainer in taking if not trainer.diverged]
        lines = [trainer.log(seconds=seconds, waited=waited) for trainer in taking]
        self._stop_or_warn([trainer for trainer in sound if trainer.diverged])
        streamed, self.logged = (self.step - self.logged) * self.data.batch_size, self.step
        self.began = time.perf_counter()
        return announce.bar_words(lines, self.data, vectors=streamed, seconds=seconds, waited=waited)

    def _stop_or_warn(self, diverged: Sequence[Trainer]) -> None:
        """Warn of runs that have just diverged; raise when none is left."""
        where, left = f"step {self.step} of {self.plan.steps}", any(not trainer.diverged for trainer in self.trainers)
        announce.tell_diverged(where, [trainer.path for trainer in diverged], any_left=left)

    def _validate(self, taking: Sequence[Trainer], bar: tqdm, *, last: bool = False) -> None:
        """Validate on a sample of held-out tokens, the same each time, and at the end on as many as the flags ask."""
        if not self.validation:
            return
        targets = [ValidationTarget(each.sae, each.plan.torch_dtype, each.view.position) for each in taking]
        with self._keeping(taking):
            look = partial(self.validation.evaluate, targets, self.data.source)
            found = sample = look(tokens=INTERIM_TOKENS, chunks=INTERIM_CHUNKS)
            if last:
                found = look(tokens=self.config.validation.validation_tokens)
        for trainer, looked, validated in zip(taking, sample, found, strict=True):
            trainer.look(looked)
            trainer.record(validated)
        announce.tell_validation(bar, f"step {self.step} of {self.plan.steps}", sample)
