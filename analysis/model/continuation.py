"""Run a model from a given output of one of its blocks.

How: a forward hook replaces block l's output by the given one while the whole model runs, which works for every
architecture whose blocks are found. The blocks up to l are then computed for nothing, so they are skipped if possible:
their `forward` returns at once. That is not possible if later blocks need more from earlier ones than the residual
stream (shared keys and values); `can_skip` finds out by trying. The model is always left unchanged.

Shapes: B sequences, N positions, D d_model. Tested in test_downstream.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harvest.model.load import LoadedModel
from harvest.residual import ResidualRecorder

_TRIED_TOKENS = 32


class Before(NamedTuple):
    """Where a run begins."""

    layer: int
    """The block whose output is given."""
    output: Any
    """Its output in the block's own form: [B, N, D], or a tuple that begins with it."""


@torch.inference_mode()
def last_output(model: LoadedModel, input_ids: Tensor, before: Before | None = None, *, skip: bool = False) -> Tensor:
    """The last block's output [B, N, D] for token ids int64 [B, N], run from the start or from `before`."""
    recorder = ResidualRecorder(model, [model.n_layers - 1])
    with _given(model, before, skip):
        return recorder.record(input_ids)[0]


@torch.inference_mode()
def block_output(model: LoadedModel, input_ids: Tensor, layer: int, before: Before | None = None) -> Before:
    """The output of block `layer` in its own form; if `before` is given, run from there, skipping earlier blocks."""
    found: list[Any] = []
    hook = model.blocks[layer].register_forward_hook(lambda module, arguments, output: found.append(output))
    with hook, _given(model, before, skip=True):
        ResidualRecorder(model, [layer]).stream(input_ids, lambda i, residual: None)
    return Before(layer, found[0])


def can_skip(model: LoadedModel, input_ids: Tensor) -> bool:
    """Whether skipping the blocks up to the middle one changes nothing, tried on the first of the ids int64 [B, N]."""
    few = input_ids[:1, :_TRIED_TOKENS]
    before = block_output(model, few, (model.n_layers - 1) // 2)
    try:
        return torch.equal(last_output(model, few, before, skip=True), last_output(model, few))
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError):
        return False  # a later block needs something that a skipped one should have computed


@contextmanager
def changed(model: LoadedModel, layers: Sequence[int], change: Callable[[Any, int], Any]) -> Iterator[None]:
    """Within the block, the output of each of the blocks `layers` is replaced by `change(output, layer)`."""
    hooks = {layer: lambda module, arguments, output, n=layer: change(output, n) for layer in layers}
    with ExitStack() as stack:
        for layer, hook in hooks.items():
            stack.enter_context(model.blocks[layer].register_forward_hook(hook))
        yield


@contextmanager
def _given(model: LoadedModel, before: Before | None, skip: bool) -> Iterator[None]:
    if before is None:
        yield
        return
    output = before.output
    skipped = list(model.blocks[: before.layer + 1]) if skip else []
    own = [vars(block).get("forward") for block in skipped]
    handle = model.blocks[before.layer].register_forward_hook(lambda module, arguments, _: output)
    try:
        for block in skipped:
            block.forward = lambda *arguments, **options: output
        yield
    finally:
        handle.remove()
        for block, forward in zip(skipped, own, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward
