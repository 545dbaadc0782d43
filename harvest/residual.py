"""Records the residual stream after chosen transformer blocks, with forward hooks.

How: the model runs without its LM head and without a cache; a hook on each chosen block sees its output and changes
nothing. Outputs are taken before the final norm; for the last block `output_hidden_states` does not provide this.
The forward pass ends after the last chosen block.

Shapes: B sequences, N positions, D = d_model, L chosen layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harvest.model.load import LoadedModel
from residscope.errors import IncompatibleError, ResidscopeError, UsageError


class EndOfPass(BaseException):
    """Raised in a hook to end a forward pass early; not an Exception, so that model code does not catch it."""


class ResidualRecorder:
    """Runs a model and provides the residual stream after each chosen block."""

    def __init__(self, model: LoadedModel, layers: Sequence[int] | None = None) -> None:
        """layers: block indices, ascending; default all."""
        self.layers = tuple(range(model.n_layers)) if layers is None else tuple(layers)
        ascending = list(self.layers) == sorted(set(self.layers))
        if not (self.layers and ascending and 0 <= self.layers[0] <= self.layers[-1] < model.n_layers):
            wanted = f"ascend within 0..{model.n_layers - 1} without repeats"
            raise UsageError(f"layers should {wanted}, found {list(self.layers)}")
        self._model = model

    def record(self, input_ids: Tensor) -> list[Tensor]:
        """The residual streams, L tensors [B, N, D] in the compute dtype on the model's device, of ids int64 [B, N]."""
        found: list[Tensor] = []
        self.stream(input_ids, lambda index, residual: found.append(residual.clone()))
        return found

    @torch.inference_mode()
    def stream(self, input_ids: Tensor, consume: Callable[[int, Tensor], object]) -> None:
        """Run token ids int64 [B, N]; call `consume(i, residual [B, N, D])` for the i-th chosen layer as soon as its
        block has run.

        `residual` is the model's own tensor: copy it, do not change it. `IncompatibleError` if a block did not run
        exactly once, `ResidscopeError` if the device is out of memory.
        """
        seen: list[int] = []
        hooks = ((layer, self._hook(i, input_ids, consume, seen)) for i, layer in enumerate(self.layers))
        handles = [self._model.blocks[layer].register_forward_hook(hook) for layer, hook in hooks]
        try:
            self._model.base(input_ids=input_ids.to(self._model.device), use_cache=False)
        except EndOfPass:
            if len(seen) < len(self.layers):
                raise  # `consume` ended the pass.
        except torch.OutOfMemoryError as error:
            raise ResidscopeError(
                f"out of memory in the forward pass of {input_ids.shape[0]} sequences of {input_ids.shape[1]} tokens;"
                " try a smaller --batch-size"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if seen != list(range(len(self.layers))):
            raise IncompatibleError(
                f"{self._model.spec.name} ({self._model.architecture}): blocks {list(self.layers)} should run once"
                f" each, in order; they ran as {[self.layers[i] for i in seen]}"
            )

    def _hook(self, index: int, input_ids: Tensor, consume: Callable[[int, Tensor], object], seen: list[int]) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            residual = output[0] if isinstance(output, tuple | list) else output
            expected = (*input_ids.shape, self._model.d_model)
            if not isinstance(residual, Tensor) or tuple(residual.shape) != expected:
                shape = tuple(residual.shape) if isinstance(residual, Tensor) else type(residual).__name__
                wanted = f"the block's output should be {expected}"
                raise IncompatibleError(f"layer {self.layers[index]}: {wanted}, found {shape}")
            consume(index, residual.to(self._model.device))  # It may be elsewhere if the model is spread over devices.
            seen.append(index)
            if index == len(self.layers) - 1:
                raise EndOfPass

        return hook
