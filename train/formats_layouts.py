"""How other projects lay out one sparse autoencoder: tensor names, configuration keys, and what they mean.

Three layouts are known, each a folder of one safetensors file and one JSON file: mlsae (the paper's own models),
SAELens (version 6) and sparsify. `parse_*` turns what such a folder holds into our weights; `lay_out_*` does the
reverse. Both keep reconstructions: what a layout can say differently (a decoder norm folded out of the encoder, a
pre-encoder bias that is not subtracted) is worked into the weights, and what would change the result is refused by
name. Nothing here touches a disk or a network; `train.formats` does.

    mlsae     h = TopK(W_enc (s(x) - b))                     x_hat = s^-1(W_dec h + b)     s: standardise each vector
    SAELens   h = TopK(W_enc (s(x) - b_dec) + b_enc)         x_hat = s^-1(W_dec h + b_dec)   s: "layer_norm" or nothing
    sparsify  h = TopK(W_enc (x - b_dec) + b_enc)            x_hat = W_dec h + b_dec

Shapes: M n_latents, D d_model; ours are W_enc [M, D], W_dec [M, D], b_pre [D], b_enc [M].
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from store.errors import IncompatibleError
from train.sae import MLSAE, SAEConfig

ForeignFormat = Literal["mlsae", "saelens", "sparsify"]

SAELENS_LAYOUT = "6.54.12"
"""The SAELens whose layout is written; SAELens converts a folder that names a version before 6."""

DEAD_STEPS = 76
"""mlsae's `dead_steps_threshold`, which only its training reads: 10 million tokens in batches of 131,072."""

OURS = "residscope"
"""The key under which we keep what a layout has no word for; the other tools ignore it."""

STANDARDIZED_INPUTS = (
    "sparsify does not standardise: give it vectors that have lost their own mean and been divided by their own "
    "unbiased standard deviation + 1e-5, and map what it returns back with the same two numbers"
)


class TensorFile(Protocol):
    """An open safetensors file, as `safetensors.safe_open` gives it: names at once, tensors when asked for."""

    def keys(self) -> Collection[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """One foreign autoencoder in our terms."""

    sae: MLSAE
    """The autoencoder, float32, on the CPU."""

    stored_dtype: str
    """Type of the encoder's weights in the file, such as "bfloat16"."""

    model: str | None = None
    """Which transformer it was trained on, where the folder says so."""

    layers: tuple[int, ...] | None = None
    """Which blocks' outputs it was trained on, where the folder says so."""

    store: dict[str, Any] | None = None
    """The store's record, where one of our own autoencoders was converted."""

    notes: tuple[str, ...] = ()
    """What a user has to know and the weights do not say."""


class LaidOut(NamedTuple):
    """One of our autoencoders as another project's files."""

    tensors: dict[str, Tensor]
    """By the names of that layout; contiguous float32."""

    config: dict[str, Any]
    """Its JSON configuration."""

    notes: tuple[str, ...]
    """What the layout cannot say."""


class _Reader(NamedTuple):
    """A tensor file and where it is, for errors that name it."""

    file: TensorFile
    where: str
    prefix: str = ""

    def get(self, name: str, *shape: int | None) -> Tensor:
        """Tensor `name`, whose shape must be `shape` (None: any size)."""
        if self.prefix + name not in self.file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            raise IncompatibleError(f"{self.where}: {name} is missing; it holds {listed(sorted(self.names()))}")
        tensor = self.file.get_tensor(self.prefix + name)
        wrong = [1 for size, wanted in zip(tensor.shape, shape, strict=False) if wanted not in (None, size)]
        if tensor.dim() != len(shape) or wrong:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise IncompatibleError(f"{self.where}: {name} should have shape [{expected}], it has {list(tensor.shape)}")
        return tensor

    def names(self) -> set[str]:
        return {name.removeprefix(self.prefix) for name in self.file.keys() if name.startswith(self.prefix)}  # noqa: SIM118

    def require_only(self, known: Collection[str]) -> None:
        """Refuse tensors that we do not know: each could change the reconstruction."""
        if unknown := sorted(self.names() - set(known)):
            raise IncompatibleError(
                f"{self.where}: holds {listed(unknown)}, which a TopK autoencoder without a skip connection, gate, "
                "threshold or lens of its own does not have; such models are not read here"
            )


def parse_mlsae(file: TensorFile, config: Mapping[str, Any], where: str) -> Parsed:
    """mlsae's `model.safetensors` and `config.json`; of a `-tfm` repository, only what is below `autoencoder.`."""
    with_transformer = any(name.startswith("autoencoder.") for name in file.keys())  # noqa: SIM118
    reader = _Reader(file, where, "autoencoder." if with_transformer else "")
    reader.require_only(("encoder.weight", "decoder.weight", "pre_encoder_bias", "last_nonzero"))
    W_enc = reader.get("encoder.weight", None, None)
    m, d = W_enc.shape
    notes: tuple[str, ...] = ()
    if config.get("tuned_lens"):
        notes = (
            f"{where}: its vectors went through a tuned lens: use a store that was harvested with the same --lens",
        )
    return Parsed(
        sae=_assemble(
            SAEConfig(
                d_model=d,
                n_latents=m,
                k=_k(config.get("k"), m, where),
                standardize="vector" if config.get("standardize", True) else "none",
            ),
            W_enc=W_enc,
            W_dec=reader.get("decoder.weight", d, m).T,
            b_pre=reader.get("pre_encoder_bias", d),
        ),
        stored_dtype=_dtype_name(W_enc),
        model=config.get("model_name"),
        layers=_layers(config.get("layers")),
        store=_our_store(config.get(OURS)),
        notes=notes,
    )


def parse_saelens(file: TensorFile, config: Mapping[str, Any], where: str) -> Parsed:
    """SAELens's `sae_weights.safetensors` and `cfg.json`, version 6 (and, for TopK, the versions before)."""
    activation = config.get("activation_fn", config.get("activation_fn_str"))
    options = _mapping(config.get("activation_fn_kwargs"))
    architecture = "topk" if activation == "topk" else config.get("architecture")
    if architecture != "topk":
        raise IncompatibleError(
            f"{where}: a SAELens autoencoder of architecture {architecture!r}; only 'topk' is read here"
        )
    if options.get("signed"):
        raise IncompatibleError(f"{where}: a TopK by absolute value (signed); only TopK with ReLU is read here")
    metadata = _mapping(config.get("metadata")) or config  # before version 6 it was all one level
    reader = _Reader(file, where)
    reader.require_only(("W_enc", "W_dec", "b_enc", "b_dec"))
    stored = reader.get("W_enc", None, None)
    d, m = stored.shape
    W_enc, W_dec = stored.float().T, reader.get("W_dec", m, d).float()
    b_enc, b_dec = reader.get("b_enc", m).float(), reader.get("b_dec", d).float()
    if config.get("rescale_acts_by_decoder_norm"):
        # It ranks and keeps activations as if every decoder row had unit norm; so give it unit rows.
        norm = W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8)  # [M, 1]
        W_enc, W_dec, b_enc = W_enc * norm, W_dec / norm, b_enc * norm.squeeze(1)
    if not config.get("apply_b_dec_to_input", True):
        b_enc = b_enc + W_enc @ b_dec  # W_enc x = W_enc (x - b_dec) + W_enc b_dec
    hook = str(metadata.get("hook_name") or "")
    return Parsed(
        sae=_assemble(
            SAEConfig(
                d_model=d,
                n_latents=m,
                k=_k(config.get("k", options.get("k")), m, where),
                standardize=_saelens_standardize(config.get("normalize_activations"), where),
            ),
            W_enc=W_enc,
            W_dec=W_dec,
            b_pre=b_dec,
            b_enc=b_enc,
            where=where,
        ),
        stored_dtype=_dtype_name(stored),
        model=metadata.get("model_name"),
        layers=_layers(re.findall(r"^blocks\.(\d+)\.hook_resid_post$", hook)),
        store=_our_store(metadata.get(OURS)),
    )


