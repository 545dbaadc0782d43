"""A harvest from end to end: resolve, plan, fill; or continue a store that was begun.

How: nothing is written before the model has loaded, the text is tokenised and the disk is known to have room. Then
the store is made with its token table, and its shards are filled. Running the same configuration again fills what is
missing: the stored token table is used, not the text. What it does not do: talk to the user, except for notes on
stderr (`harvest.report` prints results).
"""

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from tqdm import tqdm

from harvest.config import HarvestConfig
from harvest.fill import BatchRunner, Filled, fill, host_bytes
from harvest.model.load import LoadedModel, load_model
from harvest.options_file import save_options
from harvest.settings import (
    TORCH_DTYPES,
    Settings,
    make_provenance,
    make_record,
    refuse_differences,
    require_in_vocabulary,
    resolve,
    versions,
)
from harvest.table import encode_documents, pack
from harvest.text.mixing import Mixture
from harvest.text.sources import TextSource, open_sources, require_local_texts
from residscope.console import human_bytes
from residscope.destinations import require_space
from residscope.errors import IncompatibleError, ResidscopeError
from store.activations import ActivationStore
from store.arrays import TokenTable
from store.folder import is_store, refuse_inside_store
from store.manifest import WriterLock
from store.meta import StoreMeta, chunk_and_shard_tokens, config_hash

# Token columns, statistics and folders beside the vectors, with room to spare.
_SPARE_BYTES = 16 << 20
_TOKEN_BYTES = 13


class HarvestResult(NamedTuple):
    """What a harvest made."""

    out: str
    """The store."""
    model: str
    """Its model."""
    architecture: str
    """Class of the model."""
    tokens: int
    """Tokens in the store."""
    kept: int
    """Those that are trained on and analysed."""
    documents: int
    """Documents that they come from."""
    layers: list[int]
    """Stored layers."""
    d_model: int
    """Size of a vector."""
    bytes: int
    """Bytes of the vectors, before compression."""
    shards: int
    """Shards of the store."""
    shards_written: int
    """Those written by this run; the others were there."""
    seconds: float
    """Time of this run."""
    tokens_per_second: float | None
    """Speed of this run's fill, None where nothing was missing."""
    content_hash: str
    """Identifies the data."""


def harvest(config: HarvestConfig, model: LoadedModel | None = None) -> HarvestResult:
    """Make or complete the store that `config` asks for.

    model: as `load_to_continue` gives it, where it is loaded already. Raises `UsageError` for options that cannot work,
    `IncompatibleError` where --out is something else, `Interrupted` after a signal, `ResidscopeError` for anything else
    that the user can act on.
    """
    begin = time.perf_counter()
    existing = _existing(config)
    settings, sources, record = _resolve(config, existing)
    for note in settings.notes:
        print(note, file=sys.stderr)
    if existing:
        store = _reopen(config, settings, record)
    else:
        for source in sources:
            source.check()
        model = model or _load(settings)
        store = _plan(config, settings, sources, record, model)
    with store:
        save_options(config)  # On continuing too: a crash may have come between the store and this file.
        filled = Filled(0, 0, 0.0)
        if store.missing_shards():
            model = model or _load(settings)
            runner = BatchRunner(model, settings.layers, settings.store_dtype, settings.lens)
            print(
                f"host memory for activations: at most {human_bytes(host_bytes(store.meta, settings.batch_size))}",
                file=sys.stderr,
            )
            filled = fill(store, model, runner, settings.batch_size)
        store.finalize()
        return _result(config, store, filled, time.perf_counter() - begin)


def load_to_continue(config: HarvestConfig) -> LoadedModel:
    """The model that fills what the store at --out lacks, once everything that this needs is found to be there.
    Nothing is written; raises as `harvest` does."""
    settings, _, record = _resolve(config, existing=True)
    refuse_differences(config.out, _provenance(config.out).get("config"), record)
    return _load(settings)


