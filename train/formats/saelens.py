"""SAELens's layout, version 6: `sae_weights.safetensors` and `cfg.json`.

    pre = W_enc (s(x) - b_dec) + b_enc          x_hat = s^-1(W_dec h + b_dec)       s: "layer_norm" or nothing
    topk      h = ReLU(TopK_k(pre))
    jumprelu  h = ReLU(pre) where pre > threshold, else 0                            threshold [M]
    standard  h = ReLU(pre)

with b_dec subtracted from the input unless apply_b_dec_to_input is false. BatchTopK and Matryoshka autoencoders are a
JumpReLU in inference, with one threshold for all latents: SAELens saves them as such, and so do we, with the original
kind under our own key. Refused by name: gated and temporal autoencoders, transcoders, activations of another shape,
and normalisations whose numbers are not in the folder.

Tested in tests/train/formats/test_files.py.

Shapes: M n_latents, D d_model.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from residscope.errors import IncompatibleError
from train.formats import layouts
from train.formats.layouts import OURS, LaidOut, Parsed, Reader, mapping
from train.model import MLSAE
from train.model_config import Activation, SAEConfig, default_prefixes

LAYOUT_VERSION = "6.54.12"
"""The SAELens version whose layout is written; SAELens converts a folder that names a version before 6."""

_TAKEN = {"normalize_activations": "none", "apply_b_dec_to_input": "true"}
_KEYS = (
    *("architecture", "d_in", "d_sae", "k", "rescale_acts_by_decoder_norm", "dtype", "device", "metadata"),
    *("reshape_activations", "activation_fn", "activation_fn_str", "activation_fn_kwargs", "model_name", "hook_name"),
    *("hook_layer", "hook_head_index", "prepend_bos", "dataset_path", "context_size", "sae_lens_training_version"),
)
"""Keys of all versions: those that are read, and common ones that change nothing here."""

_ACTIVATIONS: dict[str, Activation] = {"topk": "topk", "jumprelu": "jumprelu", "standard": "relu"}
"""SAELens's architectures -> our activations."""

_ARCHITECTURES: dict[Activation, str] = {
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "relu": "standard",
}


def parse_saelens(reader: Reader, config: Mapping[str, Any]) -> Parsed:
    """An autoencoder of architecture topk, jumprelu or standard (and those of the versions before 6)."""
    where = reader.where
    options = mapping(config.get("activation_fn_kwargs"))
    activation = _activation(config, options, where)
    notes = layouts.key_notes(config, _KEYS, _TAKEN, where)
    metadata = mapping(config.get("metadata")) or config  # before version 6 everything was on one level
    for part, keys in ((metadata, ("model_name", "hook_name", OURS)), (options, ("k", "signed"))):
        layouts.key_notes(part, keys, {}, where)
    ours = mapping(metadata.get(OURS))
    reader.require_only(("W_enc", "W_dec", "b_enc", "b_dec", *(("threshold",) if activation == "jumprelu" else ())))
    W_enc = reader.get("W_enc", None, None).float().T
    m, d = W_enc.shape
    layouts.check_sizes(config, where, d_in=d, d_sae=m)
    W_dec = reader.get("W_dec", m, d).float()
    b_enc, b_dec = reader.get("b_enc", m).float(), reader.get("b_dec", d).float()
    if activation == "topk":
        k = layouts.checked_k(config.get("k", options.get("k")), m, where)
        if layouts.flag(config, "rescale_acts_by_decoder_norm", False, where):
            # SAELens then ranks and keeps activations as if every decoder row had unit norm, so make it so.
            norm = W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8)  # [M, 1]
            W_enc, W_dec, b_enc = W_enc * norm, W_dec / norm, b_enc * norm.squeeze(1)
    else:
        k = ours["k"] if isinstance(ours.get("k"), int) and 1 <= ours["k"] <= m else 0
    extra: dict[str, Tensor] = {}
    prefixes: tuple[int, ...] = ()
    if activation == "jumprelu":
        threshold = reader.get("threshold", m).float().clamp(min=0)  # below 0 the ReLU cuts anyway
        if ours.get("activation") in ("batchtopk", "matryoshka") and k > 0 and bool((threshold == threshold[0]).all()):
            activation = ours["activation"]
            extra = {"threshold": threshold[0]}
            if activation == "matryoshka":
                prefixes = tuple(ours.get("prefixes") or default_prefixes(m))
        else:
            extra = {"log_threshold": threshold.double().log().float()}
    hook = str(metadata.get("hook_name") or "")
    our_config = SAEConfig(
        d_model=d,
        n_latents=m,
        k=k,
        standardize=_standardize(config.get("normalize_activations"), where),
        activation=activation,
        apply_b_dec_to_input=layouts.flag(config, "apply_b_dec_to_input", True, where),
        prefixes=prefixes,
    )
    return Parsed(
        sae=layouts.assemble(our_config, W_enc=W_enc, W_dec=W_dec, b_pre=b_dec, b_enc=b_enc, **extra),
        model=metadata.get("model_name"),
        layers=layouts.layer_numbers(re.findall(r"^blocks\.(\d+)\.hook_resid_post$", hook)),
        ours=ours,
        notes=notes,
    )


def _activation(config: Mapping[str, Any], options: Mapping[str, Any], where: str) -> Activation:
    function = config.get("activation_fn", config.get("activation_fn_str"))
    architecture = "topk" if function == "topk" else config.get("architecture")
    for name, found, known in (
        ("architecture", architecture, tuple(_ACTIVATIONS)),
        ("activation_fn", function, (None, "relu", "topk")),
        ("signed", options.get("signed") or False, (False,)),  # TopK by absolute value
        ("reshape_activations", config.get("reshape_activations"), (None, "none")),
    ):
        if found not in known:
            shown = " or ".join(repr(value) for value in known if value is not None)
            raise IncompatibleError(f"{where}: {name} is {found!r}; only {shown} can be read")
    return _ACTIVATIONS[str(architecture)]


def _standardize(found: Any, where: str) -> Literal["vector", "none"]:
    if found in ("layer_norm", None, False, "none"):
        return "vector" if found == "layer_norm" else "none"
    name = "expected_average_only_in" if found is True else found
    raise IncompatibleError(
        f"{where}: normalize_activations is {name!r}, whose numbers are not in the folder; 'none' and 'layer_norm' are "
        "read here: fold the scale into the weights with SAELens and save again"
    )


def lay_out_saelens(sae: MLSAE, ours: Mapping[str, Any], hookpoint: str | None) -> LaidOut:
    """SAELens version 6; its "layer_norm" is our standardisation of each vector."""
    architecture = _ARCHITECTURES[sae.config.activation]
    config = {
        "architecture": architecture,
        "d_in": sae.config.d_model,
        "d_sae": sae.config.n_latents,
        **({"k": sae.config.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.config.apply_b_dec_to_input,
        "normalize_activations": "layer_norm" if sae.config.standardize == "vector" else "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": LAYOUT_VERSION,
            "sae_lens_training_version": None,
            "model_name": ours["store"].get("model"),
            "hook_name": hookpoint,
            OURS: ours,
        },
    }
    tensors = {"W_enc": sae.W_enc.T, "b_enc": layouts.encoder_bias(sae), "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    if architecture == "jumprelu":
        weights = sae.weights
        if weights.log_threshold is not None:
            tensors["threshold"] = weights.log_threshold.exp()
        else:
            assert weights.threshold is not None
            tensors["threshold"] = weights.threshold.expand(sae.config.n_latents)
    return LaidOut(tensors, config)
