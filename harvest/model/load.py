"""Loads a causal language model: configuration, tokenizer and weights.

Not supported: code that comes with a model (`trust_remote_code`), encoder-decoder models, quantised weights.

Shapes: B sequences, N positions, D = d_model, V = vocabulary.
"""

import errno
import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import safetensors
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from harvest.model import sanity
from harvest.model.adapters import NOT_BY_TRANSFORMERS, with_adapter
from harvest.model.blocks import d_model_of, final_norm, find_blocks, longest_context, n_layers_of, name_of, reset_rope
from harvest.model.hub import passing_on, warn
from harvest.model.names import ModelSpec, model_files, resolve_model
from harvest.model.tokenizer import Tokenizer
from residscope.errors import IncompatibleError, ResidscopeError, UsageError, is_out_of_memory, said
from residscope.first_calls import settle_first_calls
from residscope.memory import keep_freed_memory
from residscope.reading import read_json

settle_first_calls(torch)  # before anything is computed, in every process with a model

T = TypeVar("T")
_DAMAGED = (safetensors.SafetensorError, json.JSONDecodeError, UnicodeDecodeError, pickle.UnpicklingError, EOFError)
_MAKING = Lock()
"""While transformers builds a model, it changes torch's default dtype and initialisers for all threads."""
_MOST_BLOCKS, _COUNTS = 10_000, ("layer", "layers", "experts")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode on its device, with the parts that interpretability needs."""

    spec: ModelSpec
    causal_lm: Any
    """The whole model, with the LM head: `causal_lm(input_ids).logits` is [B, N, V]."""
    base: Any
    """The model without its LM head; run this if logits are not needed."""
    tokenizer: Tokenizer
    blocks: nn.ModuleList
    """The transformer blocks, in order; block i's output is the residual stream after layer i."""
    d_model: int
    architecture: str
    """Class of the whole model, such as GPTNeoXForCausalLM."""
    device: torch.device
    dtype: torch.dtype
    """Number format of its weights and of its forward pass."""
    without_head: bool = False
    """Whether its files lack the LM head, so that the one here is random."""

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The tokenizer's ids for which the embedding has a row, ascending."""
        rows = self.causal_lm.config.get_text_config().vocab_size
        return np.array(sorted(i for i in self.tokenizer.ids if i < rows), np.int64)

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the unembedding."""
        return final_norm(f"{self.spec.name} ({self.architecture})", self.base, self.blocks)

    @property
    def unembedding(self) -> nn.Module:
        """The linear map from the normed residual stream to logits; its weight is [V, D]."""
        if self.without_head:
            reason = f"so it cannot predict tokens; give the model as saved by {self.architecture}"
            raise IncompatibleError(f"{self.spec.name}: its weights have no LM head, {reason}")
        found = self.causal_lm.get_output_embeddings()
        if not isinstance(found, nn.Module):
            what = "no unembedding found; this architecture cannot be measured"
            raise IncompatibleError(f"{self.spec.name} ({self.architecture}): {what}")
        return found

    def logits(self, residual: Tensor) -> Tensor:
        """Logits [..., V] of vectors [..., D] as if from the last block (logit lens), scaled and soft-capped."""
        config = self.causal_lm.config.get_text_config()
        logits = self.unembedding(self.final_norm(residual.to(self.dtype)))
        up, down = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
        logits = logits * up / down if isinstance(up, float | int) else logits  # MPT's is a string, which it ignores.
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


def load_config(spec: ModelSpec) -> Any:
    """The model's transformers configuration; `IncompatibleError` if it is not that of a causal language model."""
    load, spec = transformers.AutoConfig.from_pretrained, spec.base or spec
    if spec.source == "folder":
        found = None
        with suppress(OSError, IncompatibleError):  # The library's own error says more.
            found = read_json(Path(spec.location, "config.json"))
        _refuse_endless(spec.name, found if isinstance(found, dict) else {})
    config = _loading(spec, "configuration", lambda: load(spec.location, **spec.load_arguments))
    kind, way_out = type(config).__name__, "give a model that predicts the next token"
    if config.is_encoder_decoder:
        raise IncompatibleError(f"{spec.name}: {kind} is for an encoder-decoder model; {way_out}")
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not any(type(config) in models for models in known):
        what = f"no causal language model for {kind}, alone or in a model of images and text"
        raise IncompatibleError(f"{spec.name}: transformers has {what}; {way_out}")
    if config.model_type == "big_bird" and config.attention_type == "block_sparse":
        raise IncompatibleError(f"{spec.name}: its block_sparse attention sees later tokens; {way_out}")
    try:
        _ = n_layers_of(config), d_model_of(config), int(config.get_text_config().vocab_size)
    except (AttributeError, TypeError, ValueError) as error:
        what = "should have num_hidden_layers, hidden_size and vocab_size of one text model"
        raise IncompatibleError(f"{spec.name}: {kind} {what} ({said(error)}); {way_out}") from None
    return config


