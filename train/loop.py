"""The training run: plan, start or resume, step, log, validate, save.

Exactness: a step is a function of the weights, the optimiser's moments, the dead-latent counters and batch number
`step` of the loader's stream; all but the last are in the checkpoint, and the stream is a function of the seed. There
is no other random state. So a run that is killed and resumed ends with the same bits as an unbroken one, on the same
kind of device with the same number of threads.

A checkpoint on the way holds the optimiser's moments (three times the size of the weights in all); the last one drops
them, because the learning rate has run out and nothing can follow.

Not here: what a step computes (`train.step`), how rows are ordered (`store.plan`).
"""

import contextlib
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from store.activations import ActivationStore
from store.console import human_bytes, stop_on_signals
from store.errors import Interrupted
from store.loader import Batch, WindowLoader
from store.options import to_toml
from train.batches import VectorSource
from train.config import TrainConfig
from train.hardware import check_memory, resolve_device
from train.kernels import WeightGradients, choose_kernels
from train.losses import DeadLatents, row_weights
from train.metrics import MetricsFile, MetricsWindow, metrics_path
from train.optimizer import SphereAdam, learning_rate
from train.plan import RunPlan, Split, make_plan, memory_estimate, split_tokens
from train.resume import check_output, check_resumable, say, set_threads
from train.sae import MLSAE, Checkpoint, load_checkpoint, save_checkpoint
from train.statistics import DENOMINATOR_VECTORS, FixedStatistics, fixed_statistics
from train.step import StepOptions, training_step
from train.validation import Validation, ValidationData

INTERIM_VALIDATION_TOKENS = 256
"""Held-out tokens of a validation on the way: enough to see a trend, little enough not to be felt."""

