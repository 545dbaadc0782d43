"""The multi-layer sparse autoencoder and its forward pass.

One autoencoder is shared by all layers (Lawson et al. 2025, section 3). Each residual stream vector x is standardised,
on its own or by its layer, then

    z = W_enc (x_std - b_pre) + b_enc   h = the active ones of z: the k largest, or as the variant chooses
    x_hat_std = W_dec^T h + b_pre       x_hat = x_hat_std * std + mean

Both weights are [n_latents, d_model]: a latent is a row of each. Encoding holds a tile of pre-activations at a time.

Shapes: N vectors, D d_model, M n_latents, L layers, w the most active latents per vector.
"""

from dataclasses import asdict, replace
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor, nn
from torch import dtype as DType

from residscope.errors import IncompatibleError, UsageError
from residscope.first_calls import settle_first_calls
from train.kernels.choose import choose_kernels
from train.kernels.encode import ReadyEncoder
from train.kernels.interface import SparseCodes
from train.model_config import SAEConfig, require_shares
from train.objective.variants import variant_of
from train.objective.weights import BY_LATENT, TRAINED, Weights, unit_rows
from train.parallel.ranks import ALONE, Ranks
from train.parallel.selection import row_codes

settle_first_calls(torch)  # before anything is computed, wherever an autoencoder is

STD_EPSILON = 1e-5
"""Added to a vector's standard deviation before the division, as the reference does, so that its models carry over."""

TOO_LONG = "overflow float32 when they are squared: check the model's weights, or harvest without that layer (--layers)"


class Standardized(NamedTuple):
    """Standardised vectors, and the mean and scale that undo it."""

    x: Tensor
    """[N, D] (x - mean) / std."""
    mean: Tensor
    """[N, 1] mean over d_model, or [N, D] the mean vector of its layer."""
    std: Tensor
    """[N, 1] the divisor: x's unbiased standard deviation over d_model + `STD_EPSILON`, or its layer's scale."""


class ForwardOutput(NamedTuple):
    """A reconstruction and the codes behind it; mean and std as in `Standardized`."""

    x_hat: Tensor
    """[N, D] reconstruction in raw space."""
    codes: SparseCodes
    """Active latents, values [N, w] and indices [N, w]."""
    mean: Tensor
    std: Tensor


