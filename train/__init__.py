"""Train one multi-layer sparse autoencoder on a store of activations, and keep it in a checkpoint others can read.

    from train import TrainConfig, train, load_checkpoint
    from train.config import ModelConfig
    train(TrainConfig(store=Path("acts.zarr"), model=ModelConfig(k=16)))

Importing this is cheap: what needs torch is loaded when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from train.config import TrainConfig
    from train.model import MLSAE, SAEConfig
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

_MODULES = {
    "MLSAE": "train.model",
    "Checkpoint": "train.checkpoint",
    "SAEConfig": "train.model_config",
    "TrainConfig": "train.config",
    "TrainResult": "train.reporting.report",
    "load_checkpoint": "train.checkpoint",
    "save_checkpoint": "train.checkpoint",
    "train": "train.run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
