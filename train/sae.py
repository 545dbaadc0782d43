"""The multi-layer sparse autoencoder: its configuration, its forward pass, and its checkpoint on disk.

One TopK autoencoder is shared by all layers (Lawson et al. 2025, section 3). Each residual stream vector x is
standardised on its own, then

    z = W_enc (x_std - b_pre)           h = ReLU(TopK_k(z))
    x_hat_std = W_dec^T h + b_pre       x_hat = x_hat_std * (std + eps) + mean

Both weights are stored as [n_latents, d_model], so that a latent is a row of each and gathers read whole rows. Encoding
never holds more than a tile of the [N, n_latents] pre-activations. Not here: gradients and training (`train.step`,
`train.loop`), and other projects' file formats.

Shapes: N vectors, D d_model, M n_latents, k active latents a vector.
"""

import os
import pickle
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from store.errors import IncompatibleError, ResidscopeError, UsageError
from train.kernels import Kernels, SparseCodes, choose_kernels

CHECKPOINT_FORMAT = 1

STD_EPSILON = 1e-5
"""Added to a vector's standard deviation before the division, as the reference does, so that its models carry over."""

TILE_BYTES = 16 * 2**20
"""Pre-activations held at once: a tile this large is still in the last-level cache when top-k reads it."""


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """What an autoencoder is, apart from its weights."""

    d_model: int
    """Width of the residual stream."""

    n_latents: int
    """Number of latents of the dictionary; expansion factor times d_model."""

    k: int
    """Latents that may be active on one vector."""

    standardize: Literal["vector", "none"] = "vector"
    """"vector": each vector loses its own mean and is divided by its own standard deviation; "none": as they are."""

    activation: Literal["topk"] = "topk"
    """How latents are chosen."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_latents", "k"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} should be at least 1, found {getattr(self, name)}")
        if self.k > self.n_latents:
            raise UsageError(
                f"k is {self.k}, but there are only {self.n_latents} latents: lower k, or raise the expansion factor"
            )


class Standardized(NamedTuple):
    """Vectors with their own mean and scale taken out, and what puts them back."""

    x: Tensor
    """[N, D] (x - mean) / std."""

    mean: Tensor
    """[N, 1] mean over d_model."""

    std: Tensor
    """[N, 1] unbiased standard deviation over d_model plus `STD_EPSILON`: what x was divided by."""


class ForwardOutput(NamedTuple):
    """A reconstruction and how it came about."""

    x_hat: Tensor
    """[N, D] reconstruction in raw space."""

    codes: SparseCodes
    """Active latents, values [N, k] and indices [N, k]."""

    mean: Tensor
    """[N, 1] mean of each vector."""

    std: Tensor
    """[N, 1] scale of each vector, `STD_EPSILON` included."""


class MLSAE(nn.Module):
    """The autoencoder. Its forward pass is for inference: training has its own gradients (`train.step`)."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        self.W_enc = nn.Parameter(torch.zeros(config.n_latents, config.d_model))  # [M, D]
        self.W_dec = nn.Parameter(torch.zeros(config.n_latents, config.d_model))  # [M, D], unit rows once initialised
        self.b_pre = nn.Parameter(torch.zeros(config.d_model))  # [D]

    @torch.no_grad()
    def initialize(self, seed: int, b_pre: Tensor | None = None) -> None:
        """Random unit rows, the encoder tied to the decoder (Gao et al. 2024, appendix A.1), and `b_pre` [D] or zero.

        The draw is made on the CPU in float32, so that a seed means the same weights on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(self.W_dec.shape, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_dec.copy_(rows)
        self.W_enc.copy_(rows)
        if b_pre is None:
            self.b_pre.zero_()
        else:
            self.b_pre.copy_(b_pre)

    def standardize(self, x: Tensor) -> Standardized:
        """Raw vectors [N, D] to the space that the dictionary lives in."""
        if self.config.standardize == "none":
            return Standardized(x, x.new_zeros(len(x), 1), x.new_ones(len(x), 1))
        return standardize(x)

    @torch.no_grad()
    def encode(self, x: Tensor, *, product_dtype: torch.dtype | None = None) -> SparseCodes:
        """Codes of raw vectors `x` [N, D], in the type of the weights: values [N, k] >= 0, indices int64 [N, k].

        `product_dtype` bfloat16 makes the encoder's product in that type (a few times faster where the hardware has
        it); default: the weights' type.
        """
        return self.encode_standardized(self.standardize(x.to(self.W_enc.dtype)).x, product_dtype=product_dtype)

    @torch.no_grad()
    def encode_standardized(self, x_std: Tensor, *, product_dtype: torch.dtype | None = None) -> SparseCodes:
        """As `encode`, of vectors that `standardize` has seen: for callers that need the mean and scale as well."""
        self._check_width(x_std)
        centred = x_std - self.b_pre
        return encode_tiled(centred, self.W_enc, self.config.k, product_dtype=product_dtype)

    @torch.no_grad()
    def decode(self, codes: SparseCodes, mean: Tensor, std: Tensor) -> Tensor:
        """Raw reconstruction [N, D] from codes and the mean [N, 1] and scale [N, 1] that `standardize` gave."""
        kernels = choose_kernels(self.W_dec)
        x_hat_std = kernels.decode(codes.values, codes.indices, self.W_dec) + self.b_pre
        return x_hat_std * std + mean

    @torch.no_grad()
    def forward(self, x: Tensor, *, product_dtype: torch.dtype | None = None) -> ForwardOutput:
        """Encode and decode raw vectors `x` [N, D]."""
        x_std, mean, std = self.standardize(x.to(self.W_enc.dtype))
        codes = self.encode_standardized(x_std, product_dtype=product_dtype)
        return ForwardOutput(self.decode(codes, mean, std), codes, mean, std)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.config.d_model:
            raise IncompatibleError(
                f"the autoencoder has d_model {self.config.d_model}, the vectors have {x.shape[-1]}"
            )


def standardize(x: Tensor) -> Standardized:
    """Each row of `x` [N, D] minus its own mean, divided by its own unbiased standard deviation plus `STD_EPSILON`."""
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    # The same number as x.std(), which torch computes a hundred times more slowly on a CPU.
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (x.shape[-1] - 1) ** 0.5 + STD_EPSILON
    return Standardized(centred.div_(std), mean, std)


@torch.no_grad()
def encode_tiled(
    centred: Tensor,
    W_enc: Tensor,
    k: int,
    *,
    product_dtype: torch.dtype | None = None,
    tile_bytes: int = TILE_BYTES,
    kernels: Kernels | None = None,
) -> SparseCodes:
    """ReLU(TopK_k(centred @ W_enc^T)) [N, k], a tile of rows at a time: `centred` [N, D] is x_std - b_pre."""
    kernels = kernels or choose_kernels(W_enc)
    n, m = len(centred), len(W_enc)
    dtype = product_dtype or W_enc.dtype
    left, right = centred.to(dtype), W_enc.to(dtype).t()
    values = centred.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int64, device=centred.device)
    rows = min(n, max(1, tile_bytes // (m * right.element_size())))
    tile = torch.empty(rows, m, dtype=dtype, device=centred.device)  # one for all: fresh memory costs page faults
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        z = torch.mm(left[part], right, out=tile[: n - start])
        values[part], indices[part] = kernels.topk_relu(z, k)
    return SparseCodes(values, indices)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint file holds."""

    config: SAEConfig
    """What the autoencoder is."""

    sae: MLSAE
    """The autoencoder, float32, on the CPU."""

    store: dict[str, Any]
    """Which data it was trained on: content_hash, path (the store's name), d_model, layers, model, lens,
    validation {fraction, seed, n_documents}."""

    trainer: dict[str, Any]
    """Where training stands: step, finished, the configuration, and while unfinished all that a resume needs."""


