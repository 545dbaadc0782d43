"""How other projects lay out one sparse autoencoder: tensor names, configuration keys, and what they mean.

Here are mlsae (the paper's own models), sparsify, and the code that all layouts share; SAELens is in
`train.formats.saelens`. `parse_*` turns the contents of a folder into our weights; `lay_out_*` does the reverse. Both
keep reconstructions: what a layout expresses differently (a decoder norm folded out of the encoder) is folded into the
weights, and what would change the result is refused by name. Nothing here touches a disk or a network;
`train.formats.files` does.

    mlsae     h = TopK(W_enc (s(x) - b))              x_hat = s^-1(W_dec h + b)     s: standardise each vector
    sparsify  h = TopK(W_enc (x - b_dec) + b_enc)     x_hat = W_dec h + b_dec

Tested in tests/train/formats/test_files.py.

Shapes: M n_latents, D d_model; ours are W_enc [M, D], W_dec [M, D], b_pre [D], b_enc [M].
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import ne
from typing import Any, NamedTuple

import torch
from torch import Tensor

from residscope.errors import IncompatibleError
from train.model import MLSAE
from train.model_config import SAEConfig

OURS = "residscope"
"""The key under which we keep our own configuration and the store's record; the other tools ignore it."""

DEAD_STEPS = 76
"""mlsae's `dead_steps_threshold`, read only by its training: 10 million tokens in batches of 131,072."""

STANDARDIZED_INPUTS = (
    "sparsify does not standardise: give it vectors that have lost their own mean and been divided by their own "
    "unbiased standard deviation + 1e-5, and map what it returns back with the same two numbers"
)


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """One foreign autoencoder in our terms."""

    sae: MLSAE
    """The autoencoder, float32, on the CPU."""
    model: str | None = None
    """The transformer it was trained on, if the folder says."""
    layers: list[int] | None = None
    """The blocks whose outputs it was trained on, if the folder says."""
    ours: Mapping[str, Any] = field(default_factory=dict)
    """What is kept under `OURS`, if it was converted from one of our own."""
    notes: tuple[str, ...] = ()
    """What a user has to know that the weights do not say."""


class LaidOut(NamedTuple):
    """One of our autoencoders as another project's files."""

    tensors: dict[str, Tensor]
    """Tensors by their names in that layout."""
    config: dict[str, Any]
    """Its JSON configuration."""
    notes: tuple[str, ...] = ()
    """What the layout cannot express."""


class Layout(NamedTuple):
    """One foreign layout: a safetensors file with a JSON file beside it, and the two directions."""

    weights_file: str
    config_file: str
    parse: "Callable[[Reader, Mapping[str, Any]], Parsed]"
    """(weights, configuration) -> our autoencoder."""
    lay_out: Callable[[MLSAE, Mapping[str, Any], str | None], LaidOut]
    """(autoencoder, what is kept under `OURS`, hookpoint) -> files."""