class MLSAE(nn.Module):
    """The autoencoder. Its forward pass is for inference: training has its own gradients (`train.objective.step`)."""

    threshold: Tensor
    """Scalar, batchtopk and matryoshka only: in inference, latents above it are active."""
    log_threshold: Tensor
    """[M], jumprelu only: logarithm of each latent's own threshold."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        self.latents: Ranks = ALONE
        """The ranks among which the latents are divided, if this is one part of a larger autoencoder."""
        self.variant = variant_of(config)
        m, d = config.n_latents, config.d_model
        self.W_enc = nn.Parameter(torch.zeros(m, d))  # [M, D]
        self.W_dec = nn.Parameter(torch.zeros(m, d))  # [M, D], unit rows once initialised
        self.b_pre = nn.Parameter(torch.zeros(d))  # [D]
        if config.encoder_bias:
            self.b_enc = nn.Parameter(torch.zeros(m))  # [M]
        for name, value in self.variant.extra_state().items():
            if name in TRAINED:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        if config.layers:
            self.layer_mean = nn.Buffer(torch.zeros(len(config.layers), d))  # [L, D]
            self.layer_scale = nn.Buffer(torch.ones(len(config.layers)))  # [L]

    def extra_repr(self) -> str:
        shown = ("n_latents", "d_model", "k", "activation")
        return ", ".join(f"{name}={getattr(self.config, name)!r}" for name in shown)

    @property
    def weights(self) -> Weights:
        """The autoencoder's own tensors; changing them in place changes it."""
        return Weights(**{name: getattr(self, name).data for name in Weights._fields if hasattr(self, name)})

    @torch.no_grad()
    def initialize(self, seed: int, b_pre: Tensor | None = None, *, encoder_scale: float = 1.0) -> None:
        """Random unit rows in the decoder, the same times `encoder_scale` in the encoder (tied: Gao et al. 2024,
        appendix A.1), and `b_pre` [D] or zero.

        The draw is made on the CPU in float32, so that a seed means the same weights on every device."""
        m = self.config.n_latents * self.latents.size
        for start, rows in unit_rows(m, self.config.d_model, seed, self.latents.own(m)):
            self.W_dec[start : start + len(rows)] = rows
            self.W_enc[start : start + len(rows)] = rows.mul_(encoder_scale)
        for name, value in self.variant.extra_state().items():
            getattr(self, name).copy_(value)
        if self.config.encoder_bias:
            self.b_enc.zero_()
        self.b_pre.copy_(torch.tensor(0.0) if b_pre is None else b_pre)

    @classmethod
    def share(cls, config: SAEConfig, latents: Ranks) -> "MLSAE":
        """A new autoencoder with this rank's share of the latents of `config`; all of them if there is one rank."""
        require_shares(config, latents.size)
        sae = cls(replace(config, n_latents=config.n_latents // latents.size))
        sae.latents = latents
        return sae

    def part(self, latents: Ranks) -> "MLSAE":
        """This rank's share of its latents; itself if there is only one rank, or if it is that share already."""
        if latents.size == 1 or self.latents is latents:
            return self
        part, own = MLSAE.share(self.config, latents), latents.own(self.config.n_latents)
        part.load_state_dict({n: t[own] if n in BY_LATENT else t for n, t in self.state_dict().items()})
        return part

    def rows_of_layer(self, number: int, n: int) -> Tensor | None:
        """The argument `layer` of `standardize` for `n` vectors of the model's layer `number`; None if not needed."""
        if not self.config.layers:
            return None
        if number not in self.config.layers:
            what = f"was not trained on layer {number}, only on {' '.join(map(str, self.config.layers))}"
            raise IncompatibleError(f"the autoencoder standardises by layer and {what}")
        return torch.full((n,), self.config.layers.index(number), device=self.W_enc.device)

    def standardize(self, x: Tensor, layer: Tensor | None = None) -> Standardized:
        """Take raw vectors [N, D] to the space of the dictionary.

        layer: int64 [N], each vector's position among the layers trained on, for standardisation by layer.
        """
        if self.config.standardize == "vector":
            return standardize(x)
        if self.config.standardize == "none":
            return Standardized(x, x.new_zeros(len(x), 1), x.new_ones(len(x), 1))
        if layer is None:
            raise UsageError("this autoencoder standardises by layer: give the layer of each vector")
        return standardize_by_layer(x, layer, self.layer_mean, self.layer_scale)

    @torch.no_grad()
    def encode(self, x: Tensor, layer: Tensor | None = None) -> SparseCodes:
        """Codes of raw vectors `x` [N, D], in the type of the weights: values [N, w] >= 0, indices int64 [N, w].

        w is k for topk, else the most active latents of any vector; value 0 means not active, whatever the index.
        layer: as in `standardize`.
        """
        return self.encode_standardized(self.standardize(x.to(self.W_enc.dtype), layer).x)

    def ready_encoder(self, *, product_dtype: torch.dtype | None = None, screened: bool = False) -> ReadyEncoder:
        """The encoder prepared for many batches, during which its weights must not change: see `ReadyEncoder`."""
        weights = self.weights
        kernels = choose_kernels(weights.W_enc)
        return ReadyEncoder(kernels, weights.W_enc, weights.b_enc, product_dtype=product_dtype, screened=screened)

    @torch.no_grad()
    def encode_standardized(self, x_std: Tensor, encoder: ReadyEncoder | None = None) -> SparseCodes:
        """As `encode`, for vectors that are standardised already: for callers that also need the mean and scale.

        encoder: from `ready_encoder`, for callers that encode many batches; default: made for this batch.
        """
        if (found := x_std.shape[-1]) != self.config.d_model:
            raise IncompatibleError(f"the autoencoder has d_model {self.config.d_model}, the vectors have {found}")
        inputs = x_std - self.b_pre if self.config.apply_b_dec_to_input else x_std
        return row_codes(self.variant.encode(inputs, self.weights, encoder or self.ready_encoder()), self.latents)

    @torch.no_grad()
    def decode(self, codes: SparseCodes, mean: Tensor, std: Tensor) -> Tensor:
        """Raw reconstruction [N, D] from codes and the mean and scale that `standardize` gave."""
        x_hat_std = choose_kernels(self.W_dec).decode(codes.values, codes.indices, self.W_dec)
        self.latents.sum_(x_hat_std)
        return x_hat_std.add_(self.b_pre).mul_(std).add_(mean)

    @torch.no_grad()
    def forward(self, x: Tensor, layer: Tensor | None = None, *, product_dtype: DType | None = None) -> ForwardOutput:
        """Encode and decode raw vectors `x` [N, D]; layer as in `standardize`."""
        x_std, mean, std = self.standardize(x.to(self.W_enc.dtype), layer)
        codes = self.encode_standardized(x_std, self.ready_encoder(product_dtype=product_dtype))
        return ForwardOutput(self.decode(codes, mean, std), codes, mean, std)


def standardize(x: Tensor) -> Standardized:
    """Each row of `x` [N, D] minus its own mean, divided by its own unbiased standard deviation plus `STD_EPSILON`.

    Raises `IncompatibleError` for vectors whose square overflows; on a CPU only, because a check would stall a GPU.
    """
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    # The same number as x.std(), which is a hundred times slower in torch on a CPU.
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (x.shape[-1] - 1) ** 0.5 + STD_EPSILON
    if std.device.type == "cpu" and std.isinf().any():
        longest = x.double().norm(dim=-1).max()
        raise IncompatibleError(f"the store has vectors as long as {longest:.1e}, which {TOO_LONG}")
    return Standardized(centred.div_(std), mean, std)


def standardize_by_layer(x: Tensor, layer: Tensor, layer_mean: Tensor, layer_scale: Tensor) -> Standardized:
    """Each row of `x` [N, D] minus its layer's mean, divided by its layer's scale: layer int64 [N], [L, D], [L]."""
    mean, std = layer_mean[layer], layer_scale[layer].unsqueeze(1)
    return Standardized((x - mean).div_(std), mean, std)


def sae_hash(sae: MLSAE) -> str:
    """A hash of an autoencoder's configuration and weights, whatever file they come from."""
    digest = xxhash.xxh3_128(repr(sorted(asdict(sae.config).items())).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().float().contiguous().numpy().data)
    return digest.hexdigest()
