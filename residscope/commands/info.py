"""`residscope info`: what a store holds, as one JSON object or in words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from residscope.console import counted, human_bytes


def info(path: Path, as_json: bool) -> None:
    """Print what the store at `path` holds."""
    found = facts(path)
    if as_json:
        print(json.dumps(found))
        return
    print(path)
    for name, value in in_words(found).items():
        print(f"  {name:<10} {value}")


def facts(path: Path) -> dict[str, Any]:
    """Everything known about a store, as plain JSON: its attributes, then what was counted."""
    from store.activations import ActivationStore
    from store.care.ring import Readers
    from store.care.verify import lost_shards

    store = ActivationStore.open(path, partial=True)
    meta, tokens, missing, statistics = store.meta, store.tokens, store.missing_shards(), store.statistics()
    removed = Readers(path, store.ring).removed_shards(meta.n_shards) if store.ring else set[int]()
    there = {*range(meta.n_shards)} - {*missing} - removed
    return {
        "path": str(path),
        **meta.to_attributes(),
        "n_kept": int(tokens.keep.sum()),
        "n_documents": int(tokens.document.max()) + 1,
        "n_shards": meta.n_shards,
        "missing_shards": missing,
        "lost_shards": lost_shards(store),
        "removed_shards": sorted(removed),
        "bytes": sum(store.record(shard).bytes for shard in there),
        "content_hash": store.content_hash,
        "layer_norm": statistics.norm.tolist() if statistics.count else None,
    }


def in_words(found: Mapping[str, Any]) -> dict[str, str]:
    """The lines of text to print, by their headings."""
    provenance, lens, n_missing = found["provenance"], found["lens"], len(found["missing_shards"])
    random = ", random weights" if provenance.get("random_init") else ""
    n_shards, removed = counted(found["n_shards"], "shard"), found["removed_shards"]
    n_there = found["n_shards"] - n_missing - len(removed)
    missing = f"{counted(n_missing, 'shard')} {'is' if n_missing == 1 else 'are'} missing"
    state = f"{missing}; run the same `harvest` command again to fill what is missing" if n_missing else "complete"
    if removed:
        state += f"; rolling: {counted(len(removed), 'shard')} removed after all trainers had used them"
    if lost := found["lost_shards"]:
        state = f"damaged: files of {counted(len(lost), 'shard')} are gone or cut off; see `residscope verify`"
    return {
        "model": provenance.get("model", "unknown") + random,
        "text": _texts(provenance),
        "tokens": f"{found['n_tokens']:,} ({found['n_kept']:,} kept) of {counted(found['n_documents'], 'document')}, "
        f"in sequences of up to {found['context_length']:,}",
        "layers": f"{len(found['layers'])} of {found['n_model_layers']}, d_model {found['d_model']}",
        "numbers": f"{found['stored_dtype']}, codec {found['codec']}",
        "lens": "none" if lens is None else lens.get("id", "yes"),
        "size": f"{human_bytes(found['bytes'])} in {n_there} of {n_shards} of {found['shard_tokens']:,} tokens",
        "mean norm": _norms(found["layers"], found["layer_norm"]),
        "state": state,
    }


def _texts(provenance: Mapping[str, Any]) -> str:
    """The texts, and if there are several, how many tokens each gave: documents are taken whole, so that in a small
    store the shares may be far from the requested ones."""
    sources = provenance.get("sources") or []
    if len(sources) < 2:
        return str(provenance.get("dataset", "unknown"))
    return ", ".join(f"{source['dataset']} ({source['tokens']:,} tokens)" for source in sources)


def _norms(layers: list[int], norms: list[float] | None) -> str:
    if norms is None:
        return "not known yet"
    return f"{norms[0]:.4g} after block {layers[0]}, {norms[-1]:.4g} after block {layers[-1]}"