def _refuse_endless(name: str, config: dict[str, Any]) -> None:
    """`IncompatibleError` for more blocks or experts than any model has, which would fill the memory."""
    parts = [part for part in (config, *config.values()) if isinstance(part, dict)]  # text_config and others, too
    for key, value in (item for part in parts for item in part.items()):
        if key.endswith(_COUNTS) and isinstance(value, int) and value > _MOST_BLOCKS:
            wanted = f"{key} should be at most {_MOST_BLOCKS:,}, found {value:,}"
            raise IncompatibleError(f"{name}: its config.json is damaged ({wanted}): save or download it again")


def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    load, place = transformers.AutoTokenizer.from_pretrained, spec if spec.own_tokenizer else spec.base or spec
    return Tokenizer(_loading(spec, "tokenizer", lambda: load(place.location, **place.load_arguments)))


def load_model(
    spec: ModelSpec,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    spread: bool = False,
    tokenizer: Tokenizer | None = None,
) -> LoadedModel:
    """The model's weights in `dtype` on `device`, in evaluation mode, and its tokenizer unless one is given.

    spread: over all GPUs from `device` on, then memory and disk, by accelerate: each block runs on its own GPU, or on
    `device` if it is on none.

    Random weights are drawn in float32 and then rounded, so that they do not depend on `dtype`. Raises
    `IncompatibleError` if anything is missing, damaged or no longer matches the spec's hash, or the blocks are not
    found; `ResidscopeError` if it cannot be downloaded or does not fit in memory.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()  # Each layer allocates the same temporaries.
    config = load_config(spec)
    model: Any
    bytes_each = 4 if spec.random_init else dtype.itemsize if device.type == "cpu" and not spread else 0
    load = partial(_weights, spec.base or spec, config, dtype, bytes_each, spread)
    with _MAKING:
        model, missing, unused = _loading(spec, "model", load)
    if spec.adapter:
        model = _loading(spec, "adapter", lambda bare=model: with_adapter(spec.name, bare, spec.location, spec.place))
    place = (lambda: model) if spread else lambda: _own_memory(model.to(device))
    model = _loading(spec, "model", place).eval().requires_grad_(False)
    kind = type(model).__name__
    # Llama 4's base_model_prefix is wrong.
    prefix = model.base_model_prefix if hasattr(model, model.base_model_prefix) else "model"
    base = getattr(model, prefix, None)
    if not isinstance(base, nn.Module):
        way_out = "if it is a model of images and text, save its text model alone, and give that"
        raise IncompatibleError(f"{spec.name} ({kind}): no part of it is the model without its LM head; {way_out}")
    sanity.refuse_missing(spec.name, missing, f"{prefix}.")
    # A model of images and text may have the same number of blocks for images.
    text = base if config.get_text_config() is config else model.get_decoder()
    blocks = find_blocks(text, n_layers_of(config))
    for rotary in base.modules():
        if hasattr(rotary, "max_seq_len_cached"):
            rotary.register_forward_pre_hook(reset_rope)
    sanity.refuse_more_blocks(spec.name, unused, prefix, name_of(blocks, base), len(blocks))
    tried = base, blocks[0], model.get_input_embeddings(), d_model_of(config), longest_context(config)
    _loading(spec, "forward pass", lambda: sanity.refuse_unknown_stream(f"{spec.name} ({kind})", *tried))
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(spec)
    refuse_exchanged(spec)
    return LoadedModel(
        spec=spec,
        causal_lm=model,
        base=base,
        tokenizer=tokenizer,
        blocks=blocks,
        d_model=d_model_of(config),
        architecture=kind,
        device=device,
        dtype=dtype,
        without_head=bool(missing),
    )


def refuse_exchanged(spec: ModelSpec) -> None:
    """`IncompatibleError` if a local folder no longer has the hash of `spec`; called after something was loaded."""
    if spec.source != "folder":
        return
    found = None
    with suppress(UsageError):  # The folder is gone.
        found = resolve_model(spec.location, random_init=spec.random_init).fingerprint
    if found != spec.fingerprint:
        raise IncompatibleError(
            f"model {spec.name}: the files in {spec.location} were changed or replaced while they were in use: their "
            f"content hash was {spec.fingerprint}, found {found}; run the same command again"
        )


def _own_memory(model: nn.Module) -> nn.Module:
    """`model` with no tensor mapped from its files: libraries map these, so that writing to a file would change the
    weights of a running model. Memory that torch allocated itself, which it can resize, is not mapped."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()
    return model


