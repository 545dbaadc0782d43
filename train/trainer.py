"""One autoencoder in training: its weights, optimiser, counters, metrics file and checkpoint.

A run takes batches of the stream and does with them what its plan says; where they come from, and how many runs take
the same ones, is not its business (`train.run`). A step is a function of the weights, the optimiser's moments, the
counters of dead latents and the batch: all but the last are in the checkpoint.

A checkpoint on the way holds the optimiser's moments (three times the size of the weights in all); the last one drops
them, because the learning rate has run out and nothing can follow.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from residscope.names import beside
from residscope.options import to_toml
from store.activations import ActivationStore
from train.config import TrainConfig
from train.data import Vectors, VectorSource
from train.grid import RunSpec
from train.kernels.choose import choose_kernels
from train.kernels.interface import WeightGradients
from train.metrics import MetricsFile, MetricsWindow, metrics_path
from train.model import MLSAE, Checkpoint, safetensors_path, save_checkpoint
from train.objective.averaging import WeightAverage
from train.objective.losses import DeadLatents, row_weights
from train.objective.optimizer import SphereAdam, learning_rate
from train.objective.schedule import options_at, step_options
from train.objective.statistics import FixedStatistics, StatisticsSums
from train.objective.step import training_step
from train.reporting.loss_figure import figure_path
from train.reporting.trackers import Tracker, numbers_of, open_trackers
from train.resolve import RunPlan, Split
from train.resume import say
from train.surroundings import surroundings
from train.validation import Subject, Validation, ValidationData


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all runs of an invocation have in common."""

    store: ActivationStore
    """The store, open."""

    split: Split
    """Its tokens: trained on, held out."""

    device: torch.device
    """Where training happens."""

    layers: tuple[int, ...]
    """The model's numbers of the layers in the stream."""

    source: VectorSource
    """Turns the stream's batches into tensors."""

    validation: ValidationData
    """The held-out tokens."""

    memory: dict[int, WeightGradients] = field(default_factory=dict)
    """Memory for gradients by n_latents, used again in each step of every run: fresh memory costs as much as the sums
    in it."""

    def gradients(self, n_latents: int) -> WeightGradients:
        """Memory for the gradients of one step."""
        if n_latents not in self.memory:
            width = self.store.meta.d_model
            self.memory[n_latents] = WeightGradients(
                torch.empty(n_latents, width, device=self.device),
                torch.empty(n_latents, width, device=self.device),
                torch.empty(n_latents, device=self.device),
            )
        return self.memory[n_latents]


