"""How other projects lay out one sparse autoencoder: tensor names, configuration keys, and what they mean.

Three layouts are known, each a folder of one safetensors file and one JSON file: mlsae (the paper's own models),
SAELens (`train.formats.saelens`) and sparsify. `parse_*` turns what such a folder holds into our weights; `lay_out_*`
does the reverse. Both keep reconstructions: what a layout can say differently (a decoder norm folded out of the
encoder) is worked into the weights, and what would change the result is refused by name. Nothing here touches a disk or
a network; `train.formats.files` does.

    mlsae     h = TopK(W_enc (s(x) - b))              x_hat = s^-1(W_dec h + b)     s: standardise each vector
    sparsify  h = TopK(W_enc (x - b_dec) + b_enc)     x_hat = W_dec h + b_dec

Shapes: M n_latents, D d_model; ours are W_enc [M, D], W_dec [M, D], b_pre [D], b_enc [M].
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from residscope.errors import IncompatibleError
from train.formats.parts import (
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
from train.formats.saelens import lay_out_saelens, parse_saelens, refusal_saelens
from train.model import MLSAE
from train.model_config import SAEConfig

ForeignFormat = Literal["mlsae", "saelens", "sparsify"]

DEAD_STEPS = 76
"""mlsae's `dead_steps_threshold`, which only its training reads: 10 million tokens in batches of 131,072."""

STANDARDIZED_INPUTS = (
    "sparsify does not standardise: give it vectors that have lost their own mean and been divided by their own "
    "unbiased standard deviation + 1e-5, and map what it returns back with the same two numbers"
)


def parse_mlsae(file: TensorFile, config: Mapping[str, Any], where: str) -> Parsed:
    """mlsae's `model.safetensors` and `config.json`; of a `-tfm` repository, only what is below `autoencoder.`."""
    with_transformer = any(name.startswith("autoencoder.") for name in file.keys())  # noqa: SIM118
    reader = Reader(file, where, "autoencoder." if with_transformer else "")
    reader.require_only(("encoder.weight", "decoder.weight", "pre_encoder_bias", "last_nonzero"))
    W_enc = reader.get("encoder.weight", None, None)
    m, d = W_enc.shape
    check_sizes(config, where, n_inputs=d, n_latents=m)
    notes: tuple[str, ...] = ()
    if config.get("tuned_lens"):
        notes = (
            f"{where}: its vectors went through a tuned lens: use a store that was harvested with the same --lens",
        )
    return Parsed(
        sae=assemble(
            SAEConfig(
                d_model=d,
                n_latents=m,
                k=checked_k(config.get("k"), m, where),
                standardize="vector" if config.get("standardize", True) else "none",
            ),
            W_enc=W_enc,
            W_dec=reader.get("decoder.weight", d, m).T,
            b_pre=reader.get("pre_encoder_bias", d),
        ),
        stored_dtype=dtype_name(W_enc),
        model=config.get("model_name"),
        layers=layer_numbers(config.get("layers")),
        store=our_store(config.get(OURS)),
        notes=notes,
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
    reader = Reader(file, where)
    reader.require_only(("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    W_enc = reader.get("encoder.weight", None, None)
    m, d = W_enc.shape
    check_sizes(config, where, d_in=d, num_latents=m)
    ours = mapping(config.get(OURS))
    return Parsed(
        sae=assemble(
            SAEConfig(
                d_model=d,
                n_latents=m,
                k=checked_k(config.get("k"), m, where),
                standardize="vector" if ours.get("standardize") == "vector" else "none",
            ),
            W_enc=W_enc,
            W_dec=reader.get("W_dec", m, d),
            b_pre=reader.get("b_dec", d),
            b_enc=reader.get("encoder.bias", m),
        ),
        stored_dtype=dtype_name(W_enc),
        layers=layer_numbers(re.findall(r"(?:layers|h)[._](\d+)$", where)),  # the folder is named after the hookpoint
        store=our_store(ours),
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
        OURS: our_record(sae, store),
    }
    tensors = {"encoder.weight": sae.W_enc, "decoder.weight": sae.W_dec.T, "pre_encoder_bias": sae.b_pre}
    return LaidOut(contiguous(tensors), config, lens_note(store))


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
        OURS: our_record(sae, store),
    }
    tensors = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": encoder_bias(sae),
        "W_dec": sae.W_dec,
        "b_dec": sae.b_pre,
    }
    notes = (STANDARDIZED_INPUTS,) if sae.config.standardize == "vector" else ()
    return LaidOut(contiguous(tensors), config, notes + lens_note(store))


def refusal_mlsae(config: SAEConfig) -> str | None:
    """Why this layout cannot say it, or None."""
    return "an encoder bias" if config.encoder_bias else refusal_sparsify(config)


def refusal_sparsify(config: SAEConfig) -> str | None:
    """Why this layout cannot say it, or None."""
    if config.activation != "topk":
        return f"activation {config.activation!r}, only 'topk'"
    if config.standardize == "layer":
        return "standardisation 'layer', only 'vector' and 'none'"
    return None if config.apply_b_dec_to_input else "an encoder whose input keeps b_pre"


class Layout(NamedTuple):
    """One foreign layout: its two files and its two directions."""

    weights_file: str
    """Name of the safetensors file."""

    config_file: str
    """Name of the JSON file beside it."""

    parse: Callable[[TensorFile, Mapping[str, Any], str], Parsed]
    """(open weights, configuration, where for errors) -> our autoencoder."""

    lay_out: Callable[[MLSAE, Mapping[str, Any], str | None], LaidOut]
    """(autoencoder, the store's record, hookpoint) -> files."""

    refusal: Callable[[SAEConfig], str | None]
    """What of an autoencoder the layout cannot say, or None."""


LAYOUTS: dict[ForeignFormat, Layout] = {
    "mlsae": Layout("model.safetensors", "config.json", parse_mlsae, lay_out_mlsae, refusal_mlsae),
    "saelens": Layout("sae_weights.safetensors", "cfg.json", parse_saelens, lay_out_saelens, refusal_saelens),
    "sparsify": Layout("sae.safetensors", "cfg.json", parse_sparsify, lay_out_sparsify, refusal_sparsify),
}
