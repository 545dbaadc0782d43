"""Stores for tests: small, written through the public API."""

from pathlib import Path
from typing import Any

import numpy as np

from store.activations import ActivationStore
from store.arrays import TokenTable
from store.meta import ITEMSIZE, StoreMeta, chunk_and_shard_tokens, config_hash


def token_table(
    n_tokens: int,
    *,
    document: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    token_id: np.ndarray | None = None,
    position: np.ndarray | None = None,
    context_length: int = 16,
) -> TokenTable:
    """A table of n tokens; by default ids count up, a document is one sequence, and position 0 is not kept."""
    index = np.arange(n_tokens, dtype=np.int32)
    position = index % context_length if position is None else position
    return TokenTable(
        token_id=index % 251 if token_id is None else token_id,
        document=index // context_length if document is None else document,
        position=position,
        keep=position != 0 if keep is None else keep,
    )


def make_meta(n_tokens: int, n_layers: int, d_model: int, **changes: Any) -> StoreMeta:
    """A StoreMeta with the format's own chunk and shard sizes unless `changes` says otherwise."""
    stored_dtype = changes.setdefault("stored_dtype", "bfloat16")
    chunk, shard = chunk_and_shard_tokens(n_tokens, n_layers, d_model, ITEMSIZE[stored_dtype])
    chunk = changes.setdefault("chunk_tokens", chunk)
    changes.setdefault("shard_tokens", -(-shard // chunk) * chunk)
    changes.setdefault("layers", tuple(range(n_layers)))
    changes.setdefault("n_model_layers", max(changes["layers"]) + 1)
    changes.setdefault("context_length", 16)
    changes.setdefault("provenance", {"model": "test"})
    return StoreMeta(
        n_tokens=n_tokens, d_model=d_model, **{"config_hash": config_hash(changes | {"n_tokens": n_tokens}), **changes}
    )


def make_store(
    path: str | Path,
    activations: np.ndarray,
    *,
    document: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    token_id: np.ndarray | None = None,
    position: np.ndarray | None = None,
    **changes: Any,
) -> ActivationStore:
    """A whole store of `activations` (float32 [T, L, D]), open for reading.

    Token columns default as in `token_table`; `changes` are fields of StoreMeta (chunk_tokens, shard_tokens,
    stored_dtype, codec, layers, ...).
    """
    n_tokens, n_layers, d_model = activations.shape
    meta = make_meta(n_tokens, n_layers, d_model, **changes)
    tokens = token_table(
        n_tokens, document=document, keep=keep, token_id=token_id, position=position, context_length=meta.context_length
    )
    with ActivationStore.create(path, meta, tokens) as store:
        for shard in range(meta.n_shards):
            start, stop = meta.shard_bounds(shard)
            store.write_shard(shard, activations[start:stop], tokens.keep[start:stop])
        store.finalize()
    return ActivationStore.open(path)


def random_activations(
    n_tokens: int = 300, n_layers: int = 3, d_model: int = 12, seed: int = 0, scale_by_layer: bool = True
) -> np.ndarray:
    """float32 [T, L, D]: Gaussian about a mean of each layer's own, growing with the layer as residual streams do."""
    rng = np.random.default_rng(seed)
    scale = 2.0 ** np.arange(n_layers) if scale_by_layer else np.ones(n_layers)
    mean = rng.normal(size=(n_layers, d_model))
    values = (rng.normal(size=(n_tokens, n_layers, d_model)) + mean) * scale[:, None]
    return values.astype(np.float32)
