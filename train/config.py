"""The flags of `train`: one small frozen dataclass for each component, and `TrainConfig`, which holds them all.

The docstring under a field is its flag's help; the first sentence of a class is the heading of its flags in `--help`.
Values are checked when a configuration is made; what depends on the store or the machine is resolved in
`train.resolve`. Imports nothing heavy, so that `train --help` answers at once. Tested in test_resolve.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from residscope.errors import UsageError
from residscope.options import require_seed, to_flat
from train.model_config import THRESHOLDED, Activation, Standardize

RecipeName = Literal["best", "gao", "paper"]
SecondMoment = Literal["weight", "latent"]
DEFAULT_EXPANSION_FACTOR = 16
"""Used when neither an expansion factor nor a number of latents is given."""
_MOST = 1e12
"""Upper limit of counts and sizes: larger ones overflow somewhere, and no run needs them."""

ONLY_FOR = {
    "k_start": ("topk", "batchtopk", "matryoshka", "jumprelu"),
    "multi_topk": ("topk",),
    "sparsity_loss": ("jumprelu",),
    "sparsity_coef": THRESHOLDED,
    "bandwidth": ("jumprelu",),
}
"""The fields of `ObjectiveConfig` that only some activation functions use."""


def _check(config: Any, *, counts: str = "", positive: str = "", not_negative: str = "", shares: str = "") -> None:
    """Raise `UsageError` for the first of these fields whose value is set and out of range."""
    for names, wanted, good in (
        (counts, f"above 0 and below {_MOST:.0e}", lambda value: 0 < value < _MOST),
        (positive, "above 0 and below 1e+38", lambda value: 0 < value < 1e38),  # what a float32 holds
        (not_negative, "0 or more", lambda value: 0 <= value < math.inf),
        (shares, "in [0, 1]", lambda value: 0 <= value <= 1),
    ):
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not good(value):
                expected = "a finite number" if value == math.inf and names != shares else wanted
                raise UsageError(f"--{name.replace('_', '-')} should be {expected}, found {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The autoencoder."""

    expansion_factor: float | None = None
    """Latents per dimension of the residual stream; n_latents is this times d_model; default: 16."""
    n_latents: int | None = None
    """Number of latents, instead of an expansion factor."""
    k: int = 32
    """Active latents per vector: at most (topk), on average (batchtopk, matryoshka), or the target (jumprelu)."""
    activation: Activation = "topk"
    """Which latents are active: topk: the k largest of a vector; batchtopk: the N * k largest of a batch of N;
    matryoshka: the same with nested dictionaries; jumprelu: those above a trained threshold; relu: all positive ones,
    with an L1 term."""
    standardize: Standardize = "vector"
    """vector: subtract each vector's own mean and divide by its own standard deviation; layer: one mean vector and one
    scale for each layer, measured on the training vectors; none: vectors as they are."""
    encoder_bias: bool | None = None
    """Add a bias to the pre-activations; default: for jumprelu and relu."""
    apply_b_dec_to_input: bool = True
    """Subtract b_pre, which the decoder adds, from the encoder's input too."""
    prefixes: tuple[int, ...] | None = None
    """matryoshka: sizes of the nested dictionaries, each the first so many latents; increasing, the last is n_latents;
    default: 1/32, 3/32, 7/32, 15/32 and all of them."""

    def __post_init__(self) -> None:
        _check(self, counts="expansion_factor n_latents k")
        if self.prefixes is not None and self.activation != "matryoshka":
            raise UsageError(f"--prefixes is for --activation matryoshka, not for {self.activation}")
        if self.n_latents is not None and self.expansion_factor is not None:
            raise UsageError(
                f"--n-latents {self.n_latents} and --expansion-factor {self.expansion_factor:g} both set the number of "
                "latents: give only one, on the command line or in a --config file"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    k_start: int | None = None
    """k at the first step, from which it moves linearly to --k; default: --k throughout."""
    k_warmup_fraction: float = 0.1
    """Share of the steps over which k moves from k_start to k."""
    multi_topk: bool = False
    """topk: add an eighth of the loss with 4 * k active latents, so that k may be changed afterwards (Gao et al.)."""
    sparsity_loss: Literal["target", "penalty"] = "target"
    """jumprelu: target, sparsity_coef * (L0 / k - 1)^2; penalty, sparsity_coef for every active latent, k unused."""
    sparsity_coef: float | None = None
    """Weight of the sparsity term. relu: weight of the codes' L1 norm against the squared error in standardised space;
    jumprelu: see sparsity_loss. Default: 1 for a target, else 0.5."""
    sparsity_warmup_fraction: float = 0.1
    """Share of the steps over which the sparsity term's weight rises linearly from 0."""
    bandwidth: float = 1.0
    """jumprelu: width of the window around a threshold in which pre-activations move it; at the start, the standard
    deviation of pre-activations is about encoder_scale."""
    aux_k: int | None = None
    """Dead latents that AuxK may use per vector; default: the power of two nearest d_model / 2."""
    aux_coef: float = 1 / 32
    """Weight of AuxK against the main loss; 0 turns it off."""
    dead_tokens: int | None = None
    """Tokens without firing after which a latent is dead; default: 10 million, or a tenth of the run's if fewer."""
    loss_space: Literal["standardized", "raw"] | None = None
    """Space of the loss: standardized gives every vector the same weight; raw is the reference's choice;
    default: the recipe's, standardized."""

    def __post_init__(self) -> None:
        _check(self, counts="aux_k dead_tokens k_start", positive="bandwidth", not_negative="aux_coef sparsity_coef")
        _check(self, shares="k_warmup_fraction sparsity_warmup_fraction")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the weights are updated."""

    lr: float | None = None
    """Peak learning rate; default: the recipe's, which depends on n_latents, batch size and vectors."""
    warmup_fraction: float | None = None
    """Share of the steps over which the learning rate rises linearly to its peak; default: the recipe's, 0.02."""
    decay_fraction: float | None = None
    """Share of the steps, at the end, over which the learning rate falls linearly towards zero; default: the
    recipe's, 0.5."""
    decoder_norm: Literal["fixed", "free"] = "fixed"
    """Decoder rows have unit norm after every step. fixed: the gradient's component along them is dropped; free: a step
    may change their norm, which then moves into the encoder's row, so that latents reach their scale sooner (topk,
    batchtopk, matryoshka): for --recipe gao or paper; with the default recipe FVU is 6 % higher."""
    clip_norm: float | None = None
    """Scale all gradients down if their joint norm exceeds this; 0.001 does so in most steps; 0: never; default: never
    in any recipe."""
    beta1: float | None = None
    """Adam's decay of the running mean of gradients; default: the recipe's, 0.8."""
    beta2: float | None = None
    """Adam's decay of the running mean of their squares; default: the recipe's, 0.95: gradients shrink with the
    error, and a longer memory of larger ones makes steps too small."""
    encoder_scale: float | None = None
    """The encoder starts as the decoder times this; default: the recipe's, 0.1 in most runs and at most 0.4."""
    encoder_lr: float | None = None
    """Learning rate of W_enc as a multiple of --lr; default: the recipe's, a third with up to 4,608 latents and 1e6
    vectors, more with larger dictionaries, less in longer runs."""
    second_moment: SecondMoment | None = None
    """What Adam keeps a mean squared gradient for: each weight, or each latent (in the encoder as though all inputs
    had one variance), which halves the optimiser's memory; default: the recipe's, latent."""
    ema_decay: float | None = None
    """Save and validate a running mean of the weights that decays by this factor each step, such as 0.999;
    default: save and validate the weights themselves."""

    def __post_init__(self) -> None:
        _check(
            self,
            positive="lr encoder_scale encoder_lr",
            not_negative="clip_norm",
            shares="warmup_fraction decay_fraction",
        )
        for name in ("beta1", "beta2", "ema_decay"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise UsageError(f"--{name.replace('_', '-')} should be in [0, 1), found {value}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and for how long."""

    batch_size: int | None = None
    """Vectors (one token at one layer each) in a step, of mixed layers; default: the recipe's, which depends on how
    many vectors the run has."""
    steps: int | None = None
    """Length of the run in steps, instead of epochs."""
    epochs: int | None = None
    """Length of the run in passes over the training tokens; default: 1."""
    layers: tuple[int, ...] | None = None
    """Train on these layers only (the model's own numbering); default: all that are stored."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    window_gb: float = 1.0
    """Memory for shuffling, in GB: two windows of the store, one used while the next is read."""

    def __post_init__(self) -> None:
        _check(self, counts="batch_size steps epochs window_gb")
        require_seed(self.seed)
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs both set the length of the run: give only one")
        if self.layers == ():
            raise UsageError("--layers names no layer: leave it out to train on all that are stored")
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise UsageError(f"--layers names a layer twice: {' '.join(map(str, self.layers))}")


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """The machine."""

    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Type of the encoder's product; weights stay float32. auto: the fastest that the hardware has: bfloat16 on CUDA
    and on CPUs with AMX, int8 on CPUs with AVX512-VNNI, else float32. int8: TopK, BatchTopK and Matryoshka without an
    encoder bias screen all latents in 8 bits and compute in float32 those that may be among the k largest; whatever
    needs every product computes them in bfloat16 on CPUs with AMX, else in float32."""
    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1, ...; auto: CUDA if there is one."""
    kernels: Literal["auto", "numba", "triton", "torch"] = "auto"
    """Sparse kernels: numba (compiled, CPU), triton (compiled, CUDA) or torch; auto: compiled where they apply."""
    threads: int | None = None
    """CPU threads; default: all cores, or with --resume as many as before, because the last bits depend on it."""
    tile_mb: float | None = None
    """Pre-activations held at once, in MB. Default: 16 on a CPU, where a tile that fits the last-level cache is
    fastest; 512 on CUDA, where each tile reads all weights again."""
    deterministic: bool | None = None
    """Insist that the same run gives the same bits. Default: on a CPU only, where it costs nothing; on CUDA it makes
    steps some per cent slower, more where AuxK is busy, and only with it is a resume bit for bit."""

    def __post_init__(self) -> None:
        _check(self, counts="threads tile_mb")
        if self.threads is not None and self.threads > 1024:  # with 100,000 the process dies without a message
            raise UsageError(f"--threads should be at most 1024, found {self.threads}")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written during training."""

    log_every: int = 10
    """Steps between two lines of metrics."""
    checkpoint_every: int = 500
    """Steps between two checkpoints during training; 0: only at the end, or when stopped by a signal."""

    def __post_init__(self) -> None:
        _check(self, positive="log_every", not_negative="checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation on held-out documents."""

    validate_every: int | None = None
    """Steps between two short validations during training; 0: only at the end; default: a quarter of the run."""
    validation_fraction: float = 0.05
    """Share of the documents that are held out of training, and on which validation runs."""
    validation_seed: int | None = None
    """Seed that chooses these documents; default: 0 whatever --seed is, so that runs with different seeds compare. For
    a store that is filled part by part, `harvest` has chosen them."""
    validation_tokens: int = 4096
    """Most held-out tokens for the validation at the end; those during training use up to 256."""

    def __post_init__(self) -> None:
        _check(self, positive="validation_tokens", not_negative="validate_every validation_seed")
        if self.validation_tokens < 2:
            raise UsageError("--validation-tokens should be at least 2 (FVU is not defined for one token), found 1")
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(f"--validation-fraction should be in [0, 1), found {self.validation_fraction}")


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Copies elsewhere."""

    tensorboard: bool = False
    """Also write the metrics for TensorBoard, to OUT.tensorboard/ (pip install 'residscope[tensorboard]')."""
    wandb: str | None = None
    """Also send the metrics to this Weights & Biases project (pip install 'residscope[wandb]')."""
    push_to_hub: str | None = None
    """When done, upload weights, metrics and a model card to this hub repository, OWNER/NAME."""
    hub_private: bool = False
    """Make that repository private if it is new."""
    hub_license: str = "unknown"
    """Licence of the weights for the model card, such as apache-2.0."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, or a sweep of them."""

    FIRST_FLAGS: ClassVar = (
        *("store", "out", "expansion_factor", "k", "activation", "epochs", "recipe"),
        *("resume", "overwrite", "dry_run"),
    )

    store: Path
    """Store of activations, as `harvest` makes it."""
    out: Path = Path("ckpt.pt")
    """Checkpoint to write. Metrics go beside it to NAME.metrics.jsonl, the resolved flags to NAME.config.toml."""
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    hardware: HardwareConfig = HardwareConfig()
    logging: LoggingConfig = LoggingConfig()
    validation: ValidationConfig = ValidationConfig()

    recipe: RecipeName | None = None
    """Sets the flags that are left out (lr, batch_size, beta1, beta2, encoder_scale, encoder_lr, second_moment,
    warmup_fraction, decay_fraction, loss_space). best: the lowest FVU found for runs of this length; gao: the scaling
    law of Gao et al., with warm-up and decay; paper: as in the MLSAE paper, a constant rate of 1e-4 and a loss in raw
    space, meant for 1e9 tokens. Default: best."""
    start_from: Path | None = None
    """Start from the weights of this autoencoder (anything that `analyze --sae` takes) instead of random ones; kind and
    sizes must be the same, except for k."""
    sweep: tuple[str, ...] | None = None
    """Train a whole grid in one pass over the data, such as k=16,32 expansion_factor=8,16: one checkpoint for each
    point, ckpt.k=16.expansion_factor=8.pt (--out gives the stem, or a folder), bit for bit that of the single run with
    the same flags. Any field that does not change the stream of batches can be swept."""
    per_layer: Literal["total", "each"] | None = None
    """Train one autoencoder per layer instead, on that layer's vectors of the same stream: the latents are
    divided among them (total), or each has as many (each). Checkpoints are ckpt.layer=0.pt, ..."""
    publish: PublishConfig = PublishConfig()

    dry_run: bool = False
    """Print steps, memory, disk and time, measured with a few steps that are discarded; write nothing."""
    resume: bool = False
    """Continue from the checkpoint if there is one, else start; the result is bit for bit that of an uninterrupted run.
    More --steps or --epochs lengthen a finished run: from its weights, the learning rate rises and falls again."""
    overwrite: bool = False
    """Start again and replace the checkpoint if there is one."""
    json: bool = False
    """Print a summary of the run as JSON on stdout."""
    follow: bool = False
    """Wait until the store exists. One that is filled part by part (`harvest --rolling`) is followed in any case."""
    cache_gb: float | None = None
    """Memory, in GB, for whole shards of a store at a URL, which are then fetched once, in long requests; the result is
    the same. Default: a third of what is free, shared by the processes on this machine; 0: none."""
    n_procs: int = 1
    """Processes on this machine that share each batch: the same training, up to rounding, with less time and memory for
    each; on CUDA one per GPU. `torchrun` starts them on several machines (docs/training.md)."""
    shard_latents: int = 1
    """How many processes divide the latents of one dictionary that a single one cannot hold (topk); groups of that size
    share the batches."""

    def __post_init__(self) -> None:
        activation = self.model.activation
        other = activation != "topk" or self.objective.multi_topk or self.optimizer.ema_decay or self.sweep
        if self.shard_latents > 1 and other:
            raise UsageError("--shard-latents is for --activation topk without --multi-topk, --ema-decay and --sweep")
        swept = any(word.startswith("activation=") for word in self.sweep or ())  # then each run is checked
        for name, kinds in ONLY_FOR.items():
            given = getattr(self.objective, name) != getattr(ObjectiveConfig, name)
            if given and not swept and activation not in kinds:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is for --activation {', '.join(kinds)}, not for {activation}")
        if self.optimizer.decoder_norm == "free" and activation in THRESHOLDED:
            raise UsageError(
                "--decoder-norm free is for --activation topk, batchtopk and matryoshka: thresholds and L1 terms "
                f"depend on the norms that it changes; found {activation}"
            )
        _check(self, positive="n_procs shard_latents", not_negative="cache_gb")
        if self.resume and self.overwrite:
            raise UsageError("--resume continues a checkpoint and --overwrite replaces it: give only one")

    def flags(self) -> dict[str, Any]:
        """The flags that reproduce this run."""
        of_invocation = ("dry_run", "resume", "overwrite", "json", "n_procs", "shard_latents", "follow", "cache_gb")
        return {name: value for name, value in to_flat(self).items() if name not in of_invocation}
