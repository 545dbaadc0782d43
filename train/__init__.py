"""Train one multi-layer sparse autoencoder on a store of activations, and keep it in a checkpoint others can read.

    from train import TrainConfig, train, load_checkpoint

Importing this is cheap: what needs torch is loaded when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.model import MLSAE, Checkpoint, SAEConfig, load_checkpoint, save_checkpoint
    from train.run import TrainResult, train

__all__ = [
    "MLSAE",
    "Checkpoint",
    "SAEConfig",
    "TrainConfig",
    "TrainResult",
    "load_checkpoint",
    "save_checkpoint",
    "train",
]

_HOME = {"TrainConfig": "train.config", "TrainResult": "train.run", "train": "train.run"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "train.model")), name)
