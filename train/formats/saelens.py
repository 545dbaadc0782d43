"""SAELens's layout, version 6: `sae_weights.safetensors` and `cfg.json`.

    pre = W_enc (s(x) - b_dec) + b_enc          x_hat = s^-1(W_dec h + b_dec)       s: "layer_norm" or nothing
    topk      h = ReLU(TopK_k(pre))
    jumprelu  h = ReLU(pre) where pre > threshold, else 0                            threshold [M]
    standard  h = ReLU(pre)

with b_dec subtracted from the input unless apply_b_dec_to_input is false. BatchTopK and Matryoshka autoencoders are a
JumpReLU in inference, with one threshold for all latents: so SAELens saves them, and so do we; what they were is kept
for us under our own key. Refused by name: gated and temporal autoencoders, transcoders, activations of another shape,
and normalisations whose numbers are not in the folder.

Tested in tests/train/formats/test_files.py.

Shapes: M n_latents, D d_model.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from residscope.errors import IncompatibleError
from train.formats.layouts import (
    OURS,
    LaidOut,
    Parsed,
    Reader,
    TensorFile,
    assemble,
    check_sizes,
    checked_k,
    contiguous,
    dtype_name,
    encoder_bias,
    layer_numbers,
    lens_note,
    mapping,
    our_record,
    our_store,
)
from train.model import MLSAE
from train.model_config import Activation, SAEConfig, default_prefixes

LAYOUT_VERSION = "6.54.12"
"""The SAELens whose layout is written; SAELens converts a folder that names a version before 6."""

_ACTIVATIONS: dict[str, Activation] = {"topk": "topk", "jumprelu": "jumprelu", "standard": "relu"}
"""SAELens's architectures and what they are here."""

_ARCHITECTURES: dict[Activation, str] = {
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "relu": "standard",
}


def parse_saelens(file: TensorFile, config: Mapping[str, Any], where: str) -> Parsed:
    """An autoencoder of architecture topk, jumprelu or standard (and those of the versions before 6)."""
    options = mapping(config.get("activation_fn_kwargs"))
    activation = _activation(config, options, where)
    metadata = mapping(config.get("metadata")) or config  # before version 6 it was all one level
    ours = mapping(metadata.get(OURS))
    reader = Reader(file, where)
    reader.require_only(("W_enc", "W_dec", "b_enc", "b_dec", *(("threshold",) if activation == "jumprelu" else ())))
    stored = reader.get("W_enc", None, None)
    d, m = stored.shape
    check_sizes(config, where, d_in=d, d_sae=m)
    W_enc, W_dec = stored.float().T, reader.get("W_dec", m, d).float()
    b_enc, b_dec = reader.get("b_enc", m).float(), reader.get("b_dec", d).float()
    if activation == "topk":
        k = checked_k(config.get("k", options.get("k")), m, where)
        if config.get("rescale_acts_by_decoder_norm"):
            # It ranks and keeps activations as if every decoder row had unit norm; so give it unit rows.
            norm = W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8)  # [M, 1]
            W_enc, W_dec, b_enc = W_enc * norm, W_dec / norm, b_enc * norm.squeeze(1)
    else:
        k = ours["k"] if isinstance(ours.get("k"), int) and 1 <= ours["k"] <= m else 0
    extra: dict[str, Tensor] = {}
    prefixes: tuple[int, ...] = ()
    if activation == "jumprelu":
        threshold = reader.get("threshold", m).float().clamp(min=0)  # below 0 it is as 0, where the ReLU cuts
        if ours.get("activation") in ("batchtopk", "matryoshka") and k > 0 and bool((threshold == threshold[0]).all()):
            activation = ours["activation"]
            extra = {"threshold": threshold[0]}
            if activation == "matryoshka":
                prefixes = tuple(ours.get("prefixes") or default_prefixes(m))
        else:
            extra = {"log_threshold": threshold.double().log().float()}
    hook = str(metadata.get("hook_name") or "")
    return Parsed(
        sae=assemble(
            SAEConfig(
                d_model=d,
                n_latents=m,
                k=k,
                standardize=_standardize(config.get("normalize_activations"), where),
                activation=activation,
                apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
                prefixes=prefixes,
            ),
            W_enc=W_enc,
            W_dec=W_dec,
            b_pre=b_dec,
            b_enc=b_enc,
            **extra,
        ),
        stored_dtype=dtype_name(stored),
        model=metadata.get("model_name"),
        layers=layer_numbers(re.findall(r"^blocks\.(\d+)\.hook_resid_post$", hook)),
        store=our_store(ours),
    )


def _activation(config: Mapping[str, Any], options: Mapping[str, Any], where: str) -> Activation:
    function = config.get("activation_fn", config.get("activation_fn_str"))
    architecture = "topk" if function == "topk" else config.get("architecture")
    if architecture not in _ACTIVATIONS:
        raise IncompatibleError(
            f"{where}: a SAELens autoencoder of architecture {architecture!r}; only "
            f"{', '.join(map(repr, _ACTIVATIONS))} are read here"
        )
    if function not in (None, "relu", "topk"):
        raise IncompatibleError(f"{where}: its activation function is {function!r}; only relu and topk are read here")
    if options.get("signed"):
        raise IncompatibleError(f"{where}: a TopK by absolute value (signed); only TopK with ReLU is read here")
    if config.get("reshape_activations") not in (None, "none"):
        raise IncompatibleError(
            f"{where}: reshape_activations is {config['reshape_activations']!r}; only 'none' is read"
        )
    return _ACTIVATIONS[architecture]


def _standardize(found: Any, where: str) -> Literal["vector", "none"]:
    if found == "layer_norm":
        return "vector"
    if found in (None, False, "none"):
        return "none"
    name = "expected_average_only_in" if found is True else found
    raise IncompatibleError(
        f"{where}: normalize_activations is {name!r}, whose numbers are not in the folder; 'none' and 'layer_norm' are "
        "read here: fold the scale into the weights with SAELens and save again"
    )


def lay_out_saelens(sae: MLSAE, store: Mapping[str, Any], hookpoint: str | None) -> LaidOut:
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
            "model_name": store.get("model"),
            "hook_name": hookpoint,
            OURS: our_record(sae, store),
        },
    }
    tensors = {"W_enc": sae.W_enc.T, "b_enc": encoder_bias(sae), "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    if architecture == "jumprelu":
        weights = sae.weights
        if weights.log_threshold is not None:
            tensors["threshold"] = weights.log_threshold.exp()
        else:
            assert weights.threshold is not None
            tensors["threshold"] = weights.threshold.expand(sae.config.n_latents)
    return LaidOut(contiguous(tensors), config, lens_note(store))


def refusal_saelens(config: SAEConfig) -> str | None:
    """Why this layout cannot say it, or None."""
    if config.standardize == "layer":
        return "standardisation 'layer', only 'vector' and 'none'"
    return None
