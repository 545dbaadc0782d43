"""What a run will do, worked out before it starts: every default resolved against the store and the machine.

A checkpoint keeps a `RunPlan` as a flat dictionary: two runs with equal plans over equal stores give the same weights,
so a resume compares plans and names the value that differs (`train.resume`). Pure, apart from probing the hardware.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch

from residscope.errors import UsageError
from residscope.options import to_flat
from store.activations import ActivationStore
from store.remote.held import held_bytes
from train.config import DEFAULT_EXPANSION_FACTOR, TrainConfig
from train.data import TrainingData
from train.grid import RunSpec
from train.hardware import resolve_product_dtype
from train.kernels.choose import choose_kernels
from train.model_config import THRESHOLDED, SAEConfig, default_prefixes, require_shares
from train.objective.losses import dead_threshold
from train.objective.recipes import BEFORE_RECIPES, Recipe, complete, fill, recorded_flags
from train.objective.statistics import MEDIAN_VECTORS
from train.objective.variants import StepOptions, variant_of
from train.parallel.ranks import ALONE, Ranks

RECORDED = (
    *("d_model", "layers", "stream_layers", "n_latents", "k", "aux_k", "aux_coef"),
    *("lr", "warmup_fraction", "decay_fraction", "batch_size", "steps", "vectors", "vectors_per_epoch", "epochs"),
    *("seed", "validation_fraction", "validation_seed", "dead_vectors", "loss_space", "window_bytes"),
    *("product_dtype", "device", "kernels"),
    *("activation", "standardize", "encoder_bias", "apply_b_dec_to_input", "prefixes"),
    *("k_start", "k_warmup_fraction", "multi_topk"),
    *("sparsity_loss", "sparsity_coef", "sparsity_warmup_fraction", "bandwidth"),
    *("decoder_norm", "clip_norm", "ema_decay", "tile_mb"),
    *("recipe", "beta1", "beta2", "encoder_scale", "start_from", "encoder_lr", "second_moment"),
)
"""The values of a plan that a checkpoint keeps, in order: all that the result depends on but the store's content."""