class Run:
    """One run; `start` it once, then `take` batches."""

    def __init__(self, spec: RunSpec, plan: RunPlan, shared: Shared) -> None:
        self.spec, self.plan, self._shared = spec, plan, shared
        self.config: TrainConfig = spec.config
        self.position = None if spec.layer is None else shared.layers.index(spec.layer)
        """The one layer trained on, as a position in the stream; None: all."""
        self._kernels = choose_kernels(torch.empty(0, device=shared.device), plan.kernels)
        self._options = step_options(plan)
        self.step = 0
        """Batches of the stream taken."""
        self.updates = 0
        """Steps of the optimiser: fewer where a batch held no vector of this run's layer."""
        self.vectors = 0
        """Vectors trained on."""
        self.metrics: dict[str, Any] = {}
        """The last line of metrics."""
        self.validated: Validation | None = None
        """The last validation."""
        self.diverged = False
        """Whether a logged loss was no finite number."""
        self._trackers: list[Tracker] = []

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.config.out

    @contextlib.contextmanager
    def files(self, saved: Checkpoint | None) -> Iterator[None]:
        """Hold the metrics file, locked, and the trackers."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        step = 0 if saved is None else saved.trainer["step"]
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(contextlib.closing(MetricsFile(metrics_path(self.path), resume_step=step)))
            for tracker in open_trackers(self.config, self.spec.name, self.plan.to_dict(), step):
                self._trackers.append(stack.enter_context(contextlib.closing(tracker)))
            yield

    def begin_anew(self) -> None:
        """Take away what an earlier run left under this name: its weights are not those of the flags and the metrics
        that now stand beside them."""
        for path in (self.path, safetensors_path(self.path), figure_path(self.path)):
            path.unlink(missing_ok=True)

    def write_flags(self) -> None:
        """The flags of this run, beside its checkpoint."""
        flags = {k: v for k, v in vars(self.config).items() if k not in ("resume", "overwrite", "json", "dry_run")}
        beside(self.path, ".config.toml").write_text(to_toml(flags), encoding="utf-8")

    def statistics_sums(self) -> StatisticsSums:
        """What gathers the statistics that a fresh run starts from."""
        by_layer = self.plan.standardize == "layer"
        return StatisticsSums(None if by_layer else MLSAE(self.plan.sae_config).standardize, self.plan.layers)

    def start(self, start: Checkpoint | FixedStatistics) -> None:
        """Weights, optimiser and counters: from a checkpoint, or fresh, from statistics of the data."""
        plan, device = self.plan, self._shared.device
        saved = start if isinstance(start, Checkpoint) else None
        self._sae = MLSAE(plan.sae_config) if saved is None else saved.sae
        self._sae.to(device).requires_grad_(False)
        self._average = None if plan.ema_decay is None else WeightAverage(self._sae, plan.ema_decay)
        if self._average is not None and saved is not None:
            self._sae.load_state_dict(saved.trainer.pop("live"))  # what was saved is the mean
        self._dead = DeadLatents(plan.n_latents, plan.dead_vectors, device)
        if isinstance(start, Checkpoint):
            self._statistics = FixedStatistics(**{k: v.to(device) for k, v in start.trainer["statistics"].items()})
        else:
            self._statistics = start
            self._sae.initialize(plan.seed, start.b_pre)
            if plan.standardize == "layer":
                assert start.layer_mean is not None
                self._sae.layer_mean.copy_(start.layer_mean)
                self._sae.layer_scale.copy_(start.layer_scale)
        self._optimizer = SphereAdam(self._sae, self._kernels, free_norms=plan.decoder_norm == "free")
        raw = plan.loss_space == "raw"
        self._denominators = self._statistics.raw if raw else self._statistics.standardized
        self._window = MetricsWindow(self._statistics.raw, sparsity=plan.activation in ("jumprelu", "relu"))
        if saved is not None:
            self._continue(saved.trainer)

    def _continue(self, trainer: dict[str, Any]) -> None:
        self.step = trainer["step"]
        self.updates = trainer.get("updates", self.step)
        self.vectors = trainer.get("vectors", min(self.step * self.plan.batch_size, self.plan.vectors))
        self._optimizer.load_state_dict(trainer.pop("optimizer"))  # pop: it is twice as large as the weights
        self._dead.silent.copy_(trainer["silent"])
        self._window.load_state_dict(trainer["window"])
        self.metrics = trainer["metrics"]
        self.diverged = not math.isfinite(self.metrics.get("loss") or 0)
        before = trainer["validation"]
        self.validated = None if before is None else Validation(**before)
        say(f"resuming {self.path} after step {self.step} of {self.plan.steps}")

    def own(self, batch: Vectors) -> Vectors:
        """The vectors of a batch that this run is trained on."""
        if self.position is None:
            return batch
        rows = (batch.layer == self.position).nonzero().squeeze(1)
        return Vectors(batch.x[rows], torch.zeros_like(rows))

    def take(self, batch: Vectors) -> None:
        """One step on a batch of the stream."""
        plan = self.plan
        x, layer = self.own(batch)
        if len(x) > 0:
            standardized = self._sae.standardize(x, layer)
            rows = row_weights(layer, standardized.std, self._denominators, raw=plan.loss_space == "raw")
            result = training_step(
                self._optimizer.weights,
                standardized.x,
                rows,
                self._dead,
                options_at(self._options, plan, self.step),
                self._kernels,
                out=self._shared.gradients(plan.n_latents),
            )
            self._window.add(layer, standardized, result)
            self._optimizer.step(result.gradients, lr=self._lr(self.step), step=self.updates + 1, clip=plan.clip_norm)
            self.updates += 1
            if self._average is not None:
                self._average.update(self._sae, self.updates)
            self.vectors += len(x)
        self.step += 1

    def log(self, *, seconds: float, waited: float) -> dict[str, Any]:
        """Write and return the metrics since the last line; seconds: time since then, waited: of it for data."""
        window = self._window
        self.metrics = self._progress() | window.line()
        self.metrics |= {"dead_fraction": self._dead.fraction(), "lr": self._lr(self.step - 1)}
        self.diverged = self.diverged or not math.isfinite(self.metrics["loss"] or 0)
        line = self.metrics | {
            "vectors_per_second": window.vectors / seconds,
            "data_wait_fraction": min(1.0, waited / seconds),
        }
        window.clear()
        self._write(line)
        return line

    @property
    def sae(self) -> MLSAE:
        """The autoencoder that is validated and saved."""
        return self._sae if self._average is None else self._average.sae

    def subject(self) -> Subject:
        """What validation measures."""
        return Subject(self.sae, self._options.product_dtype, self.position)

    def record(self, validated: Validation) -> None:
        """Keep and write the result of a validation."""
        self.validated = validated
        self._write(self._progress() | validated.metrics())

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(line)
        for tracker in self._trackers:
            tracker.log(numbers_of(line, self.plan.layers), self.step)

    def save(self, *, finished: bool) -> dict[str, Any]:
        """Write the checkpoint; its `trainer` entry. It holds no times, so that equal runs give equal files."""
        self._file.sync()
        plan = self.plan
        trainer: dict[str, Any] = {
            "step": self.step,
            "updates": self.updates,
            "vectors": self.vectors,
            "finished": finished,
            "config": plan.to_dict(),
            "threads": torch.get_num_threads(),
            "surroundings": surroundings(plan),
            "metrics": self.metrics,
            "validation": None if self.validated is None else self.validated._asdict(),
            "silent": self._dead.silent.cpu(),
            "statistics": {n: value.cpu() for n, value in self._statistics._asdict().items() if value is not None},
        }
        if not finished:
            trainer |= {"optimizer": self._optimizer.state_dict(), "window": self._window.state_dict()}
            if self._average is not None:
                trainer["live"] = {name: tensor.cpu() for name, tensor in self._sae.state_dict().items()}
        save_checkpoint(self.path, self.sae, store=self._store_record(), trainer=trainer)
        return trainer

    def _store_record(self) -> dict[str, Any]:
        """What a checkpoint says of its data."""
        store, plan = self._shared.store, self.plan
        return {
            "content_hash": store.content_hash,
            "path": store.path.name,
            "d_model": store.meta.d_model,
            "layers": list(plan.layers),
            "model": store.meta.provenance.get("model"),
            "dataset": store.meta.provenance.get("dataset"),
            "random_init": bool(store.meta.provenance.get("random_init")),
            "lens": store.meta.lens,
            "validation": {
                "fraction": plan.validation_fraction,
                "seed": plan.seed,
                "n_documents": self._shared.split.n_documents,
            },
        }

    def _lr(self, step: int) -> float:
        plan = self.plan
        return learning_rate(
            step, plan.steps, plan.lr, warmup_fraction=plan.warmup_fraction, decay_fraction=plan.decay_fraction
        )

    def _progress(self) -> dict[str, Any]:
        """Where the run is, by step, vectors, tokens and epochs."""
        plan = self.plan
        streamed = min(self.step * plan.batch_size, plan.vectors)
        return {
            "step": self.step,
            "vectors": self.vectors,
            "tokens": self.vectors // len(plan.layers),
            "epoch": streamed / plan.vectors_per_epoch,
        }