_STATISTICS_SEED = 2**31
"""Added to the seed for the stream that the fixed statistics come from, so that it is not the training stream."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

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
    """Train as `config` says, from the start or from its checkpoint.

    Raises `UsageError`, `IncompatibleError` and `ResidscopeError` for what the user can mend, and `Interrupted` after a
    signal, once the state is saved.
    """
    began = time.perf_counter()
    check_output(config)
    with ActivationStore.open(config.store) as store:
        saved = load_checkpoint(config.out) if config.resume and config.out.exists() else None
        split = split_tokens(store, config.validation_fraction, config.seed)
        set_threads(config, saved)
        plan = make_plan(config, store, split)
        if saved is not None:
            check_resumable(config.out, saved, store, plan)
        run = _Run(config, plan, store, split)
        if saved is not None and saved.trainer["finished"]:
            say(f"{config.out} is finished ({plan.steps} steps): nothing to do")
            trainer = saved.trainer
        else:
            trainer = run.execute(saved)
    return TrainResult(
        checkpoint=config.out,
        plan=plan,
        metrics=trainer["metrics"],
        validation=None if trainer["validation"] is None else Validation(**trainer["validation"]),
        seconds=time.perf_counter() - began,
    )


class _Run:
    """The state of one run; `execute` is the whole of it."""

    def __init__(self, config: TrainConfig, plan: RunPlan, store: ActivationStore, split: Split) -> None:
        self.config, self.plan, self.store, self.split = config, plan, store, split
        self.device = resolve_device(config.device)
        self.layers = [store.meta.layers.index(layer) for layer in plan.layers]  # stored layers
        self.source = VectorSource(self.layers, store.meta.stored_dtype, self.device)
        self.kernels = choose_kernels(torch.empty(0, device=self.device), plan.kernels)
        self.validation = ValidationData(store, split.validation, self.layers, plan.seed)
        self.options = StepOptions(
            k=plan.k,
            aux_k=plan.aux_k,
            aux_coef=plan.aux_coef,
            product_dtype=plan.torch_dtype,
            tile_bytes=int(config.tile_mb * 1e6),
        )

    def execute(self, saved: Checkpoint | None) -> dict[str, Any]:
        """Run to the end; returns the last checkpoint's `trainer` entry."""
        plan, config = self.plan, self.config
        self._announce()
        config.out.parent.mkdir(parents=True, exist_ok=True)
        resume_step = 0 if saved is None else saved.trainer["step"]
        file = MetricsFile(metrics_path(config.out), resume_step=resume_step)
        with contextlib.closing(file), stop_on_signals() as stopped:
            config.out.with_suffix(".config.toml").write_text(to_toml(_flags(config)), encoding="utf-8")
            self._start(saved)
            loader = self._loader(plan.seed, plan.window_bytes, start_batch=self.step, epochs=plan.epochs)
            with _closing(loader) as batches, self._progress_bar() as bar:
                self.window.resume_clock()
                while self.step < plan.steps:
                    self._train_on(next(batches))
                    bar.update()
                    last = self.step == plan.steps
                    if self.step % config.log_every == 0 or last:
                        bar.set_postfix_str(_postfix(self._log(file, loader)), refresh=False)
                    if last:
                        break
                    stop = stopped()
                    self.window.stop_clock()
                    if self._due(config.validate_every, default=-(-plan.steps // 4)):
                        self._validate(file, INTERIM_VALIDATION_TOKENS, bar)
                    if stop or self._due(config.checkpoint_every, default=0):
                        file.sync()
                        self._save(finished=False)
                    self.window.resume_clock()
                    if stop:
                        raise Interrupted(
                            f"stopped after step {self.step} of {plan.steps}; {config.out} is saved, and the same "
                            "command with --resume continues"
                        )
                self._validate(file, config.validation_tokens, bar)
                file.sync()
                return self._save(finished=True)

    def _start(self, saved: Checkpoint | None) -> None:
        """Weights, optimiser, counters and statistics, fresh or from a checkpoint."""
        plan = self.plan
        self.step = 0
        self.metrics: dict[str, Any] = {}
        self.validated: Validation | None = None
        self.sae = MLSAE(plan.sae_config) if saved is None else saved.sae
        self.sae.to(self.device).requires_grad_(False)
        self.dead = DeadLatents(plan.n_latents, plan.dead_vectors, self.device)
        if saved is None:
            self.statistics = self._fixed_statistics()
            self.sae.initialize(plan.seed, self.statistics.b_pre)
        else:
            self.statistics = FixedStatistics(**{k: v.to(self.device) for k, v in saved.trainer["statistics"].items()})
        self.optimizer = SphereAdam(self.sae, self.kernels)
        # Memory for the gradients, used again in each step: fresh memory costs as much as the sums in it.
        self.gradients = WeightGradients(
            torch.empty_like(self.sae.W_enc),
            torch.empty_like(self.sae.W_dec),
            torch.empty(plan.n_latents, device=self.device),
        )
        raw = plan.loss_space == "raw"
        self.denominators = self.statistics.raw if raw else self.statistics.standardized
        self.window = MetricsWindow(self.statistics.raw)
        self.waited = 0.0
        if saved is not None:
            self.step = saved.trainer["step"]
            self.optimizer.load_state_dict(saved.trainer.pop("optimizer"))  # pop: it is twice as large as the weights
            self.dead.silent.copy_(saved.trainer["silent"])
            self.window.load_state_dict(saved.trainer["window"])
            self.metrics = saved.trainer["metrics"]
            before = saved.trainer["validation"]
            self.validated = None if before is None else Validation(**before)
            say(f"resuming {self.config.out} after step {self.step} of {plan.steps}")

    def _fixed_statistics(self) -> FixedStatistics:
        plan, meta = self.plan, self.store.meta
        sample_bytes = DENOMINATOR_VECTORS * meta.d_model * meta.itemsize
        loader = self._loader(plan.seed + _STATISTICS_SEED, min(plan.window_bytes, sample_bytes), epochs=1)
        with _closing(loader) as batches:
            return fixed_statistics(self.source.stream(batches), self.sae.standardize, plan.layers)

    def _loader(self, seed: int, window_bytes: int, *, epochs: int, start_batch: int = 0) -> WindowLoader:
        return WindowLoader(
            self.store,
            self.split.train,
            self.plan.batch_size,
            seed,
            window_bytes,
            layers=self.layers,
            epochs=epochs,
            start_batch=start_batch,
        )

    def _train_on(self, batch: Batch) -> None:
        """One step, `self.step` counts it."""
        plan = self.plan
        x, layer = self.source(batch)
        standardized = self.sae.standardize(x)
        rows = row_weights(layer, standardized.std, self.denominators, raw=plan.loss_space == "raw")
        weights = self.optimizer.weights
        result = training_step(weights, standardized.x, rows, self.dead, self.options, self.kernels, out=self.gradients)
        self.window.add(layer, standardized, result)
        self.optimizer.step(result.gradients, lr=self._lr(self.step), step=self.step + 1)
        self.step += 1

    def _lr(self, step: int) -> float:
        plan = self.plan
        return learning_rate(
            step, plan.steps, plan.lr, warmup_fraction=plan.warmup_fraction, decay_fraction=plan.decay_fraction
        )

    def _progress(self) -> dict[str, Any]:
        """Where the run is, by step, vectors, tokens and epochs."""
        plan = self.plan
        vectors = min(self.step * plan.batch_size, plan.vectors)
        return {
            "step": self.step,
            "vectors": vectors,
            "tokens": vectors // len(plan.layers),
            "epoch": vectors / plan.vectors_per_epoch,
        }

    def _log(self, file: MetricsFile, loader: WindowLoader) -> dict[str, Any]:
        """Write the metrics since the last line, and start a new window."""
        window = self.window
        window.stop_clock()
        self.metrics = self._progress() | window.line()
        self.metrics |= {"dead_fraction": self.dead.fraction(), "lr": self._lr(self.step - 1)}
        line = self.metrics | {
            "vectors_per_second": window.vectors / window.seconds,
            "data_wait_fraction": min(1.0, (loader.wait_seconds - self.waited) / window.seconds),
        }
        self.waited = loader.wait_seconds
        window.clear()
        window.resume_clock()
        file.write(line)
        return line

    def _validate(self, file: MetricsFile, tokens: int, bar: tqdm) -> None:
        if not self.validation:
            return
        self.validated = self.validation.evaluate(
            self.sae, self.source, tokens=tokens, product_dtype=self.options.product_dtype
        )
        file.write(self._progress() | self.validated.metrics())
        text = f"validation FVU {self.validated.fvu:.3f}"
        bar.set_description(text, refresh=False)
        if bar.disable:
            say(f"step {self.step} of {self.plan.steps}: {text}")

    def _progress_bar(self) -> tqdm:
        """On a terminal a bar, elsewhere nothing: a log gets a line at each validation instead."""
        return tqdm(
            total=self.plan.steps,
            initial=self.step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=None,
        )

    def _due(self, every: int | None, *, default: int) -> bool:
        every = default if every is None else every
        return every > 0 and self.step % every == 0

    def _save(self, *, finished: bool) -> dict[str, Any]:
        """Write the checkpoint. It holds no times, so that equal runs give equal files."""
        meta, plan = self.store.meta, self.plan
        store = {
            "content_hash": self.store.content_hash,
            "path": self.store.path.name,
            "d_model": meta.d_model,
            "layers": list(plan.layers),
            "model": meta.provenance.get("model"),
            "random_init": bool(meta.provenance.get("random_init")),
            "lens": meta.lens,
            "validation": {
                "fraction": plan.validation_fraction,
                "seed": plan.seed,
                "n_documents": self.split.n_documents,
            },
        }
        trainer: dict[str, Any] = {
            "step": self.step,
            "finished": finished,
            "config": plan.to_dict(),
            "threads": torch.get_num_threads(),
            "metrics": self.metrics,
            "validation": None if self.validated is None else self.validated._asdict(),
            "silent": self.dead.silent.cpu(),
            "statistics": {name: value.cpu() for name, value in self.statistics._asdict().items()},
        }
        if not finished:
            trainer |= {"optimizer": self.optimizer.state_dict(), "window": self.window.state_dict()}
        save_checkpoint(self.config.out, self.sae, store=store, trainer=trainer)
        return trainer

    def _announce(self) -> None:
        """Say once what will run, on what, and how much memory it takes; refuse what does not fit."""
        plan, store = self.plan, self.store
        memory = memory_estimate(plan, store, int(self.config.tile_mb * 1e6))
        say(
            f"{plan.n_latents} latents, k {plan.k}, {len(self.layers)} layers of d_model {plan.d_model}; "
            f"{plan.steps} steps of {plan.batch_size} vectors ({plan.vectors / plan.vectors_per_epoch:.3g} epochs)"
        )
        say(
            f"{plan.device}, {plan.product_dtype} product, {plan.kernels} kernels, {torch.get_num_threads()} threads; "
            f"memory about {human_bytes(memory.device)} and {human_bytes(memory.shuffle)} for the shuffle"
        )
        way_out = "lower --expansion-factor, --batch-size or --window-gb"
        on_cpu = self.device.type == "cpu"
        check_memory(memory.shuffle + (memory.device if on_cpu else 0), torch.device("cpu"), way_out)
        if not on_cpu:
            check_memory(memory.device, self.device, way_out)


def _closing(loader: WindowLoader) -> contextlib.closing[Generator[Batch]]:
    """The loader's batches; on leaving, its reading thread is told to stop."""
    return contextlib.closing(cast("Generator[Batch]", iter(loader)))


def _flags(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name not in ("resume", "overwrite", "json")}


def _postfix(line: dict[str, Any]) -> str:
    return (
        f"FVU {line['fvu']:.3f}, L0 {line['l0']:.1f}, dead {line['dead_fraction']:.1%}, "
        f"{line['vectors_per_second']:.0f} vectors/s, data wait {line['data_wait_fraction']:.0%}"
    )