def _weights(
    spec: ModelSpec, config: Any, dtype: torch.dtype, bytes_each: int, spread: bool
) -> tuple[nn.Module, Any, Any]:
    """The model, the names of weights that its files lack, and the names of weights in them that it does not use."""
    from huggingface_hub import try_to_load_from_cache

    # Fused kernels may omit the soft-capping of scores; otherwise transformers chooses.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    arguments: dict[str, Any] = {"attn_implementation": "eager"} if capped else {}
    auto: Any = transformers.AutoModelForCausalLM
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = transformers.AutoModelForImageTextToText
    if code := getattr(config, "auto_map", None):
        warn(spec.name, f"its own code ({', '.join(map(str, code.values()))}) is not run: transformers' class is used")
    files = model_files(Path(spec.location)) if spec.source != "hub" and not spec.random_init else []
    held = sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".bin"))
    sanity.refuse_too_large(spec.name, lambda: auto.from_config(config, **arguments), held, bytes_each)
    if not spec.random_init:
        folder = TemporaryDirectory(prefix="residscope-", ignore_cleanup_errors=True) if spread else None
        arguments |= {"device_map": "auto", "offload_folder": folder.name} if folder else {}
        arguments |= {"output_loading_info": True, "adapter_kwargs": dict(NOT_BY_TRANSFORMERS), **spec.load_arguments}
        arguments |= {"ignore_mismatched_sizes": True}  # Reported below; the library's error does not name the weights.
        model, found = auto.from_pretrained(spec.location, config=config, dtype=dtype, **arguments)
        for weight, there, wanted in sorted(found["mismatched_keys"]):
            sizes = f"{list(there)} in its files, {list(wanted)} by its config.json"
            what = f"{weight} has the wrong shape, {sizes}"
            raise IncompatibleError(f"{spec.name}: {what}: check that config.json belongs to the weights")
        model.offload_folder = folder  # accelerate's files are deleted when the model is
        if spec.source == "hub":  # The commit does not prove that the cached files are intact.
            file = try_to_load_from_cache(spec.location, "config.json", revision=spec.revision)
            sanity.refuse_damaged_cache(spec.name, model_files(Path(file).parent) if isinstance(file, str) else ())
        return model, sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return auto.from_config(config, dtype=torch.float32, **arguments).to(dtype), [], []


def _loading(spec: ModelSpec, what: str, load: Callable[[], T]) -> T:
    """`load()`, with whatever the libraries raise (nearly anything) turned into a one-line error."""
    try:
        with passing_on(spec.name):
            return load()
    except ResidscopeError:
        raise
    except torch.OutOfMemoryError as error:
        way_out = "try --dtype bfloat16, harvest's --device-map auto, or --device cpu"
        raise ResidscopeError(f"{spec.name}: out of memory: the model does not fit on the device; {way_out}") from error
    except Exception as error:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise
        # With a hub model, the cause may be the network rather than damaged files.
        kind = ResidscopeError if spec.source == "hub" and what != "forward pass" else IncompatibleError
        failed = "fails" if what == "forward pass" else "cannot be loaded"
        reason = f"{type(error).__name__}: {said(error)}"
        raise kind(f"{spec.name}: its {what} {failed} ({reason}){_way_out(spec, error)}") from error


def _way_out(spec: ModelSpec, error: BaseException | None) -> str:
    """What may help after a library's error, judged by it and its causes; "" if unknown."""
    first = error
    while error is not None:
        if isinstance(error, ImportError):
            return "; install what it asks for"
        if "trust_remote_code" in str(error):
            return "; code that comes with a model is not run here: give a model that transformers has built in"
        if isinstance(error, KeyError | ValueError) and "model type" in str(error):
            return f"; a newer transformers may know it, this is {transformers.__version__}"
        if isinstance(error, _DAMAGED) or type(error) is Exception:  # tokenizers raises plain Exceptions.
            files = model_files(Path(spec.location)) if spec.source != "hub" else []
            damaged = next(filter(_is_damaged, files), None)
            return f"; {damaged.name if damaged else 'a file'} is damaged or too new: save or download it again"
        error = error.__cause__ or error.__context__
    if isinstance(first, OSError):
        return "; check the network and the file" if spec.source == "hub" else "; save or download the model again"
    return ""


def _is_damaged(file: Path) -> bool:
    """Whether a file of weights or JSON cannot be read."""
    try:
        if file.suffix == ".json":
            read_json(file)
        elif file.suffix == ".safetensors":
            safetensors.safe_open(file, "pt").__enter__()
    except (*_DAMAGED, IncompatibleError):
        return True
    return False
