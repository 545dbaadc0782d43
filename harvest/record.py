"""What a store records about how it was made: its provenance, and the options that a command must share to continue it.

How: the record is plain JSON of what the stored bytes depend on and nothing else (no paths, times or device), so
that the same command gives the same record anywhere, and an error can name the fields in which another command's record
differs. Tested in tests/harvest/test_continue.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harvest.config import HarvestConfig
from harvest.settings import Settings
from harvest.text.mixing import Mixture
from harvest.text.sources import TextSource
from residscope.errors import IncompatibleError
from residscope.names import versions

# Options newer than the first stores: a record without one is treated as having this value.
_VALUES_BEFORE = {
    "adapter": None,
    "dataset_weights": None,
    "shuffle_documents": None,
    "pack": True,
    "token_column": None,
}
_NAMES_OF = {"model_fingerprint": "model", "lens_hash": "lens"}
"""Content hashes of local models and lenses, and the fields with the names of their folders or files."""
_WORDS = {"model_fingerprint": "the content of --model", "model_revision": "--revision", "adapter": "the adapter"}
_WORDS |= {"lens_hash": "the content of --lens", "dataset_weights": "the weight of each --dataset"}
_WORDS |= {"dataset_revision": "the revision or hash of --dataset"}
"""What messages call fields that are not flags; the others are called by their flags."""
_PACKAGES = ("residscope", "torch", "transformers", "tokenizers", "datasets", "zarr", "numpy")


def make_record(config: HarvestConfig, settings: Settings, sources: Sequence[TextSource]) -> dict[str, Any]:
    """What the stored bytes depend on, as plain JSON by option; runs with equal records may share a store."""
    spec, lens = settings.spec, settings.lens
    choices = [source.choice for source in sources]
    return {
        "model": spec.name,
        "model_revision": spec.revision,
        "model_fingerprint": spec.fingerprint,
        "adapter": spec.adapter,
        "random_init": config.control.random_init,
        "seed": config.control.seed,
        "dataset": _for_each([source.dataset for source in sources]),
        "dataset_weights": [choice.weight for choice in choices] if len(choices) > 1 else None,
        "dataset_config": _for_each([choice.config or None for choice in choices]),
        # Of a hub data set only the requested revision: continuing a store reads no text and must not ask the hub.
        "dataset_revision": _for_each([s.revision if s.is_local else s.choice.revision or None for s in sources]),
        "split": _for_each([choice.split for choice in choices]),
        "text_column": _for_each([choice.column for choice in choices]),
        "token_column": _for_each([c.token_column for c in choices]) if any(c.token_column for c in choices) else None,
        "shuffle_documents": config.documents.shuffle_documents,
        "pack": config.documents.pack,
        "max_tokens": config.max_tokens,
        "context_length": settings.packing.context_length,
        "batch_size": settings.batch_size,
        "layers": list(settings.layers),
        "dtype": settings.dtype,
        "store_dtype": settings.store_dtype,
        "codec": config.storage.codec,
        "document_separator": settings.packing.separator,
        "keep_first_position": config.sequences.keep_first_position,
        **({"mask_norm": config.mask_norm} if config.mask_norm else {}),
        **({"rolling": config.storage.rolling} if config.storage.rolling else {}),
        "lens": lens.name if lens else None,
        "lens_hash": lens.fingerprint if lens else None,
        "lens_indexing": lens.indexing if lens else None,
    }


def _for_each(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def refuse_differences(out: Path, stored: Mapping[str, Any] | None, record: Mapping[str, Any]) -> list[str]:
    """Raise `IncompatibleError` naming every field in which a store's record differs from this one. An option that is
    newer than the store counts as its former value. A model or lens with another name but the same content hash is the
    same. Returns lines for the user: one for each of these, and one if peft's version has changed."""
    if stored is None:
        raise IncompatibleError(f"{out} was not made by harvest; choose another --out, or --overwrite to replace it")
    stored, hashed = {**_VALUES_BEFORE, **stored}, str(record.get("model_fingerprint"))
    if hashed.startswith(f"{stored.get('model_fingerprint')}+"):  # from before all files were hashed
        stored["model_fingerprint"] = hashed
    differing = [name for name in {**record, **stored} if stored.get(name) != record.get(name)]
    same = {name for content, name in _NAMES_OF.items() if stored.get(content) == record.get(content) is not None}
    renamed = [name for name in differing if name in same]
    kinds = {str(options.get("adapter")).partition(", peft ")[0] for options in (stored, record)}
    upgraded = ["adapter"] if "adapter" in differing and len(kinds) == 1 else []
    names = [name for name in differing if name not in (*renamed, *upgraded)]
    if names:
        found = "; ".join(
            f"{_WORDS.get(name) or '--' + name.replace('_', '-')} is {_shown(stored.get(name))} there and "
            f"{_shown(record.get(name))} here"
            for name in names
        )
        if "model_fingerprint" in names and "model" not in names:
            found += " (a hash of the model's configuration, tokenizer and weights: one of these files was changed)"
        raise IncompatibleError(
            f"{out} was made with other options: {found}. Give the same options to continue it, choose another --out,"
            " or use --overwrite to replace it"
        )
    notes = [
        f"warning: {out} was begun with the adapter {stored[name]}, now {record.get(name)}: the new shards may"
        " differ in the last bits"
        for name in upgraded
    ]
    return notes + [
        f"the {name} {record[name]!r} is called {stored[name]!r} in {out}, which keeps that name: the contents have the"
        " same hash"
        for name in renamed
    ]