def save_checkpoint(path: Path, sae: MLSAE, *, store: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Write `ckpt.pt`, whole or not at all: a temporary file, fsync, rename, fsync of the folder."""
    content = {
        "format": CHECKPOINT_FORMAT,
        "config": asdict(sae.config),
        "state_dict": {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()},
        "store": store,
        "trainer": trainer,
    }
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; only tensors and plain values are accepted, so that a file from a stranger cannot run code.

    Raises `ResidscopeError` if there is no such file, `IncompatibleError` if it is no whole checkpoint of this format.
    """
    content = _read_safely(Path(path))
    version = content.get("format")
    if version != CHECKPOINT_FORMAT:
        raise IncompatibleError(
            f"{path}: checkpoint format {version}, here {CHECKPOINT_FORMAT} is read: use the version that wrote it"
        )
    config = _config_of(content.get("config"), path)
    state = content.get("state_dict")
    expected = {
        "W_enc": (config.n_latents, config.d_model),
        "W_dec": (config.n_latents, config.d_model),
        "b_pre": (config.d_model,),
    }
    for name, shape in expected.items():
        found = state.get(name) if isinstance(state, dict) else None
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            shown = list(found.shape) if isinstance(found, Tensor) else None
            raise IncompatibleError(f"{path}: {name} should be {list(shape)} by the checkpoint's config, found {shown}")
    sae = MLSAE(config)
    sae.load_state_dict({name: content["state_dict"][name] for name in expected})
    return Checkpoint(config=config, sae=sae, store=content.get("store") or {}, trainer=content.get("trainer") or {})


def _read_safely(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ResidscopeError(f"{path}: no such checkpoint; `train --store STORE --out {path}` makes one")
    if not zipfile.is_zipfile(path):
        raise IncompatibleError(f"{path}: refused: no checkpoint, or one cut short (a bare pickle is never loaded)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise IncompatibleError(
            f"{path}: refused: it holds more than tensors and plain values, so code could run on loading"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]
        raise IncompatibleError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(content, dict) or "state_dict" not in content or "config" not in content:
        raise IncompatibleError(f"{path}: not a checkpoint of this project: it should hold config and state_dict")
    return content


def _config_of(found: Any, path: Path) -> SAEConfig:
    known = {field.name for field in fields(SAEConfig)}
    if not isinstance(found, dict) or not set(found) <= known or not {"d_model", "n_latents", "k"} <= set(found):
        shown = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise IncompatibleError(f"{path}: the checkpoint's config should have {sorted(known)}, found {shown}")
    return SAEConfig(**found)