ADDED_LATER: dict[str, Any] = {
    "stream_layers": None,
    "activation": "topk",
    "standardize": "vector",
    "encoder_bias": False,
    "apply_b_dec_to_input": True,
    "prefixes": [],
    "k_start": None,
    "k_warmup_fraction": 0.1,
    "multi_topk": False,
    "sparsity_loss": "target",
    "sparsity_coef": 0.0,
    "sparsity_warmup_fraction": 0.1,
    "bandwidth": 1.0,
    "decoder_norm": "fixed",
    "ema_decay": None,
    "start_from": None,
    "tile_mb": 16,
    **BEFORE_RECIPES,
}
"""Values of older checkpoints, which do not record them because there was no choice yet."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run, resolved: its flags, and the values of those left open on this store and this machine."""

    spec: RunSpec
    """Which run of the invocation this is, and its flags."""
    model: SAEConfig
    """The autoencoder: `config.model`, resolved."""
    layers: tuple[int, ...]
    """The model's numbers of the layers trained on."""
    stream_layers: tuple[int, ...] | None
    """The layers whose vectors are streamed, if the run is trained on only one of them (--per-layer); None: the same as
    `layers`."""
    aux_k: int
    """Dead latents that AuxK may use per vector."""
    sparsity_coef: float
    """Weight of the sparsity term; 0 where there is none."""
    chosen: Recipe
    """The recipe's flags, resolved."""
    steps: int
    vectors: int
    """Vectors of the stream in the whole run; the last batch may be short."""
    vectors_per_epoch: int
    """Vectors of the stream in one pass."""
    epochs: int
    """Passes that are started; the last may be partial."""
    dead_vectors: int
    """Vectors without firing that make a latent dead."""
    product_dtype: str
    device: str
    """Kind of device: cpu or cuda."""
    kernels: str

    @property
    def config(self) -> TrainConfig:
        return self.spec.config

    @property
    def window_bytes(self) -> int:
        """Size of one of the loader's two windows; the order of the rows depends on it."""
        return int(self.config.data.window_gb * 1e9 / 2)

    @property
    def tile_bytes(self) -> int:
        """Bytes of pre-activations held at once."""
        return int(self.tile_mb * 1e6)

    @property
    def tile_mb(self) -> float:
        return self.config.hardware.tile_mb or (512 if self.device == "cuda" else 16)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the encoder's product."""
        return getattr(torch, self.product_dtype)

    def flags(self) -> dict[str, Any]:
        """The flags that reproduce this run, with the recipe's choices written out."""
        return fill(self.config, recorded_flags(asdict(self.chosen))).flags()

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, as a checkpoint keeps them."""
        resolved = {field.name: getattr(self, field.name) for field in fields(self)} | asdict(self.chosen)
        values = {**to_flat(self.config), **asdict(self.model), **resolved, "window_bytes": self.window_bytes}
        values |= {"tile_mb": self.tile_mb, "validation_seed": self.config.validation.validation_seed or 0}
        values["start_from"] = None if self.config.start_from is None else str(self.config.start_from)
        return {name: list(values[name]) if isinstance(values[name], tuple) else values[name] for name in RECORDED}

    def options_at(self, step: int) -> StepOptions:
        """The options of step number `step` (from 0).

        k moves linearly from k_start to k over the first k_warmup_fraction of the steps; the sparsity term's
        coefficient rises linearly to its full value over the first sparsity_warmup_fraction.
        """
        objective, k, coefficient = self.config.objective, self.model.k, self.sparsity_coef
        warmup = round(objective.k_warmup_fraction * self.steps)
        if objective.k_start is not None and step < warmup:
            k = objective.k_start + round((k - objective.k_start) * step / warmup)
        warmup = round(objective.sparsity_warmup_fraction * self.steps)
        if step < warmup:
            coefficient *= (step + 1) / (warmup + 1)
        return StepOptions(
            variant=variant_of(self.model),
            objective=objective,
            k=k,
            aux_k=self.aux_k,
            sparsity_coef=coefficient,
            product_dtype=self.torch_dtype,
            tile_bytes=self.tile_bytes,
        )


def make_plan(spec: RunSpec, data: TrainingData) -> RunPlan:
    """Resolve a run's configuration against the data and this machine."""
    config, layer = spec.config, spec.layer
    d_model, streamed = data.store.meta.d_model, data.layers
    layers = streamed if layer is None else (layer,)
    model = _model(config, d_model, layers, n_runs=len(streamed) if config.per_layer == "total" else 1)
    require_shares(model, data.ranks.latents.size)
    vectors_per_epoch = int(data.split.train.sum()) * len(streamed)
    epochs, steps = config.data.epochs or 1, config.data.steps
    vectors = epochs * vectors_per_epoch if steps is None else steps * data.batch_size
    return RunPlan(
        spec=spec,
        model=model,
        layers=layers,
        stream_layers=None if layer is None else streamed,
        aux_k=min(config.objective.aux_k or default_aux_k(d_model), model.n_latents),
        sparsity_coef=_sparsity_coef(config),
        chosen=complete(
            config,
            n_latents=model.n_latents,
            batch_size=data.batch_size,
            vectors=vectors,
            share=len(layers) / len(streamed),
        ),
        steps=-(-vectors // data.batch_size),
        vectors=vectors,
        vectors_per_epoch=vectors_per_epoch,
        epochs=-(-vectors // vectors_per_epoch),
        dead_vectors=dead_threshold(vectors // len(streamed), len(layers), config.objective.dead_tokens),
        product_dtype=resolve_product_dtype(config.hardware.dtype, data.device),
        device=data.device.type,
        kernels=choose_kernels(torch.empty(0, device=data.device), config.hardware.kernels).name,
    )


def _model(config: TrainConfig, d_model: int, layers: tuple[int, ...], *, n_runs: int) -> SAEConfig:
    """The autoencoder's configuration; `n_runs`: how many runs the latents are divided among."""
    asked = config.model
    n_latents = asked.n_latents or round((asked.expansion_factor or DEFAULT_EXPANSION_FACTOR) * d_model)
    n_latents = n_latents if n_runs == 1 else max(1, n_latents // n_runs)
    if d_model == 1 and asked.standardize == "vector":
        raise UsageError("d_model is 1, and one number has no standard deviation: use --standardize layer")
    largest_k = max(asked.k, config.objective.k_start or 0)
    if largest_k > n_latents:
        raise UsageError(f"k is {largest_k}, but there are only {n_latents} latents: lower k, or give more latents")
    return SAEConfig(
        d_model=d_model,
        n_latents=n_latents,
        k=asked.k,
        standardize=asked.standardize,
        activation=asked.activation,
        encoder_bias=asked.activation in THRESHOLDED if asked.encoder_bias is None else asked.encoder_bias,
        apply_b_dec_to_input=asked.apply_b_dec_to_input,
        prefixes=(asked.prefixes or default_prefixes(n_latents)) if asked.activation == "matryoshka" else (),
        layers=layers if asked.standardize == "layer" else (),
    )


def _sparsity_coef(config: TrainConfig) -> float:
    activation, objective = config.model.activation, config.objective
    if activation not in THRESHOLDED:
        return 0.0
    default = 1.0 if activation == "jumprelu" and objective.sparsity_loss == "target" else 0.5
    return default if objective.sparsity_coef is None else objective.sparsity_coef


def default_aux_k(d_model: int) -> int:
    """The power of two nearest to d_model / 2 by ratio (Gao et al. 2024, appendix A.2)."""
    return 2 ** max(0, round(math.log2(d_model / 2)))


class MemoryEstimate(NamedTuple):
    """Bytes that the runs need in each process, apart from the interpreter."""

    device: int
    """Weights, gradients, moments, a batch and its gradients, and tiles, on the training device."""
    shuffle: int
    """The loader's two windows, and what is cached of a store at a URL, in the machine's memory."""
    local: int = 1
    """Processes on this machine that each need as much; on CUDA each has its own GPU."""


def memory_estimate(plans: Sequence[RunPlan], store: ActivationStore, ranks: Ranks = ALONE) -> MemoryEstimate:
    """Memory that the runs of `plans` need on one stream: weights and moments for each; the rest is shared. AuxK is
    counted with half of the latents dead. With several `ranks`, each holds the weights of its latents, the moments of
    its own share of those, and the gradients that the others send."""
    meta, rows, latents = store.meta, ranks.rows.size, ranks.latents.size
    sizes = {plan.model.n_latents: 4 * _weights(plan) // latents for plan in plans}
    copies = ((plan, weight_copies(plan), _moments(plan)) for plan in plans)
    held = sum(sizes[plan.model.n_latents] * (n - moments + moments / rows) for plan, n, moments in copies)
    gradients = sum(sizes.values()) + max(sizes.values()) * (rows - 1) // (2 * rows)  # W_enc's, then W_dec's
    plan = plans[0]
    block = meta.chunk_tokens * meta.d_model * meta.itemsize
    window = min(max(plan.window_bytes, block), meta.n_chunks * len(plan.stream_layers or plan.layers) * block)
    statistics = 4 * MEDIAN_VECTORS * meta.d_model * 4  # the sample, its parts, and the median's temporaries
    return MemoryEstimate(
        int(held) + gradients + max(statistics, *(_working(plan, rows, latents) for plan in plans)),
        2 * window + held_bytes(store),
        ranks.local,
    )


def weight_copies(plan: RunPlan) -> int:
    """Tensors of the weights' size that a run holds and saves: weights, one or two moments, perhaps a running mean."""
    return 1 + _moments(plan) + (plan.config.optimizer.ema_decay is not None)


def _moments(plan: RunPlan) -> int:
    return 1 if plan.chosen.second_moment == "latent" else 2


def _weights(plan: RunPlan) -> int:
    return 2 * plan.model.n_latents * plan.model.d_model


def _working(plan: RunPlan, rows: int, latents: int) -> int:
    n, d, objective = -(-plan.chosen.batch_size // rows), plan.model.d_model, plan.config.objective
    weights = _weights(plan) // latents
    k = max(plan.model.k, objective.k_start or 0) * (4 if objective.multi_topk else 1)
    # Float32 [N, D] tensors, three more if a reconstruction is a sum over ranks; codes, gradients, sorted pairs.
    batch = n * ((6 if latents == 1 else 9) * 4 * d + 48 * k)
    batch += n * 6 * d if plan.device == "cuda" else 0  # the next batch, and its 16-bit copy
    batch += int(n * k * d * choose_kernels(torch.empty(0, device=plan.device), plan.kernels).pair_bytes)
    # Nested reconstructions: the error of each, and the gradients of one at a time.
    blocks = 2 if objective.multi_topk else len(plan.model.prefixes)
    nested = blocks * n * 4 * d + 4 * weights if blocks else 0
    casts = weights if plan.product_dtype != "float32" else 0  # both weights, for the product and AuxK
    tiles = (10 if plan.model.activation in THRESHOLDED else 4) * plan.tile_bytes
    auxk = 2 * 4 * weights + casts if objective.aux_coef else 0  # copies, gradients, casts, if all latents were dead
    return 2 * casts + batch + nested + tiles + auxk // 2
