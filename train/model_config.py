"""What an autoencoder is, apart from its weights. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from residscope.errors import UsageError

Activation = Literal["topk", "batchtopk", "matryoshka", "jumprelu", "relu"]
Standardize = Literal["vector", "layer", "none"]

THRESHOLDED: tuple[Activation, ...] = ("jumprelu", "relu")
"""Those whose latents are active above a threshold, however many that is: a sparsity term keeps them few."""

_LARGEST = 2**48
"""Limit of each size and of a matrix's numbers: far more than any memory holds, far less than torch can count."""


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """What an autoencoder is, apart from its weights."""

    d_model: int
    """Width of the residual stream."""
    n_latents: int
    """Number of latents of the dictionary; expansion factor times d_model."""
    k: int
    """Active latents per vector: topk at most, batchtopk and matryoshka on average over a training batch, jumprelu the
    target of training, or 0 if that is not known; relu does not use it (`active`)."""
    standardize: Standardize = "vector"
    """"vector": subtract each vector's own mean and divide by its own standard deviation; "layer": one mean vector and
    one scale for all vectors of a layer; "none": vectors as they are."""
    activation: Activation = "topk"
    """How latents are chosen: see `train.objective.variants`."""
    encoder_bias: bool = False
    """Whether a bias is added to the pre-activations."""
    apply_b_dec_to_input: bool = True
    """Whether b_pre, which the decoder adds, is also subtracted from the encoder's input."""
    prefixes: tuple[int, ...] = ()
    """matryoshka: sizes of the nested dictionaries, each the first so many latents; increasing, the last n_latents."""
    layers: tuple[int, ...] = ()
    """If standardize is "layer", the model's numbers of the layers that have a mean and a scale."""

    def __post_init__(self) -> None:
        for name, word in (("standardize", Standardize), ("activation", Activation)):
            if (found := getattr(self, name)) not in (known := get_args(word)):
                raise UsageError(f"{name} should be one of {', '.join(known)}, found {found!r:.60}")
        numbers, flags = (self.d_model, self.n_latents, self.k), (self.encoder_bias, self.apply_b_dec_to_input)
        lists = (self.prefixes, self.layers)
        if {*map(type, flags)} != {bool} or {*map(type, lists)} != {tuple}:
            raise UsageError(f"biases should be true or false, prefixes and layers lists: {(*flags, *lists)!s:.80}")
        if any(type(n) is not int or n > _LARGEST for n in (*numbers, *self.prefixes, *self.layers)):
            raise UsageError(f"sizes should be whole numbers, found {(*numbers, *lists)!s:.80}")
        for name, least in (("d_model", 1), ("n_latents", 1), ("k", 0 if self.activation in THRESHOLDED else 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} should be at least {least}, found {getattr(self, name)}")
        if self.d_model * self.n_latents > _LARGEST:
            raise UsageError(f"d_model {self.d_model} and n_latents {self.n_latents} are more than any memory holds")
        if self.k > self.n_latents:
            there = f"there are only {self.n_latents} latents"
            raise UsageError(f"k is {self.k}, but {there}: lower k, or raise the expansion factor")
        if any(layer < 0 for layer in self.layers) or len(set(self.layers)) < len(self.layers):
            raise UsageError(f"layers should be block indices, each once, found {list(self.layers)!r:.60}")
        if (self.standardize == "layer") != bool(self.layers):
            raise UsageError(f"layers are {list(self.layers)} where standardize is {self.standardize!r}")
        if self.activation == "matryoshka":
            sizes = (0, *self.prefixes)
            if len(sizes) == 1 or sizes[-1] != self.n_latents or any(a >= b for a, b in zip(sizes, sizes[1:])):  # noqa: B905, RUF007
                wanted = f"increase from at least 1 to n_latents {self.n_latents}"
                raise UsageError(f"prefixes should {wanted}, found {' '.join(map(str, self.prefixes)) or 'none'}")
        elif self.prefixes:
            raise UsageError(f"prefixes are for activation 'matryoshka', not for {self.activation!r}")

    @property
    def active(self) -> int:
        """k, or 0 if it is not known or, for relu, not used."""
        return 0 if self.activation == "relu" else self.k

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "SAEConfig":
        """From the result of `dataclasses.asdict`, with lists in place of tuples if it went through JSON."""
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)


def default_prefixes(n_latents: int) -> tuple[int, ...]:
    """Prefixes that add 1/32, 1/16, 1/8, 1/4 and the rest of the latents, as in Bussmann et al. 2025."""
    sizes = [round(n_latents * share / 32) for share in (1, 3, 7, 15, 32)]
    return tuple(sorted({size for size in sizes if size > 0}))


def require_shares(config: SAEConfig, size: int) -> None:
    """`UsageError` unless the latents can be divided equally among `size` processes, at least k to each."""
    m = config.n_latents
    if m % size or config.k > m // size:
        wanted = f"as many equal parts of at least k ({config.k}) latents"
        raise UsageError(f"--shard-latents {size}: {m} latents do not make {wanted}: choose another --n-latents")