def _resolve(config: HarvestConfig, existing: bool) -> tuple[Settings, tuple[TextSource, ...], dict[str, Any]]:
    """What `config` amounts to: settings, texts, and the record of them that a store keeps."""
    require_local_texts(config)
    settings = resolve(config)
    if existing and config.batch_size is None:
        # That of the store, since the default may be another on this device.
        before = _provenance(config.out).get("config", {}).get("batch_size", settings.batch_size)
        settings = dataclasses.replace(settings, batch_size=before)
    sources = open_sources(config, contents=not existing)
    return settings, sources, make_record(config, settings, sources)


def _provenance(out: Path) -> dict[str, Any]:
    return ActivationStore.open(out, partial=True).meta.provenance


def _existing(config: HarvestConfig) -> bool:
    """Whether --out holds a store to continue; refuses what is neither that nor free."""
    out = config.out
    refuse_inside_store(out, may_be_one=True)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        parent = next(folder for folder in out.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ResidscopeError(f"--out {out}: {parent} cannot be written to; choose another place")
        return False
    if not is_store(out):
        raise IncompatibleError(
            f"--out {out} exists and is not an activation store; it is left alone. Choose another --out, or remove it"
            " yourself"
        )
    return not config.overwrite


def _reopen(config: HarvestConfig, settings: Settings, record: dict[str, Any]) -> ActivationStore:
    """Open the store at --out to continue it, after its record is found to be this run's."""
    reader = ActivationStore.open(config.out, partial=True)
    provenance = reader.meta.provenance
    for note in refuse_differences(config.out, provenance.get("config"), record):
        print(note, file=sys.stderr)
    missing = len(reader.missing_shards())
    if missing:
        print(
            f"continuing {config.out}: {reader.meta.n_shards - missing} of {reader.meta.n_shards} shards are there",
            file=sys.stderr,
        )
        _warn_of_changes(provenance, settings)
    return ActivationStore.open(config.out, writable=True)


def _warn_of_changes(provenance: dict[str, Any], settings: Settings) -> None:
    now = {"device": settings.device.type, **versions()}
    then = {"device": provenance.get("device"), **provenance.get("versions", {})}
    changed = [
        f"{name} {then.get(name)} -> {now[name]}"
        for name in ("device", "torch", "transformers")
        if then.get(name) != now[name]
    ]
    if changed:
        print(
            f"warning: the store was begun with another {', '.join(changed)}; the new shards may differ in the last"
            " bits",
            file=sys.stderr,
        )


def _load(settings: Settings) -> LoadedModel:
    return load_model(
        settings.spec, dtype=TORCH_DTYPES[settings.dtype], device=settings.device, tokenizer=settings.tokenizer
    )


def _plan(
    config: HarvestConfig,
    settings: Settings,
    sources: Sequence[TextSource],
    record: dict[str, Any],
    model: LoadedModel,
) -> ActivationStore:
    """Tokenise, check the disk, and make the store without shards."""
    tokens, mixture = tokenise(settings, sources, config.max_tokens)
    _say_what_ran_out(sources, mixture)
    if not tokens.keep.any():
        print(
            f"warning: none of the {len(tokens.token_id):,} tokens will be trained on or analysed: each is a special"
            " token or the first of its sequence; give more text, or --keep-first-position",
            file=sys.stderr,
        )
    n_tokens = len(tokens.token_id)
    if n_tokens < config.max_tokens and config.max_tokens - n_tokens >= settings.packing.context_length:
        print(f"the text ran out: {n_tokens:,} tokens instead of {config.max_tokens:,}", file=sys.stderr)
    chunk, shard = chunk_and_shard_tokens(
        n_tokens,
        len(settings.layers),
        settings.d_model,
        settings.bytes_per_token // len(settings.layers) // settings.d_model,
    )
    meta = StoreMeta(
        n_tokens=n_tokens,
        layers=settings.layers,
        n_model_layers=settings.n_model_layers,
        d_model=settings.d_model,
        stored_dtype=settings.store_dtype,
        codec=config.codec,
        chunk_tokens=chunk,
        shard_tokens=shard,
        context_length=settings.packing.context_length,
        lens=settings.lens.describe() if settings.lens else None,
        provenance=make_provenance(
            settings, sources, list(zip(mixture.documents, mixture.tokens, strict=True)), record, model.architecture
        ),
        config_hash=config_hash({**record, "tokens": _table_hash(tokens)}),
    )
    _require_space(config.out, settings, n_tokens)
    if config.out.exists() and is_store(config.out):
        _remove_store(config.out)
    return ActivationStore.create(config.out, meta, tokens)


def tokenise(settings: Settings, sources: Sequence[TextSource], max_tokens: int) -> tuple[TokenTable, Mixture]:
    """The token table of at most `max_tokens` tokens of some texts, and what each gave. `ResidscopeError` where there
    is no text, or the tokenizer is not the model's."""
    packing = settings.packing
    limit = packing.stream_length(max_tokens)
    streams = [
        encode_documents(source.documents(), settings.tokenizer, limit, packing.longest_document) for source in sources
    ]
    mixture = Mixture(streams, [source.choice.weight for source in sources], limit, packing.document_extra)
    with tqdm(total=limit, desc="tokenise", unit="tok", unit_scale=True, leave=False, disable=None) as bar:

        def watched() -> Iterator[np.ndarray]:
            for ids in mixture:
                bar.update(len(ids))
                yield ids

        tokens = pack(watched(), packing, max_tokens)
    require_in_vocabulary(settings, tokens.token_id)
    return tokens, mixture


def _say_what_ran_out(sources: Sequence[TextSource], mixture: Mixture) -> None:
    """Say which of several texts could not give their share."""
    weights = [source.choice.weight for source in sources]
    for at in mixture.ran_out if len(sources) > 1 else ():
        share, wanted = mixture.tokens[at] / sum(mixture.tokens), weights[at] / sum(weights)
        if share < 0.99 * wanted:
            ended = f"{sources[at].dataset} ran out after {mixture.tokens[at]:,} tokens"
            print(f"{ended}: its share is {share:.1%} instead of {wanted:.1%}", file=sys.stderr)


def _require_space(out: Path, settings: Settings, n_tokens: int) -> None:
    """Refuse where the disk has no room, saying how much would fit."""
    freed = sum(path.stat().st_size for path in _files(out)) if out.exists() else 0
    needed = n_tokens * (settings.bytes_per_token + _TOKEN_BYTES) + _SPARE_BYTES
    try:
        require_space(out, needed - freed)
    except ResidscopeError as error:
        parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
        room = shutil.disk_usage(parent).free + freed - _SPARE_BYTES
        fitting = max(room // (settings.bytes_per_token + _TOKEN_BYTES), 0)
        raise ResidscopeError(f"{error}. {fitting:,} tokens would fit; nothing was written") from error


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _remove_store(out: Path) -> None:
    """Remove a store so that a crash on the way leaves none there: renamed first, to where `create` clears up."""
    out = out.resolve() if out.is_symlink() else out  # What a link points at goes, and the link stays.
    lock = WriterLock(out, out)
    try:
        removed = out.with_name(out.name + ".planning")
        if removed.exists():
            shutil.rmtree(removed)
        out.rename(removed)
        shutil.rmtree(removed)
    finally:
        lock.release()


def _table_hash(tokens: TokenTable) -> str:
    digest = xxhash.xxh3_128()
    for column in tokens:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def _result(config: HarvestConfig, store: ActivationStore, filled: Filled, seconds: float) -> HarvestResult:
    meta, tokens = store.meta, store.tokens
    return HarvestResult(
        out=str(config.out),
        model=meta.provenance["model"],
        architecture=meta.provenance["architecture"],
        tokens=meta.n_tokens,
        kept=int(tokens.keep.sum()),
        documents=int(tokens.document.max()) + 1,
        layers=list(meta.layers),
        d_model=meta.d_model,
        bytes=meta.n_tokens * meta.bytes_per_token,
        shards=meta.n_shards,
        shards_written=filled.shards,
        seconds=seconds,
        tokens_per_second=filled.tokens / filled.seconds if filled.seconds else None,
        content_hash=store.content_hash,
    )
