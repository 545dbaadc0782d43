"""The training data: the open store, its split by document, and its rows as float32 tensors on the device.

Layers have two numbers: the model's own, which users see, and the position among the layers trained on, 0 .. L - 1,
which indexes tensors.

Shapes: N rows, D d_model, T tokens of the store, L layers trained on.
"""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from residscope.errors import IncompatibleError, UsageError
from residscope.memory import free_memory
from store.activations import ActivationStore
from store.loader import Batch, WindowLoader
from store.remote.held import hold
from store.shuffle import validation_documents
from train.config import TrainConfig
from train.grid import run_path
from train.hardware import resolve_device
from train.objective.recipes import batch_size
from train.parallel.follow import Follower
from train.parallel.ranks import ALONE, Ranks


class Vectors(NamedTuple):
    """Some residual stream vectors."""

    x: Tensor
    """float32 [N, D], raw."""
    layer: Tensor
    """int64 [N], position among the layers trained on."""
    of_layer: np.ndarray | None = None
    """int64 [L]: rows of each layer over all ranks; None if this rank has them all."""


class VectorSource:
    """Turns the loader's batches into tensors; `layers` are the stored layers to train on, ascending."""

    def __init__(self, layers: Sequence[int], stored_dtype: str, device: torch.device) -> None:
        self._stored_dtype, self._layers, self.device = stored_dtype, list(layers), device
        self._position = torch.full((max(layers) + 1,), -1, dtype=torch.int64)
        self._position[list(layers)] = torch.arange(len(layers))

    def __call__(self, batch: Batch) -> Vectors:
        """One batch, converted to float32 on the device so that only half the bytes are transferred."""
        x, layer = self.to_float32(batch.rows), self._position[torch.from_numpy(batch.layer)]
        return Vectors(x, self._sent(layer), batch.of_layer[self._layers])

    def to_float32(self, rows: np.ndarray) -> Tensor:
        """Rows in the store's type, of any shape, as float32 on the device."""
        bfloat16 = self._stored_dtype == "bfloat16"  # unknown to numpy
        tensor = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16) if bfloat16 else torch.from_numpy(rows)
        return self._sent(tensor).float()

    def _sent(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":  # From pinned memory the copy is asynchronous.
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


class DocumentSplit(NamedTuple):
    """Which kept tokens are trained on and which are held out; no document is in both."""

    train: np.ndarray
    """bool [T]"""
    validation: np.ndarray
    """bool [T]"""
    n_documents: int
    """Documents of the store."""


def split_tokens(store: ActivationStore, fraction: float, seed: int) -> DocumentSplit:
    """Hold out whole documents; raises `IncompatibleError` if that leaves nothing to train on."""
    tokens = store.tokens
    n_documents = int(tokens.document.max()) + 1
    held_out = validation_documents(n_documents, fraction, seed)[tokens.document]
    split = DocumentSplit(tokens.keep & ~held_out, tokens.keep & held_out, n_documents)
    if not split.train.any():
        raise IncompatibleError(
            f"{store.path}: --validation-fraction {fraction} leaves no token to train on ({int(tokens.keep.sum())} "
            f"kept tokens in {n_documents} documents): harvest more text"
        )
    return split


def stored_layers(store: ActivationStore, layers: tuple[int, ...] | None) -> list[int]:
    """Positions in the store of the model's layers `layers`, ascending; None: all layers."""
    have = store.meta.layers
    wanted = have if layers is None else tuple(sorted(layers))
    if missing := sorted(set(wanted) - set(have)):
        names, there = ", ".join(map(str, missing)), " ".join(map(str, have))
        raise UsageError(f"--layers: {store.path} does not have layer {names}, only {there}")
    return [have.index(layer) for layer in wanted]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data that all runs of an invocation share."""

    store: ActivationStore
    split: DocumentSplit
    stored: list[int]
    """The layers of the stream, as positions in the store, ascending."""
    source: VectorSource
    device: torch.device
    config: TrainConfig
    batch_size: int
    """Vectors in a step of the stream."""
    held_out: dict[str, Any]
    """How the held-out documents were chosen: fraction, seed, n_documents."""
    ranks: Ranks = ALONE
    """The processes that share each batch."""
    follower: Follower | None = None
    """Set for a store that `harvest` is still filling."""

    @classmethod
    def open(cls, config: TrainConfig, store: ActivationStore, ranks: Ranks = ALONE) -> "TrainingData":
        stored, device = stored_layers(store, config.data.layers), resolve_device(config.hardware.device)
        fraction, seed = config.validation.validation_fraction, config.validation.validation_seed or 0
        if store.ring:
            fraction, seed = store.ring.fraction, store.ring.seed
        split = split_tokens(store, fraction, seed)
        spare = (free_memory() or 0) // (3 * ranks.local)
        hold(store, spare if config.cache_gb is None else int(config.cache_gb * 1e9))
        several, out = config.sweep or config.per_layer, config.out.resolve()
        return cls(
            store=store,
            split=split,
            stored=stored,
            source=VectorSource(stored, store.meta.stored_dtype, device),
            device=device,
            config=config,
            batch_size=batch_size(config, int(split.train.sum()) * len(stored)),
            ranks=ranks,
            held_out={"fraction": fraction, "seed": seed, "n_documents": split.n_documents},
            follower=Follower(store, str(run_path(out, "*") if several else out), len(stored)) if store.ring else None,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the stream, by the model's numbers."""
        return tuple(self.store.meta.layers[position] for position in self.stored)

    def record(self, layers: tuple[int, ...]) -> dict[str, Any]:
        """What a checkpoint records about its data; layers: those that it is trained on."""
        meta, provenance = self.store.meta, self.store.meta.provenance
        return {
            "content_hash": self.store.content_hash,
            "path": self.store.path.name,
            "d_model": meta.d_model,
            "layers": list(layers),
            "model": provenance.get("model"),
            "dataset": provenance.get("dataset"),
            "random_init": bool(provenance.get("random_init")),
            "lens": meta.lens,
            "validation": self.held_out,
        }

    def loader(
        self,
        seed: int,
        window_bytes: int,
        *,
        epochs: int = 1,
        start_batch: int = 0,
        ranks: Ranks = ALONE,
        first_part: bool = False,
    ) -> WindowLoader:
        """This rank's share of each batch of training rows, in a seeded order. first_part: only rows of the first part
        of a store that is still being filled."""
        mask, parts = self.split.train, {}
        if self.follower:
            parts = {"shard_part": self.follower.part_of, "ready": self.follower.ready}
            if first_part:
                mask = mask & (np.repeat(self.follower.part_of, self.store.meta.shard_tokens)[: len(mask)] == 0)
                parts = {}
        return WindowLoader(
            self.store,
            mask,
            self.batch_size,
            seed,
            window_bytes,
            layers=self.stored,
            epochs=epochs,
            start_batch=start_batch,
            rank=ranks.rank,
            world_size=ranks.size,
            **parts,
        )

    def arriving(self, loader: WindowLoader) -> contextlib.AbstractContextManager[Iterator[Vectors]]:
        """The loader's batches; for a GPU they are gathered ahead, unless the next one may never come."""
        return arriving(loader, self.source, ahead=self.device.type == "cuda" and self.follower is None)


@contextlib.contextmanager
def arriving(loader: WindowLoader, source: VectorSource, *, ahead: bool) -> Iterator[Iterator[Vectors]]:
    """The loader's batches on the device; on leaving, its threads end. ahead: gather each batch while the previous one
    is trained on."""
    batches = cast("Generator[Batch]", iter(loader))
    vectors = map(source, batches)
    try:
        if not ahead:
            yield vectors
            return
        gpu = torch.cuda.current_device() if source.device.type == "cuda" else None
        with ThreadPoolExecutor(1, "batch", _use_gpu, (gpu,)) as thread:
            yield _ahead(vectors, thread)
    finally:
        with contextlib.suppress(ValueError):  # after a second interrupt the thread may still be running
            batches.close()


def _use_gpu(gpu: int | None) -> None:
    if gpu is not None:  # CUDA's current device is set per thread
        torch.cuda.set_device(gpu)


def _ahead(vectors: Iterator[Vectors], thread: ThreadPoolExecutor) -> Iterator[Vectors]:
    following = thread.submit(next, vectors, None)
    while (found := following.result()) is not None:
        following = thread.submit(next, vectors, None)
        yield found
