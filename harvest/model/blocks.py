"""The parts of a transformers model: sizes from its configuration, its blocks and its final norm.

The blocks are found by a rule, not by a list of architectures: the unique shallowest ModuleList whose length is the
configuration's number of layers.
"""

from typing import Any

from torch import nn

from residscope.errors import IncompatibleError

_FINAL_NORM_NAMES = (
    *("norm", "final_layer_norm", "ln_f", "final_layernorm", "norm_f", "final_norm"),
    *("layer_norm", "layernorm", "embedding_norm", "ln_out", "out_norm"),
)
_LONGEST_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")


def find_blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The transformer blocks of a model: its unique shallowest ModuleList of length `n_layers` that has weights.
    `IncompatibleError` if there is none, or more than one."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # Some models also have a list of rotary embeddings, one for each block, without weights.
    fitting = [name for name, modules in lists.items() if len(modules) == n_layers and [*modules.parameters()]]
    depth = min((name.count(".") for name in fitting), default=0)
    shallowest = [name for name in fitting if name.count(".") == depth]
    if len(shallowest) == 1:
        return lists[shallowest[0]]
    if shallowest:
        reason = f"{', '.join(shallowest)} all have {n_layers} modules; this architecture is not supported"
        raise IncompatibleError(f"{type(model).__name__}: the transformer blocks cannot be identified: {reason}")
    seen = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
    what = f"as its configuration says, with weights; found {seen}; this architecture is not supported"
    raise IncompatibleError(f"{type(model).__name__}: no list of {n_layers} transformer blocks, {what}")


def name_of(module: nn.Module, model: nn.Module) -> str:
    """Name of a module within a model; `StopIteration` if it is not in the model."""
    return next(name for name, found in model.named_modules() if found is module)


def final_norm(model: str, base: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """The norm before the unembedding; `IncompatibleError`, which begins with `model`, if its name is unknown."""
    parent = base.get_submodule(name_of(blocks, base).rpartition(".")[0])
    for name in _FINAL_NORM_NAMES:
        found = getattr(parent, name, None)
        if isinstance(found, nn.Module):
            return found
    raise IncompatibleError(
        f"{model}: the norm after the last block should be called {' or '.join(_FINAL_NORM_NAMES)}, found"
        f" {', '.join(name for name, _ in parent.named_children())}; this architecture cannot be measured"
    )


def n_layers_of(config: Any) -> int:
    """Number of transformer blocks according to the (text) configuration."""
    return int(config.get_text_config().num_hidden_layers)


def d_model_of(config: Any) -> int:
    """Size of the residual stream according to the (text) configuration."""
    return int(config.get_text_config().hidden_size)


def longest_context(config: Any) -> int | None:
    """Maximum number of positions that the model takes, or None without a limit."""
    found = next((n for name in _LONGEST_NAMES if (n := getattr(config.get_text_config(), name, None))), 0)
    return int(found) if found > 0 else None  # XLNet uses -1 for no limit.


def reset_rope(rotary: Any, _: Any = None) -> None:
    """Reset a rotary embedding whose frequencies change with the longest sequence that it has seen (dynamic NTK), so
    that vectors depend on their own sequence alone; called before each of its forward passes."""
    for name in list(vars(rotary)):
        if name.endswith("max_seq_len_cached"):
            setattr(rotary, name, rotary.original_max_seq_len)
    for name, buffer in list(rotary.named_buffers(recurse=False)):
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            start = getattr(rotary, f"{name.removesuffix('inv_freq')}original_inv_freq", buffer)
            setattr(rotary, name, start.to(buffer.device, copy=True))
