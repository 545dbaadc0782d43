"""Checkpoints on disk: `ckpt.pt`, written whole or not at all, and read without running code from strangers.

Everything read is checked: checksums (`residscope.tensors`), shapes against the configuration, finite weights, usable
records. Damage thus gives one clear error instead of NaN results. Other file formats: see `train.formats.files`.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residscope.destinations import refuse_shared
from residscope.errors import IncompatibleError, UsageError
from residscope.names import beside
from residscope.tensors import load_tensors, save_tensors
from store.files import TEMPORARY, removed_on_error, sync
from train.model import MLSAE
from train.model_config import SAEConfig
from train.objective.weights import BY_LATENT
from train.parallel.ranks import ALONE, Ranks

CHECKPOINT_FORMAT = 1
BESIDE = (".safetensors", ".metrics.jsonl", ".loss.png", ".tensorboard", ".wandb-id")
"""Endings of the files that `train` writes beside a checkpoint, apart from the file with its flags."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint file holds."""

    sae: MLSAE
    """The autoencoder, float32, on the CPU."""
    store: dict[str, Any]
    """Which data it was trained on: content_hash, path (the store's name), d_model, layers, model, lens,
    validation {fraction, seed, n_documents}; for a foreign model, only what is known of model, layers and d_model."""
    trainer: dict[str, Any]
    """Training state: step, finished, the configuration and, until finished, all that a resume needs; for a foreign
    model, where it came from."""
    notes: tuple[str, ...] = ()
    """For a file in another format: what a user has to know that the weights do not say."""
    format: str = "residscope"
    """The file's format: residscope, mlsae, saelens or sparsify."""
    path: str = ""
    """The file or hub repository as given, with its sub-folder if any."""
    changed: int = 0
    """The result of `changed_at` just before the file was read."""

    @property
    def config(self) -> SAEConfig:
        return self.sae.config


def refuse_anothers(checkpoint: Path) -> None:
    """Raise `UsageError` if a file that `train` writes beside `checkpoint` belongs to another one, or to no run."""
    refuse_shared(checkpoint, config_path(checkpoint), [beside(checkpoint, ending) for ending in BESIDE])


def changed_at(checkpoint: Path) -> int:
    """When the file was last written, in nanoseconds; 0 if it does not exist."""
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0


def config_path(checkpoint: Path) -> Path:
    """The file with the flags of its run: ckpt.pt -> ckpt.config.toml."""
    return beside(checkpoint, ".config.toml")


