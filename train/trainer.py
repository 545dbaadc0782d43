"""One autoencoder in training: its weights, optimiser, counters, metrics file and checkpoint.

A step is a function of its number, the weights, the optimiser's moments, the counters of dead latents, the statistics
of the data and the batch: all but the batch are in the checkpoint. The last one drops the moments, because no step
follows. Not here: where batches come from, and which runs share them (`train.run`). Tested in test_run.py.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from residscope.errors import UsageError
from residscope.names import beside
from residscope.options import to_toml
from residscope.reading import reading
from store.files import atomic_write
from train.checkpoint import Checkpoint, changed_at, config_path, refuse_anothers, save_checkpoint
from train.data import TrainingData, Vectors
from train.determinism import surroundings
from train.kernels.choose import choose_kernels
from train.kernels.interface import WeightGradients
from train.metrics import MetricsFile, MetricsWindow
from train.model import MLSAE, sae_hash
from train.model_config import THRESHOLDED
from train.objective.losses import DeadLatents, row_weights
from train.objective.optimizer import SphereAdam, WeightAverage, learning_rate
from train.objective.statistics import FixedStatistics, View
from train.objective.step import training_step
from train.reporting.announce import say
from train.reporting.convergence import NUMBERS
from train.reporting.trackers import Tracker, numbers_of, open_trackers
from train.resolve import RunPlan
from train.resume import read_source
from train.validation import Validation


class Trainer:
    """One run: call `start` once, then `take` for each batch."""

    def __init__(self, plan: RunPlan, data: TrainingData, memory: dict[int, WeightGradients] | None = None) -> None:
        """memory: gradient buffers by n_latents, shared by all trainers and steps: allocation costs as much as use."""
        self.plan, self._data, self._ranks = plan, data, data.ranks
        self.path = plan.config.out  # the checkpoint
        position = None if plan.stream_layers is None else data.layers.index(plan.layers[0])
        self.view = View(plan.model.standardize, plan.layers, position, plan.model.apply_b_dec_to_input)
        self._memory = {} if memory is None else memory
        self._kernels = choose_kernels(torch.empty(0, device=data.device), plan.kernels)
        self.step = 0  # batches taken from the stream
        self.updates = 0  # steps of the optimiser: fewer where a batch held no vector of this run's layer
        self.begun = (0, 0)  # step and updates at which the schedule and Adam's state start: not 0 in a lengthened run
        self.vectors = 0  # trained on
        self.metrics: dict[str, Any] = {}  # the last line
        self.validated: Validation | None = None  # the last validation
        self._source: MLSAE | None = None  # the autoencoder to start from
        self.started_from: dict[str, str] | None = None  # its name and hash
        self.curve: list[dict[str, Any]] = []  # of validations on one sample of tokens
        self.diverged = False  # a logged loss, or a weight at that time, was not finite
        self._trackers: list[Tracker] = []
        self._file: MetricsFile | None = None  # only on the first rank

    @contextlib.contextmanager
    def files(self, saved: Checkpoint | None) -> Iterator[None]:
        """Hold the locked metrics file and the trackers; nothing may be written without them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        step = 0 if saved is None else saved.trainer["step"]
        with contextlib.ExitStack() as stack:
            metrics = beside(self.path, ".metrics.jsonl")
            file = MetricsFile(metrics, resume_step=step, check=lambda: self._refuse_newer(saved))
            self._file = stack.enter_context(contextlib.closing(file))
            for tracker in open_trackers(self.plan, step):
                stack.callback(tracker.close)
                self._trackers.append(tracker)
            yield

    def _refuse_newer(self, saved: Checkpoint | None) -> None:
        """Raise `UsageError` if another run has started or ended since the flags were read."""
        refuse_anothers(self.path)
        if saved is None and self.path.exists() and not self.plan.config.overwrite:
            raise UsageError(f"{self.path} exists now: use --resume to continue it or --overwrite to replace it")
        if saved is not None and saved.changed != changed_at(self.path):
            raise UsageError(f"{self.path} was written since it was read: run the same command again")

    def claim(self, saved: Checkpoint | None) -> None:
        """Write the run's flags beside its checkpoint, and remove what an earlier run left there, except what
        belongs to `saved`, from which this one continues."""
        atomic_write(config_path(self.path), [to_toml(self.plan.flags()).encode()])
        if saved is None:
            self.path.unlink(missing_ok=True)
        if saved is None or saved.trainer["finished"]:  # a finished run is lengthened
            for ending in (".safetensors", ".loss.png"):
                beside(self.path, ending).unlink(missing_ok=True)

    def start(self, start: Checkpoint | FixedStatistics) -> None:
        """Set up weights, optimiser and counters: from a checkpoint, or fresh from statistics of the data."""
        plan, device, optimizer, latents = self.plan, self._data.device, self.plan.config.optimizer, self._ranks.latents
        saved = start if isinstance(start, Checkpoint) else None
        if isinstance(start, Checkpoint):
            with reading(f"{self.path}: its training state is damaged"):
                found = start.trainer["statistics"]
                self._statistics = FixedStatistics(**{k: v.to(device, copy=True) for k, v in found.items()})
                sizes = {"standardized": len(plan.layers), "raw": len(plan.layers)}
                sizes |= {"variance": plan.model.d_model} if plan.chosen.second_moment == "latent" else {}
                if any(found[name].shape != (size,) for name, size in sizes.items()):
                    raise ValueError("statistics of other layers, or of another model")
            sae = start.sae.part(latents)
        else:
            self._statistics = start
            sae = MLSAE.share(plan.model, latents)
            sae.initialize(plan.config.data.seed, start.b_pre, encoder_scale=plan.chosen.encoder_scale)
            if self._source is not None:
                sae.load_state_dict(self._source.part(latents).state_dict())
            if plan.model.standardize == "layer":
                assert start.layer_mean is not None
                sae.layer_mean.copy_(start.layer_mean)
                sae.layer_scale.copy_(start.layer_scale)
        self._sae = sae.to(device).requires_grad_(False)
        self._ranks.same_(self._sae.b_pre.data, *(part for part in self._statistics if part is not None))
        self._average = None if optimizer.ema_decay is None else WeightAverage(self._sae, optimizer.ema_decay)
        if self._average is not None and saved is not None and not saved.trainer["finished"]:
            self._sae.load_state_dict(saved.trainer.pop("live"))  # the saved weights are the running mean
        self._dead = DeadLatents(self._sae.config.n_latents, plan.dead_vectors, device)
        self._optimizer = SphereAdam(
            self._sae,
            self._kernels,
            free_norms=optimizer.decoder_norm == "free",
            betas=(plan.chosen.beta1, plan.chosen.beta2),
            encoder_lr=plan.chosen.encoder_lr,
            variance=self._statistics.variance if plan.chosen.second_moment == "latent" else None,
            ranks=self._ranks,
        )
        self._raw = plan.chosen.loss_space == "raw"
        self._denominators = self._statistics.raw if self._raw else self._statistics.standardized
        sparsity = plan.model.activation in THRESHOLDED
        self._window = MetricsWindow(self._statistics.raw, sparsity=sparsity, ranks=self._ranks)
        if saved is not None:
            with reading(f"{self.path}: its training state is damaged", "use --overwrite to start again"):
                self._continue(saved.trainer)

    def read_source(self) -> str:
        """Read the autoencoder that a new run starts from, if any; returns a warning or ""."""
        warning = ""
        if self.plan.config.start_from is not None:
            self._source, warning = read_source(self.plan, self._data)
            self.started_from = {"name": str(self.plan.config.start_from), "hash": sae_hash(self._source)}
        return warning

    def _continue(self, trainer: dict[str, Any]) -> None:
        self.step = trainer["step"]
        self.updates = trainer.get("updates", self.step)
        self.vectors = trainer.get("vectors", self._streamed())
        self.begun = tuple(trainer.get("begun", (0, 0)))
        self._dead.silent.copy_(trainer["silent"][self._ranks.latents.own(self.plan.model.n_latents)])
        if trainer["finished"]:  # to be lengthened
            self.begun = (self.step, self.updates)
        else:
            self._optimizer.load_state_dict(trainer.pop("optimizer"))  # popped to free 1-2 times the weights' size
            self._window.load_state_dict(trainer["window"])
        self.metrics = trainer["metrics"]
        self.diverged = not math.isfinite(self.metrics.get("loss") or 0)
        self.validated = None if trainer["validation"] is None else Validation(**trainer["validation"])
        self.curve, self.started_from = trainer.get("curve", []), trainer.get("started_from")
        say(f"resuming {self.path} after step {self.step} of {self.plan.steps}")

    def take(self, batch: Vectors) -> None:
        x, layer, of_layer = self.view.own(batch)
        n = len(x) if of_layer is None else int(of_layer.sum())
        if n > 0:
            standardized = self._sae.standardize(x, layer)
            result = training_step(
                self._optimizer.weights,
                standardized.x,
                row_weights(layer, standardized.std, self._denominators, raw=self._raw, n=n),
                self._dead,
                self.plan.options_at(self.plan.steps if self.begun[0] else self.step),  # lengthened: as at its end
                self._kernels,
                out=self._gradients(),
                n=n,
                ranks=self._ranks,
            )
            self._window.add(layer, standardized, result)
            self.updates += 1
            step, clip = self.updates - self.begun[1], self.plan.chosen.clip_norm
            self._optimizer.step(result.gradients, lr=self._lr(self.step), step=step, clip=clip)
            if self._average is not None:
                self._average.update(self._sae, self.updates)
            self.vectors += n
        self.step += 1

    def _gradients(self) -> WeightGradients:
        n_latents = self._sae.config.n_latents
        if n_latents not in self._memory:
            self._memory[n_latents] = WeightGradients.zeros_like(self._sae.W_dec.data)
        return self._memory[n_latents]

    def log(self, *, seconds: float, waited: float) -> dict[str, Any]:
        """Write and return the metrics since the last line; seconds: time since then, of which `waited` for data."""
        window = self._window
        self.metrics = self._progress() | window.line()
        self.metrics |= self._data.follower.mixing(self.step) if self._data.follower else {}
        self.metrics |= {"dead_fraction": self._dead.fraction(self._ranks.latents), "lr": self._lr(self.step - 1)}
        trained = (weight for weight in self._sae.weights if weight is not None)
        bad = any((w.isnan().any() if w.ndim < 2 else ~torch.linalg.vector_norm(w).isfinite()) for w in trained)
        if self._ranks.any(bad):
            self.metrics["loss"] = math.nan  # the next step's loss would not be finite
        self.diverged = self.diverged or not math.isfinite(self.metrics["loss"] or 0)
        speed = {"vectors_per_second": window.vectors / seconds, "data_wait_fraction": min(1.0, waited / seconds)}
        window.clear()
        self._write(self.metrics | speed)
        return self.metrics | speed

    @property
    def sae(self) -> MLSAE:
        """The autoencoder that is validated and saved."""
        return self._sae if self._average is None else self._average.sae

    @property
    def last_looked(self) -> int:
        """The step of the curve's last point."""
        return self.curve[-1]["step"] if self.curve else 0

    def look(self, validated: Validation) -> None:
        if not math.isfinite(validated.fvu) or self.vectors == 0:
            return  # diverged, or no vector of this run's layer has come yet
        numbers = {name: getattr(validated, name) for name in NUMBERS}
        self.curve.append({"step": self.step, "vectors": self.vectors, **numbers})

    def record(self, validated: Validation) -> None:
        """Keep and write the result of a validation."""
        self.validated = validated
        self._write(self._progress() | validated.metrics())

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(line)
        for tracker in self._trackers:
            tracker.log(numbers_of(line, self.plan.layers), self.step)

    def save(self, *, finished: bool) -> dict[str, Any]:
        """Write the checkpoint; returns its `trainer` entry. It holds no times, so equal runs give equal files."""
        if self._file is not None:
            self._file.sync()
        trainer: dict[str, Any] = {
            "step": self.step,
            "updates": self.updates,
            "begun": list(self.begun),
            "vectors": self.vectors,
            "finished": finished,
            "config": self.plan.to_dict(),
            "threads": torch.get_num_threads(),
            "surroundings": surroundings(self.plan.device, self.plan.kernels, self.plan.product_dtype, self._ranks),
            "metrics": self.metrics,
            "validation": None if self.validated is None else self.validated._asdict(),
            "curve": self.curve,
            "started_from": self.started_from,
            "silent": self._ranks.pieces(self._dead.silent, self.plan.model.n_latents),
            "statistics": {n: value for n, value in self._statistics._asdict().items() if value is not None},
        }
        if not finished:
            trainer |= {"optimizer": self._optimizer.state_dict(), "window": self._window.state_dict()}
            if self._average is not None:
                trainer["live"] = dict(self._sae.state_dict())
        record = self._data.record(self.plan.layers)
        save_checkpoint(self.path, self.sae, store=record, trainer=trainer, ranks=self._ranks)
        self._ranks.any(False)  # a barrier: no rank goes on before the checkpoint is on disk
        return trainer

    def _lr(self, step: int) -> float:
        return learning_rate(step - self.begun[0], self.plan.steps - self.begun[0], self.plan.chosen)

    def _streamed(self) -> int:
        """Vectors of the stream so far; the last batch may be short."""
        return min(self.step * self.plan.chosen.batch_size, self.plan.vectors)

    def _progress(self) -> dict[str, Any]:
        """How far the run is, in steps, vectors, tokens and epochs."""
        return {
            "step": self.step,
            "vectors": self.vectors,
            "tokens": self.vectors // len(self.plan.layers),
            "epoch": self._streamed() / self.plan.vectors_per_epoch,
        }
