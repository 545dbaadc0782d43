"""A causal language model in memory: configuration, tokenizer and weights, with what is read from it.

Not here: code that comes with a model (`trust_remote_code`), encoder-decoder models, quantised weights.

Shapes: B sequences, N positions, D = d_model, V = vocabulary.
"""

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn

from harvest.model.blocks import d_model_of, final_norm, find_blocks, longest_context, n_layers_of, name_of
from harvest.model.hub import first_line
from harvest.model.names import ModelSpec, resolve_model, small_files, weight_files
from harvest.model.sanity import refuse_damaged_cache, refuse_missing, refuse_more_blocks, refuse_not_causal
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from residscope.first_calls import settle_first_calls
from residscope.memory import keep_freed_memory

settle_first_calls(torch)  # before anything is computed, wherever a model is

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode on its device, with what interpretability needs to find in it."""

    spec: ModelSpec
    causal_lm: Any
    """The whole model, with the LM head: `causal_lm(input_ids).logits` is [B, N, V]."""
    base: Any
    """The model without its LM head; run this where logits are not needed."""
    tokenizer: Any
    blocks: nn.ModuleList
    """The transformer blocks, in order; block i's output is the residual stream after layer i."""
    d_model: int
    architecture: str
    """Class of the whole model, such as GPTNeoXForCausalLM."""
    device: torch.device
    dtype: torch.dtype
    """Format of its weights and of its forward pass."""
    without_head: bool = False
    """Whether its file has no LM head, so that the one here is random."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the unembedding."""
        return final_norm(f"{self.spec.name} ({self.architecture})", self.base, self.blocks)

    @property
    def unembedding(self) -> nn.Module:
        """The linear map from the normed residual stream to logits; its weight is [V, D]."""
        if self.without_head:
            raise IncompatibleError(
                f"{self.spec.name}: its weights have no LM head, so it cannot predict tokens; give the model as saved"
                f" by {self.architecture}"
            )
        found = self.causal_lm.get_output_embeddings()
        if not isinstance(found, nn.Module):
            raise IncompatibleError(f"{self.spec.name} ({self.architecture}): no unembedding found")
        return found

    def logits(self, residual: Tensor) -> Tensor:
        """Logits [..., V] of residual stream vectors [..., D] as if they were the last block's output (the logit
        lens), scaled and soft-capped as the model does."""
        config = self.causal_lm.config.get_text_config()
        logits = self.unembedding(self.final_norm(residual.to(self.dtype)))
        logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


def load_config(spec: ModelSpec) -> Any:
    """The model's transformers configuration."""
    load = transformers.AutoConfig.from_pretrained
    return _loading(spec, "configuration", lambda: load(spec.location, **spec.load_arguments))


def load_tokenizer(spec: ModelSpec) -> Any:
    """The model's tokenizer."""
    load = transformers.AutoTokenizer.from_pretrained
    return _loading(spec, "tokenizer", lambda: load(spec.location, **spec.load_arguments))


def load_model(
    spec: ModelSpec, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", tokenizer: Any = None
) -> LoadedModel:
    """The model's weights in `dtype` on `device`, in evaluation mode, and its tokenizer unless one is given.

    Random weights are drawn in float32 and then rounded, so that they do not depend on `dtype`. Raises
    `IncompatibleError` where anything is missing, damaged or no longer what the spec's hash says, or the blocks are not
    found, `ResidscopeError` where it cannot be downloaded or does not fit the memory.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()  # Layer after layer makes the same temporaries.
    config = load_config(spec)
    model: Any
    model, missing, unused = _loading(spec, "model", lambda: _weights(spec, config, dtype))
    model = _loading(spec, "model", lambda: _own_memory(model.to(device))).eval().requires_grad_(False)
    architecture = type(model).__name__
    # Llama 4 misnames its own.
    prefix = model.base_model_prefix if hasattr(model, model.base_model_prefix) else "model"
    base = getattr(model, prefix, None)
    if not isinstance(base, nn.Module):
        raise IncompatibleError(
            f"{spec.name} ({architecture}): cannot find the base model (the model without its LM head)"
        )
    refuse_missing(spec.name, missing, prefix)
    blocks = find_blocks(base, n_layers_of(config))
    refuse_more_blocks(spec.name, unused, prefix, name_of(blocks, base), len(blocks))
    _loading(spec, "forward pass", lambda: refuse_not_causal(spec.name, architecture, base, longest_context(config)))
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(spec)
    refuse_exchanged(spec)
    return LoadedModel(
        spec=spec,
        causal_lm=model,
        base=base,
        tokenizer=tokenizer,
        blocks=blocks,
        d_model=d_model_of(config),
        architecture=architecture,
        device=device,
        dtype=dtype,
        without_head=bool(missing),
    )


def refuse_exchanged(spec: ModelSpec) -> None:
    """`IncompatibleError` where a local folder no longer holds what `spec` says: called after something of it was
    loaded, so that what was loaded has the spec's hash."""
    if spec.source != "folder":
        return
    found = None
    with suppress(UsageError):  # The folder is gone.
        found = resolve_model(spec.location, random_init=spec.random_init).fingerprint
    if found != spec.fingerprint:
        raise IncompatibleError(
            f"model {spec.name}: the files in {spec.location} were changed or exchanged while they were used: their "
            f"content hash was {spec.fingerprint}, found {found}; run the same command again"
        )


def _own_memory(model: nn.Module) -> nn.Module:
    """`model`, which no longer looks into its files: libraries map these, so that whoever writes to one would change
    the weights of a model that runs."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _weights(spec: ModelSpec, config: Any, dtype: torch.dtype) -> tuple[nn.Module, list[str], list[str]]:
    """The model, and the names of weights that its files lack, and of those that they have and it does not use."""
    # Fused kernels may leave out the soft-capping of scores; otherwise transformers chooses.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    arguments: dict[str, Any] = {"attn_implementation": "eager"} if capped else {}
    auto = transformers.AutoModelForCausalLM
    if not spec.random_init:
        loaded: Any = auto.from_pretrained(
            spec.location, config=config, dtype=dtype, output_loading_info=True, **arguments, **spec.load_arguments
        )
        model, found = loaded
        if spec.source == "hub":
            _check_cache(spec)
        return model, sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return auto.from_config(config, dtype=torch.float32, **arguments).to(dtype), [], []


def _check_cache(spec: ModelSpec) -> None:
    """Refuse files of the hub's cache that were damaged there: a commit says nothing of what is on this disk."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(spec.location, "config.json", revision=spec.revision)
    if isinstance(config, str):
        snapshot = Path(config).parent
        refuse_damaged_cache(spec.name, [*small_files(snapshot), *weight_files(snapshot)])


def _loading(spec: ModelSpec, what: str, load: Callable[[], T]) -> T:
    """`load()`, with whatever the libraries raise turned into one line. They raise nearly everything, so that nothing
    narrower than Exception will do."""
    try:
        return load()
    except ResidscopeError:
        raise
    except torch.OutOfMemoryError as error:
        raise ResidscopeError(
            f"{spec.name}: out of memory: the model does not fit on the device; try --dtype bfloat16 or --device cpu"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        failed, way_out = "cannot be loaded", "; save or download the model again, or give another"
        if what == "forward pass":
            failed, way_out = "fails", ""
        # The network may have failed, rather than the files be damaged.
        kind = ResidscopeError if spec.source == "hub" and what != "forward pass" else IncompatibleError
        raise kind(
            f"{spec.name}: its {what} {failed} ({type(error).__name__}: {first_line(error)}){way_out}"
        ) from error
