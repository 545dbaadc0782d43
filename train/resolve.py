"""What a run will do, worked out before it starts: every default resolved against the store and the machine.

Pure, but for looking at the hardware. A `RunPlan` is also what a checkpoint keeps of the configuration: two runs with
equal plans over equal stores give the same weights, so a resume compares plans and names the field that differs.

Shapes: T tokens of the store, L layers trained on.
"""

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from residscope.errors import IncompatibleError, UsageError
from store.activations import ActivationStore
from store.shuffle import validation_documents
from train.config import DEFAULT_EXPANSION_FACTOR, TrainConfig
from train.hardware import resolve_device, resolve_product_dtype
from train.kernels.choose import choose_kernels
from train.model_config import Activation, SAEConfig, Standardize, default_prefixes
from train.objective.losses import dead_threshold
from train.objective.optimizer import scaling_law_lr


class Split(NamedTuple):
    """Which kept tokens are trained on, and which are held out; whole documents are on one side."""

    train: np.ndarray
    """bool [T]"""

    validation: np.ndarray
    """bool [T]"""

    n_documents: int
    """Documents of the store."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that the result of a run depends on, apart from the store's content."""

    d_model: int
    """Width of the residual stream."""
    layers: tuple[int, ...]
    """The model's numbers of the layers trained on."""
    stream_layers: tuple[int, ...] | None = None
    """The layers whose vectors are streamed, where the run is trained on one of them alone (--per-layer); None: the
    layers trained on."""
    n_latents: int
    """Latents of the dictionary."""
    k: int
    """Latents active on one vector, at most."""
    aux_k: int
    """Dead latents that AuxK may use on one vector."""
    aux_coef: float
    """Weight of AuxK."""
    lr: float
    """Peak learning rate."""
    warmup_fraction: float
    """Share of the steps with a rising rate."""
    decay_fraction: float
    """Share of the steps with a falling rate."""
    batch_size: int
    """Vectors of the stream in a step."""
    steps: int
    """Steps of the whole run."""
    vectors: int
    """Vectors of the stream in the whole run; the last batch may be short."""
    vectors_per_epoch: int
    """Vectors of the stream in one pass."""
    epochs: int
    """Passes that are begun."""
    seed: int
    """Seed of weights, order and held-out documents."""
    validation_fraction: float
    """Share of documents held out."""
    dead_vectors: int
    """Vectors without firing that make a latent dead."""
    loss_space: str
    """standardized or raw."""
    window_bytes: int
    """Size of one of the loader's two windows; the order of the rows depends on it."""
    product_dtype: str
    """Type of the encoder's product."""
    device: str
    """Kind of device: cpu or cuda."""
    kernels: str
    """Which implementation of the sparse parts."""
    activation: Activation = "topk"
    """How latents are chosen."""
    standardize: Standardize = "vector"
    """What is taken out of the vectors first."""
    encoder_bias: bool = False
    """Whether pre-activations have a bias."""
    apply_b_dec_to_input: bool = True
    """Whether b_pre is subtracted from the encoder's input."""
    prefixes: tuple[int, ...] = ()
    """Nested dictionaries of a Matryoshka autoencoder."""
    k_start: int | None = None
    """k at the first step; None: k."""
    k_warmup_fraction: float = 0.1
    """Share of the steps in which k goes from k_start to k."""
    multi_topk: bool = False
    """Whether a loss with 4 k active latents is added."""
    sparsity_loss: str = "target"
    """target or penalty, of a JumpReLU autoencoder."""
    sparsity_coef: float = 0.0
    """Weight of the sparsity term; 0 where there is none."""
    sparsity_warmup_fraction: float = 0.1
    """Share of the steps in which that weight rises."""
    bandwidth: float = 1.0
    """Width of the window in which pre-activations move a threshold."""
    decoder_norm: str = "fixed"
    """fixed or free: whether the norm that a decoder row takes in a step goes to the encoder."""
    clip_norm: float | None = None
    """Largest norm of all gradients together."""
    ema_decay: float | None = None
    """Decay of the running mean of the weights that is saved; None: the weights are."""
    tile_mb: float = 16
    """Pre-activations held at once, in MB."""

    @property
    def sae_config(self) -> SAEConfig:
        """The autoencoder to be trained."""
        return SAEConfig(
            d_model=self.d_model,
            n_latents=self.n_latents,
            k=self.k,
            standardize=self.standardize,
            activation=self.activation,
            encoder_bias=self.encoder_bias,
            apply_b_dec_to_input=self.apply_b_dec_to_input,
            prefixes=self.prefixes,
            layers=self.layers if self.standardize == "layer" else (),
        )

    @property
    def tile_bytes(self) -> int:
        """`tile_mb` in bytes."""
        return int(self.tile_mb * 1e6)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`product_dtype` as torch's."""
        return getattr(torch, self.product_dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def split_tokens(store: ActivationStore, fraction: float, seed: int) -> Split:
    """Hold out whole documents; raises `IncompatibleError` where that leaves nothing to train on."""
    tokens = store.tokens
    n_documents = int(tokens.document.max()) + 1
    held_out = validation_documents(n_documents, fraction, seed)[tokens.document]
    split = Split(tokens.keep & ~held_out, tokens.keep & held_out, n_documents)
    if not split.train.any():
        raise IncompatibleError(
            f"{store.path}: no kept token is left to train on, of {int(tokens.keep.sum())} kept in {n_documents} "
            f"documents with --validation-fraction {fraction}: harvest more text"
        )
    return split


def stored_layers(store: ActivationStore, layers: tuple[int, ...] | None) -> list[int]:
    """Positions in the store of the model's layers `layers`, ascending; default all."""
    have = store.meta.layers
    wanted = have if layers is None else tuple(sorted(layers))
    missing = sorted(set(wanted) - set(have))
    if missing:
        raise UsageError(
            f"--layers: {store.path} does not hold layer {', '.join(map(str, missing))}; it holds "
            f"{' '.join(map(str, have))}"
        )
    return [have.index(layer) for layer in wanted]


def make_plan(config: TrainConfig, store: ActivationStore, split: Split, layer: int | None = None) -> RunPlan:
    """Resolve a configuration against a store and this machine; `layer` is the one that a --per-layer run is of."""
    meta = store.meta
    layers = stored_layers(store, config.layers)
    streamed = tuple(meta.layers[i] for i in layers)
    n_latents = config.n_latents or round((config.expansion_factor or DEFAULT_EXPANSION_FACTOR) * meta.d_model)
    if config.per_layer == "total":
        n_latents = max(1, n_latents // len(layers))
    vectors_per_epoch = int(split.train.sum()) * len(layers)
    if config.steps is None:
        epochs = config.epochs or 1
        vectors = epochs * vectors_per_epoch
        steps = -(-vectors // config.batch_size)
    else:
        steps = config.steps
        vectors = steps * config.batch_size
        epochs = -(-vectors // vectors_per_epoch)
    device = resolve_device(config.device)
    thresholded = config.activation in ("jumprelu", "relu")
    if max(config.k, config.k_start or 0) > n_latents:
        raise UsageError(
            f"k is {max(config.k, config.k_start or 0)}, but there are only {n_latents} latents: lower k, or raise the "
            "expansion factor"
        )
    plan = RunPlan(
        d_model=meta.d_model,
        n_latents=n_latents,
        k=config.k,
        aux_k=min(config.aux_k or default_aux_k(meta.d_model), n_latents),
        aux_coef=config.aux_coef,
        lr=config.lr or scaling_law_lr(n_latents),
        warmup_fraction=config.warmup_fraction,
        decay_fraction=config.decay_fraction,
        batch_size=config.batch_size,
        steps=steps,
        vectors=vectors,
        vectors_per_epoch=vectors_per_epoch,
        epochs=epochs,
        layers=streamed if layer is None else (layer,),
        stream_layers=None if layer is None else streamed,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        dead_vectors=dead_threshold(vectors // len(layers), len(layers) if layer is None else 1, config.dead_tokens),
        loss_space=config.loss_space,
        window_bytes=int(config.window_gb * 1e9 / 2),
        product_dtype=resolve_product_dtype(config.dtype, device),
        device=device.type,
        kernels=choose_kernels(torch.empty(0, device=device), config.kernels).name,
        activation=config.activation,
        standardize=config.standardize,
        encoder_bias=thresholded if config.encoder_bias is None else config.encoder_bias,
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        prefixes=(config.prefixes or default_prefixes(n_latents)) if config.activation == "matryoshka" else (),
        k_start=config.k_start,
        k_warmup_fraction=config.k_warmup_fraction,
        multi_topk=config.multi_topk,
        sparsity_loss=config.sparsity_loss,
        sparsity_coef=_sparsity_coef(config) if thresholded else 0.0,
        sparsity_warmup_fraction=config.sparsity_warmup_fraction,
        bandwidth=config.bandwidth,
        decoder_norm=config.decoder_norm,
        clip_norm=config.clip_norm,
        ema_decay=config.ema_decay,
        tile_mb=config.tile_mb,
    )
    assert plan.sae_config.k == plan.k  # making it refuses what cannot be
    return plan


def _sparsity_coef(config: TrainConfig) -> float:
    if config.sparsity_coef is not None:
        return config.sparsity_coef
    return 1.0 if config.activation == "jumprelu" and config.sparsity_loss == "target" else 0.5


class MemoryEstimate(NamedTuple):
    """Bytes that runs need beside the interpreter."""

    device: int
    """Weights, gradients, moments, a batch and its gradients, and tiles, on the training device."""

    shuffle: int
    """The loader's two windows, in the machine's memory."""


def memory_estimate(plans: Sequence[RunPlan], store: ActivationStore) -> MemoryEstimate:
    """How much memory runs of `plans` take over one stream: each its weights and moments; the rest is shared."""
    meta = store.meta
    held = sum((3 if plan.ema_decay is None else 4) * 4 * _weights(plan) for plan in plans)  # two moments, and a mean
    gradients = sum({plan.n_latents: 4 * _weights(plan) for plan in plans}.values())
    plan = plans[0]
    block = meta.chunk_tokens * meta.d_model * meta.itemsize
    window = min(max(plan.window_bytes, block), meta.n_chunks * len(plan.stream_layers or plan.layers) * block)
    return MemoryEstimate(held + gradients + max(_working(plan) for plan in plans), 2 * window)


def _weights(plan: RunPlan) -> int:
    return 2 * plan.n_latents * plan.d_model


def _working(plan: RunPlan) -> int:
    n, d = plan.batch_size, plan.d_model
    k = max(plan.k, plan.k_start or 0) * (4 if plan.multi_topk else 1)
    batch = n * (6 * 4 * d + 48 * k)  # six float32 [N, D]; codes, gradients, sorted pairs
    batch += int(n * k * d * choose_kernels(torch.empty(0, device=plan.device), plan.kernels).pair_bytes)
    blocks = 2 if plan.multi_topk else len(plan.prefixes)  # nested: an error of each, and one's gradients by themselves
    nested = blocks * n * 4 * d + 4 * _weights(plan) if blocks else 0
    casts = _weights(plan) if plan.product_dtype != "float32" else 0  # both weights, for the product and AuxK
    tiles = (10 if plan.activation in ("jumprelu", "relu") else 4) * plan.tile_bytes
    return 2 * casts + batch + nested + tiles


def default_aux_k(d_model: int) -> int:
    """The power of two nearest d_model / 2, in ratio (Gao et al. 2024, appendix A.2)."""
    return 2 ** max(0, round(math.log2(d_model / 2)))


_REPORTED_ONLY = ("device", "kernels", "tile_mb")
"""Fields that change the last bits of a run, not its meaning: a resume that differs in them is warned of."""


def compare_plans(path: object, saved: dict[str, Any], plan: RunPlan) -> list[str]:
    """Check that a checkpoint's plan is this one; returns warnings, raises `IncompatibleError` naming what differs."""
    warnings = []
    now = plan.to_dict()
    # A checkpoint from before a field was there was made with what is now its default.
    defaults = {field.name: None if field.default is MISSING else field.default for field in fields(RunPlan)}
    defaults["prefixes"] = list(RunPlan.prefixes)  # as `to_dict` has it
    for field in fields(RunPlan):
        before, after = saved.get(field.name, defaults[field.name]), now[field.name]
        if before == after:
            continue
        found = f"{field.name} was {before} when {path} was saved and is {after} now"
        if field.name not in _REPORTED_ONLY:
            way_out = "give the same flags to resume, or --overwrite to start anew"
            if field.name == "product_dtype":  # what "auto" stands for depends on the machine
                way_out = f"give --dtype {before} to resume, or --overwrite to start anew"
            if field.name == "product_dtype" and before in ("float16", "int16"):
                way_out = f"{before} products are no more: give --overwrite to start anew"
            raise IncompatibleError(f"{found}; {way_out}")
        warnings.append(f"{found}: the result will not be bit for bit that of an unbroken run")
    return warnings