def make_provenance(
    settings: Settings, sources: Sequence[TextSource], mixture: Mixture, record: Mapping[str, Any], architecture: str
) -> dict[str, Any]:
    """A store's provenance, as plain JSON. mixture: that of the sources, after it was read."""
    spec, packing = settings.spec, settings.packing
    return {
        "model": spec.name,
        "model_source": spec.source,
        "model_revision": spec.revision,
        "model_fingerprint": spec.fingerprint,
        "adapter": spec.adapter,
        "architecture": architecture,
        "random_init": spec.random_init,
        "seed": spec.seed,
        "tokenizer": type(settings.tokenizer.backend).__name__,
        "opening_ids": list(packing.opening),
        "bos_id": packing.opening[0] if packing.opening else None,  # for older readers
        "separator": packing.separator,
        "separator_ids": list(packing.separator_ids),
        "dataset": " ".join(
            f"{source.dataset}:{source.choice.weight:g}" if len(sources) > 1 else source.dataset for source in sources
        ),
        "dataset_revision": _for_each([source.revision for source in sources]),
        "sources": [
            {
                "dataset": source.dataset,
                "revision": source.revision,
                "weight": source.choice.weight,
                "documents": documents,
                "tokens": tokens,
            }
            for source, documents, tokens in zip(sources, mixture.documents, mixture.tokens, strict=True)
        ],
        "split": record["split"],
        "compute_dtype": settings.dtype,
        "device": settings.device.type,
        "versions": versions(*_PACKAGES),
        "config": dict(record),
    }


def dependences(settings: Settings) -> dict[str, Any]:
    """What else the vectors depend on, to the last bit, besides the text of the options; plain JSON."""
    spec, lens = settings.spec, settings.lens
    given = {"model": spec.fingerprint or spec.revision, "adapter": spec.adapter, "dtype": settings.dtype}
    given |= {"lens": lens.fingerprint if lens else None, "device": settings.device.type}
    return given | {name: versions(name)[name] for name in ("torch", "transformers")}


def changed_surroundings(provenance: Mapping[str, Any], settings: Settings) -> str:
    """What has changed since the store was started and may change the last bits; empty if nothing has."""
    then = {"device": provenance.get("device"), **provenance.get("versions", {})}
    now, names = dependences(settings), ("device", "torch", "transformers")
    return ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in names if then.get(name) != now[name])


def _shown(value: Any) -> str:
    text = "not given" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