class Reader(NamedTuple):
    """The tensors of a file, and its path for error messages."""

    tensors: Mapping[str, Tensor]
    where: str

    def get(self, name: str, *shape: int | None) -> Tensor:
        """Tensor `name`, whose shape must be `shape` (None: any size)."""
        if name not in self.tensors:
            raise IncompatibleError(f"{self.where}: {name} is missing; it holds {listed(sorted(self.tensors))}")
        tensor = self.tensors[name]
        wrong = [1 for size, wanted in zip(tensor.shape, shape, strict=False) if wanted not in (None, size)]
        if tensor.dim() != len(shape) or wrong:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise IncompatibleError(f"{self.where}: {name} should have shape [{expected}], it has {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise IncompatibleError(f"{self.where}: {name} should hold floats, found {str(tensor.dtype)[6:]}")
        return tensor

    def require_only(self, known: Collection[str]) -> None:
        """Refuse unknown tensors: each could change the reconstruction."""
        if unknown := sorted(set(self.tensors) - set(known)):
            why = "skip connections, gates and built-in lenses are not supported"
            if len(unknown) == len(self.tensors):
                why = "these are not an autoencoder's weights"
            raise IncompatibleError(f"{self.where}: contains {listed(unknown)}: {why}")


def assemble(config: SAEConfig, *, b_enc: Tensor | None = None, **tensors: Tensor) -> MLSAE:
    """The autoencoder with these tensors; an encoder bias that is zero everywhere is left out."""
    if b_enc is not None and bool((b_enc != 0).any()):
        config, tensors = replace(config, encoder_bias=True), {**tensors, "b_enc": b_enc}
    sae = MLSAE(config)
    sae.load_state_dict(tensors)
    return sae


def encoder_bias(sae: MLSAE) -> Tensor:
    """[M] the encoder bias, or zeros."""
    return sae.b_enc if sae.config.encoder_bias else torch.zeros(sae.config.n_latents)


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors: float32, on the CPU, each contiguous."""
    own = {"device": "cpu", "dtype": torch.float32, "memory_format": torch.contiguous_format, "copy": True}
    return {name: tensor.detach().to(**own) for name, tensor in tensors.items()}


def listed(names: Sequence[str]) -> str:
    """The first few names and the number of the others, for error messages."""
    return (", ".join(names[:8]) or "nothing") + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def checked_k(found: Any, n_latents: int, where: str) -> int:
    """k as a configuration gives it; `IncompatibleError` if it is impossible."""
    if type(found) is not int or not 1 <= found <= n_latents:
        wanted = f"a whole number from 1 to n_latents {n_latents}"
        raise IncompatibleError(f"{where}: k should be {wanted}, the configuration says {found!r}")
    return found


def check_sizes(config: Mapping[str, Any], where: str, **sizes: int) -> None:
    """Refuse a configuration whose sizes differ from those of the weights beside it."""
    for name, size in sizes.items():
        found = config.get(name)
        if found not in (None, 0, size):  # 0 or nothing: the weights decide
            raise IncompatibleError(f"{where}: the configuration says {name} {found!r}, the weights have {size}")


def flag(config: Mapping[str, Any], name: str, default: bool, where: str) -> bool:
    """A key that is true or false."""
    found = config.get(name, default)
    if not isinstance(found, bool):
        raise IncompatibleError(f"{where}: {name} should be true or false, the configuration says {found!r}")
    return found


def key_notes(config: Mapping[str, Any], known: Collection[str], taken: Mapping, where: str) -> tuple[str, ...]:
    """Notes on a configuration's keys: which are unknown here, and which are missing though the result depends on them.

    taken: keys that the result depends on, with the value assumed if one is missing; known: the other known keys.
    Raises `IncompatibleError` for a key that is one letter away from a known key that is missing: a damaged name.
    """
    unknown, notes = sorted({*config} - {*known, *taken}), ()
    for near in {*known, *taken} - {*config}:
        for key in unknown:
            if len(near) == len(key) and sum(map(ne, near, key)) == 1:
                what = f"the configuration has a key {key!r} and no {near!r}: a damaged name; correct it"
                raise IncompatibleError(f"{where}: {what}")
    if unknown:
        notes += (f"{where}: the configuration has {listed(unknown)}, which are unknown and were ignored",)
    if silent := [f"{key} (taken as {value})" for key, value in taken.items() if key not in config]:
        notes += (f"{where}: the configuration does not say {listed(silent)}",)
    return notes


def layer_numbers(found: Any) -> list[int] | None:
    """`found` as a list of layers; None if it is empty or no list."""
    return [int(layer) for layer in found] or None if isinstance(found, list) else None


def mapping(found: Any) -> dict[str, Any]:
    """`found` if it is a JSON object, else an empty one."""
    return found if isinstance(found, dict) else {}


def parse_mlsae(reader: Reader, config: Mapping[str, Any]) -> Parsed:
    """mlsae's `model.safetensors` and `config.json`; in a `-tfm` repository only the tensors below `autoencoder.`."""
    where = reader.where
    keys = ("auxk", "dead_steps_threshold", "dead_threshold", "k", "n_inputs", "n_latents")
    keys += ("model_name", "layers", "tuned_lens", OURS)
    notes = key_notes(config, keys, {"standardize": "true"}, where)
    reader.require_only(("encoder.weight", "decoder.weight", "pre_encoder_bias", "last_nonzero"))
    W_enc = reader.get("encoder.weight", None, None)
    m, d = W_enc.shape
    check_sizes(config, where, n_inputs=d, n_latents=m)
    lens = f"{where}: its vectors went through a tuned lens: use a store that was harvested with the same --lens"
    standardize = "vector" if flag(config, "standardize", True, where) else "none"
    our_config = SAEConfig(d_model=d, n_latents=m, k=checked_k(config.get("k"), m, where), standardize=standardize)
    W_dec, b_pre = reader.get("decoder.weight", d, m).T, reader.get("pre_encoder_bias", d)
    return Parsed(
        sae=assemble(our_config, W_enc=W_enc, W_dec=W_dec, b_pre=b_pre),
        model=config.get("model_name"),
        layers=layer_numbers(config.get("layers")),
        ours=mapping(config.get(OURS)),
        notes=(*notes, lens) if config.get("tuned_lens") else notes,
    )


def parse_sparsify(reader: Reader, config: Mapping[str, Any]) -> Parsed:
    """sparsify's `sae.safetensors` and `cfg.json` of one hookpoint."""
    where = reader.where
    keys = ("k", "d_in", "num_latents", "expansion_factor", "normalize_decoder", "multi_topk", "signed", OURS)
    notes = key_notes(config, keys, {"activation": "topk", "transcode": "false", "skip_connection": "false"}, where)
    for key, wanted, why in (
        ("activation", "topk", "only TopK is read here"),
        ("transcode", False, "a transcoder maps one place to another, and does not reconstruct"),
        ("skip_connection", False, "a skip connection has no place in our autoencoder"),
        ("signed", False, "only TopK with ReLU is read here"),
    ):
        if config.get(key, wanted) != wanted:
            raise IncompatibleError(f"{where}: {key} is {config[key]!r}: {why}")
    reader.require_only(("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    W_enc = reader.get("encoder.weight", None, None)
    m, d = W_enc.shape
    check_sizes(config, where, d_in=d, num_latents=m)
    ours = mapping(config.get(OURS))
    standardize = "vector" if ours.get("standardize") == "vector" else "none"
    our_config = SAEConfig(d_model=d, n_latents=m, k=checked_k(config.get("k"), m, where), standardize=standardize)
    W_dec, b_pre, b_enc = reader.get("W_dec", m, d), reader.get("b_dec", d), reader.get("encoder.bias", m)
    return Parsed(
        sae=assemble(our_config, W_enc=W_enc, W_dec=W_dec, b_pre=b_pre, b_enc=b_enc),
        layers=layer_numbers(re.findall(r"(?:layers|h)[._](\d+)$", where)),  # the folder is named after the hookpoint
        ours=ours,
        notes=notes,
    )


def lay_out_mlsae(sae: MLSAE, ours: Mapping[str, Any], hookpoint: str | None) -> LaidOut:
    """The layout of the paper's published models; exact, because it is the same model."""
    config = {
        "auxk": None,
        "dead_steps_threshold": DEAD_STEPS,
        "dead_threshold": 1e-3,
        "k": sae.config.k,
        "n_inputs": sae.config.d_model,
        "n_latents": sae.config.n_latents,
        "standardize": sae.config.standardize == "vector",
        OURS: ours,
    }
    tensors = {"encoder.weight": sae.W_enc, "decoder.weight": sae.W_dec.T, "pre_encoder_bias": sae.b_pre}
    return LaidOut(tensors, config)


def lay_out_sparsify(sae: MLSAE, ours: Mapping[str, Any], hookpoint: str | None) -> LaidOut:
    """sparsify 1.3; it cannot standardise, so a note says what its inputs must be."""
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
        OURS: ours,
    }
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": encoder_bias(sae), "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    return LaidOut(tensors, config, (STANDARDIZED_INPUTS,) if sae.config.standardize == "vector" else ())


def refusal(layout: str, config: SAEConfig) -> str | None:
    """The property of an autoencoder that a layout cannot express, or None."""
    if layout == "mlsae" and config.encoder_bias:
        return "an encoder bias"
    if layout != "saelens" and config.activation != "topk":
        return f"activation {config.activation!r}, only 'topk'"
    if config.standardize == "layer":
        return "standardisation 'layer', only 'vector' and 'none'"
    return None if layout == "saelens" or config.apply_b_dec_to_input else "an encoder whose input keeps b_pre"