def save_checkpoint(
    path: Path, sae: MLSAE, *, store: dict[str, Any], trainer: dict[str, Any], ranks: Ranks = ALONE
) -> None:
    """Write `ckpt.pt`, whole or not at all: a temporary file, fsync, rename, fsync of the folder. Every rank
    calls this; the first one writes the file, receiving the pieces of the others one by one.

    Raises `OSError` if writing fails; the old checkpoint is kept.
    """
    m = sae.config.n_latents * ranks.latents.size
    content = {
        "format": CHECKPOINT_FORMAT,
        "config": asdict(replace(sae.config, n_latents=m)),
        "state_dict": {n: ranks.pieces(t, m) if n in BY_LATENT else t for n, t in sae.state_dict().items()},
        "store": store,
        "trainer": trainer,
    }
    if not ranks.first:
        save_tensors(content, None)
        return
    temporary = path.with_name(path.name + TEMPORARY)
    with removed_on_error(temporary):  # on a full disk a leftover would take up space
        try:
            with temporary.open("wb") as file:
                save_tensors(content, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        temporary.replace(path)
    sync(path.parent)


def load_checkpoint(path: Path, *, finite: bool = True, mapped: bool = False) -> Checkpoint:
    """Read a checkpoint; only tensors and plain values are accepted, so that a file from a stranger cannot run code.

    finite: refuse weights that are not finite. mapped: as in `load_tensors`. Raises `UsageError` if there is no such
    file, `IncompatibleError` if it is not a whole checkpoint of this format.
    """
    changed, content = changed_at(Path(path)), _read_safely(Path(path), mapped)
    if (version := content.get("format")) != CHECKPOINT_FORMAT:
        ours = f"this version reads {CHECKPOINT_FORMAT}"
        raise IncompatibleError(f"{path}: checkpoint format {version}, {ours}: use the version that wrote it")
    config, state = _config_of(content["config"], path), content["state_dict"]
    with torch.device("meta"):  # only shapes: a config may ask for more memory than there is
        sae = MLSAE(config)
    for name, tensor in sae.state_dict().items():
        found = state.get(name) if isinstance(state, dict) else None
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            shown = list(found.shape) if isinstance(found, Tensor) else None
            wanted = f"shape {list(tensor.shape)} according to the checkpoint's config"
            raise IncompatibleError(f"{path}: {name} should have {wanted}, found {shown}")
        if not found.dtype.is_floating_point:
            raise IncompatibleError(f"{path}: {name} should hold floats, found {str(found.dtype)[6:]}")
    for name in sae.state_dict():  # Copied one by one into memory that torch aligns: products' last bits depend on it.
        weight = state.pop(name).float()
        weight = weight if mapped else weight.clone(memory_format=torch.contiguous_format)
        sae.load_state_dict({name: weight.contiguous()}, strict=False, assign=True)
    store, trainer = content.get("store") or {}, content.get("trainer") or {}
    if finite:
        check_weights(sae.state_dict(), str(path))
    check_records(store, trainer, str(path))
    return Checkpoint(sae=sae, store=store, trainer=trainer, path=str(path), changed=changed)


def _read_safely(path: Path, mapped: bool) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint; `train --store STORE --out {path}` makes one")
    with path.open("rb") as file:
        content = load_tensors(file, str(path), mapped=mapped)
    if not isinstance(content, dict) or not {"state_dict", "config"} <= set(content):
        raise IncompatibleError(f"{path}: not a checkpoint of this project: it should hold config and state_dict")
    return content


def _config_of(found: Any, path: Path) -> SAEConfig:
    known = {field.name for field in fields(SAEConfig)}
    if not isinstance(found, dict) or not set(found) <= known or not {"d_model", "n_latents", "k"} <= set(found):
        shown = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise IncompatibleError(f"{path}: the checkpoint's config should have {sorted(known)}, found {shown}")
    try:
        return SAEConfig.from_plain(found)
    except (UsageError, TypeError) as error:
        raise IncompatibleError(f"{path}: invalid configuration: {error}") from None


def check_weights(state: Mapping[str, Tensor], where: str) -> None:
    """Raise `IncompatibleError` if a tensor holds a value that is not finite; `where` names the file to the user."""
    for name, tensor in state.items():
        # A threshold that has not been measured yet is 0, and its logarithm infinite.
        good = ~tensor.isnan() if name == "log_threshold" else tensor.isfinite()
        if not good.all():
            raise IncompatibleError(
                f"{where}: {name} should hold finite numbers, found {tensor[~good].flatten()[0].item()}: the training "
                "diverged or the file is damaged; use another checkpoint, or train again with a lower --lr"
            )


def check_records(store: Any, trainer: Any, where: str) -> None:
    """Raise `IncompatibleError` if `Checkpoint.store` or `Checkpoint.trainer` is not what `train` can write."""
    reason = None
    if not isinstance(store, dict) or not isinstance(trainer, dict):
        reason = "store and trainer should be mappings"
    else:
        layers, split = store.get("layers") or (), store.get("validation")
        indices = isinstance(layers, list | tuple) and all(type(n) is int and n >= 0 for n in layers)
        if not indices or len(set(layers)) < len(layers):
            reason = f"layers should be block indices, each once, found {layers!r:.60}"
        elif not isinstance(store.get("model"), str | None) or not isinstance(store.get("lens"), str | dict | None):
            reason = f"model and lens should be names, found {store.get('model')!r:.60}, {store.get('lens')!r:.60}"
        elif split and not _is_split(split):
            reason = f"validation should have a fraction in [0, 1) and a seed, found {split!r}"
    if reason is not None:
        raise IncompatibleError(f"{where}: its record of the training is damaged: {reason}; use another checkpoint")


def _is_split(found: Any) -> bool:
    fraction, seed = (found.get("fraction"), found.get("seed")) if isinstance(found, dict) else (None, None)
    return isinstance(fraction, float | int) and 0 <= fraction < 1 and type(seed) is int and seed >= 0
