"""Whether what a file gives for weights and records can be theirs: finite numbers, and records that can be used.

The readers of all formats ask here, so that damage is one clear error rather than NaNs in results or a failure deep in
an analysis. Not here: shapes and file formats (`train.model`, `train.formats.files`).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from residscope.errors import IncompatibleError


def check_weights(state: Mapping[str, Tensor], where: str) -> None:
    """Raise `IncompatibleError` if a tensor holds a value that is not finite; `where` is what the user calls it."""
    for name, tensor in state.items():
        # A threshold of 0, which is not measured yet, has an infinite logarithm.
        good = ~tensor.isnan() if name == "log_threshold" else tensor.isfinite()
        if not good.all():
            raise IncompatibleError(
                f"{where}: {name} should hold finite numbers, found {tensor[~good].flatten()[0].item()}: the training "
                "diverged or the file is damaged; take another checkpoint, or train anew with a lower --lr"
            )


def check_records(store: Any, trainer: Any, where: str) -> None:
    """Raise `IncompatibleError` if `Checkpoint.store` or `Checkpoint.trainer` cannot be what `train` writes."""
    reason = None
    if not isinstance(store, dict) or not isinstance(trainer, dict):
        reason = "store and trainer should be mappings"
    elif not _are_layers(store.get("layers")):
        reason = f"layers should be integers, found {store['layers']!r}"
    elif store.get("validation") and not _is_split(store["validation"]):
        reason = f"validation should have a fraction in [0, 1) and a seed, found {store['validation']!r}"
    if reason is not None:
        raise IncompatibleError(f"{where}: its record of the training is damaged: {reason}; take another checkpoint")


def _are_layers(found: Any) -> bool:
    return found is None or (isinstance(found, list | tuple) and all(type(layer) is int for layer in found))


def _is_split(found: Any) -> bool:
    try:
        return 0 <= float(found["fraction"]) < 1 and int(found["seed"]) >= 0
    except (TypeError, ValueError, KeyError):
        return False