def _saelens_standardize(found: Any, where: str) -> Literal["vector", "none"]:
    if found == "layer_norm":
        return "vector"
    if found in (None, False, "none"):
        return "none"
    name = "expected_average_only_in" if found is True else found
    raise IncompatibleError(
        f"{where}: normalize_activations is {name!r}, whose numbers are not in the folder; 'none' and 'layer_norm' are "
        "read here: fold the scale into the weights with SAELens and save again"
    )


def parse_sparsify(file: TensorFile, config: Mapping[str, Any], where: str) -> Parsed:
    """sparsify's `sae.safetensors` and `cfg.json` of one hookpoint."""
    for key, wanted, why in (
        ("activation", "topk", "only TopK is read here"),
        ("transcode", False, "a transcoder maps one place to another, and does not reconstruct"),
        ("skip_connection", False, "a skip connection has no place in our autoencoder"),
        ("signed", False, "only TopK with ReLU is read here"),
    ):
        if config.get(key, wanted) != wanted:
            raise IncompatibleError(f"{where}: {key} is {config[key]!r}: {why}")
    reader = _Reader(file, where)
    reader.require_only(("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    W_enc = reader.get("encoder.weight", None, None)
    m, d = W_enc.shape
    ours = _mapping(config.get(OURS))
    return Parsed(
        sae=_assemble(
            SAEConfig(
                d_model=d,
                n_latents=m,
                k=_k(config.get("k"), m, where),
                standardize="vector" if ours.get("standardize") == "vector" else "none",
            ),
            W_enc=W_enc,
            W_dec=reader.get("W_dec", m, d),
            b_pre=reader.get("b_dec", d),
            b_enc=reader.get("encoder.bias", m),
            where=where,
        ),
        stored_dtype=_dtype_name(W_enc),
        layers=_layers(re.findall(r"(?:layers|h)[._](\d+)$", where)),  # the folder is named after the hookpoint
        store=_our_store(ours),
    )


def lay_out_mlsae(sae: MLSAE, store: Mapping[str, Any], hookpoint: str | None) -> LaidOut:
    """The layout of the paper's published models; exact, as it is the same model."""
    config = {
        "auxk": None,
        "dead_steps_threshold": DEAD_STEPS,
        "dead_threshold": 1e-3,
        "k": sae.config.k,
        "n_inputs": sae.config.d_model,
        "n_latents": sae.config.n_latents,
        "standardize": sae.config.standardize == "vector",
        OURS: _ours(sae, store),
    }
    tensors = {"encoder.weight": sae.W_enc, "decoder.weight": sae.W_dec.T, "pre_encoder_bias": sae.b_pre}
    return LaidOut(_contiguous(tensors), config, _lens_note(store))


def lay_out_saelens(sae: MLSAE, store: Mapping[str, Any], hookpoint: str | None) -> LaidOut:
    """SAELens version 6, architecture "topk"; its "layer_norm" is our standardisation of each vector."""
    config = {
        "architecture": "topk",
        "d_in": sae.config.d_model,
        "d_sae": sae.config.n_latents,
        "k": sae.config.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": False,
        "normalize_activations": "layer_norm" if sae.config.standardize == "vector" else "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_LAYOUT,
            "sae_lens_training_version": None,
            "model_name": store.get("model"),
            "hook_name": hookpoint,
            OURS: _ours(sae, store),
        },
    }
    tensors = {
        "W_enc": sae.W_enc.T,
        "b_enc": torch.zeros(sae.config.n_latents),
        "W_dec": sae.W_dec,
        "b_dec": sae.b_pre,
    }
    return LaidOut(_contiguous(tensors), config, _lens_note(store))


def lay_out_sparsify(sae: MLSAE, store: Mapping[str, Any], hookpoint: str | None) -> LaidOut:
    """sparsify 1.3; it cannot standardise, and a note says what its inputs then have to be."""
    d, m = sae.config.d_model, sae.config.n_latents
    config = {
        "activation": "topk",
        "expansion_factor": max(1, m // d),
        "normalize_decoder": True,
        "num_latents": m,
        "k": sae.config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d,
        OURS: _ours(sae, store),
    }
    tensors = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": torch.zeros(m),
        "W_dec": sae.W_dec,
        "b_dec": sae.b_pre,
    }
    notes = (STANDARDIZED_INPUTS,) if sae.config.standardize == "vector" else ()
    return LaidOut(_contiguous(tensors), config, notes + _lens_note(store))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One foreign layout: its two files and its two directions."""

    weights_file: str
    """Name of the safetensors file."""

    config_file: str
    """Name of the JSON file beside it."""

    parse: Callable[[TensorFile, Mapping[str, Any], str], Parsed]
    """(open weights, configuration, where for errors) -> our autoencoder."""

    lay_out: Callable[[MLSAE, Mapping[str, Any], str | None], LaidOut]
    """(autoencoder, the store's record, hookpoint) -> files."""


LAYOUTS: dict[ForeignFormat, Layout] = {
    "mlsae": Layout(
        weights_file="model.safetensors", config_file="config.json", parse=parse_mlsae, lay_out=lay_out_mlsae
    ),
    "saelens": Layout(
        weights_file="sae_weights.safetensors", config_file="cfg.json", parse=parse_saelens, lay_out=lay_out_saelens
    ),
    "sparsify": Layout(
        weights_file="sae.safetensors", config_file="cfg.json", parse=parse_sparsify, lay_out=lay_out_sparsify
    ),
}


def _assemble(
    config: SAEConfig, *, W_enc: Tensor, W_dec: Tensor, b_pre: Tensor, b_enc: Tensor | None = None, where: str = ""
) -> MLSAE:
    if b_enc is not None and bool((b_enc != 0).any()):
        raise IncompatibleError(
            f"{where}: it has an encoder bias (largest entry {b_enc.abs().max().item():.3g}) that our autoencoder has "
            "no place for; only models whose encoder bias is zero are read"
        )
    sae = MLSAE(config)
    sae.load_state_dict({"W_enc": W_enc, "W_dec": W_dec, "b_pre": b_pre})
    return sae


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As the files want them: float32, on the CPU, one block of memory each, none shared."""
    return {
        name: tensor.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are: for errors."""
    return (", ".join(names[:8]) or "nothing") + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _k(found: Any, n_latents: int, where: str) -> int:
    if type(found) is not int or not 1 <= found <= n_latents:
        raise IncompatibleError(
            f"{where}: k should be a whole number from 1 to n_latents {n_latents}, the configuration says {found!r}"
        )
    return found


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _layers(found: Any) -> tuple[int, ...] | None:
    return tuple(int(layer) for layer in found) or None if isinstance(found, list | tuple) else None


def _ours(sae: MLSAE, store: Mapping[str, Any]) -> dict[str, Any]:
    return {**asdict(sae.config), "store": dict(store)}


def _our_store(found: Any) -> dict[str, Any] | None:
    return _mapping(_mapping(found).get("store")) or None


def _mapping(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _lens_note(store: Mapping[str, Any]) -> tuple[str, ...]:
    lens = store.get("lens")
    return (f"it was trained on vectors that went through a tuned lens ({lens}): give it such vectors",) if lens else ()
