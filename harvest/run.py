"""A harvest from start to end: resolve the options, tokenise the text, make the store, and fill its shards.

Nothing is written until the model is loaded, the text tokenised and the disk known to have room. Running the command
again fills what is missing, from the stored token table, not from the text. Also tested in test_continue.py.
"""

import dataclasses
import shutil
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from harvest.config import HarvestConfig, WorkerConfig
from harvest.destination import has_begun, remove_store, require_room
from harvest.fill import BatchRunner, Filled, fill
from harvest.filling.rolling import Rolling, cut
from harvest.filling.workers import fill_by_workers
from harvest.model.checks import check_length
from harvest.model.load import LoadedModel
from harvest.model.norms import mask_by_norm
from harvest.options_file import save_options
from harvest.record import changed_surroundings, make_provenance, make_record, refuse_differences
from harvest.result import HarvestResult
from harvest.settings import Settings, load_weights, require_in_vocabulary, resolve
from harvest.stored_values import host_bytes, n_writers
from harvest.table import make_table
from harvest.text.sources import TextSource, open_sources, require_local_texts
from residscope.cluster import n_cores
from residscope.console import counted, human_bytes
from residscope.errors import IncompatibleError, UsageError
from residscope.urls import URL
from store.activations import ActivationStore
from store.arrays import TokenTable
from store.care.outliers import few_tokens
from store.care.verify import lost_shards
from store.folder import is_store
from store.meta import StoreMeta, config_hash


class Job(NamedTuple):
    """What a command asks for, with names and defaults resolved."""

    config: HarvestConfig
    settings: Settings
    sources: tuple[TextSource, ...]
    record: dict[str, Any]
    """The options that the stored bytes depend on."""


def harvest(config: HarvestConfig, model: LoadedModel | None = None) -> HarvestResult:
    """Make or complete the store that `config` asks for.

    model: the requested model, if it is already loaded. Raises `UsageError` for options that cannot work,
    `IncompatibleError` if --out is something else, `Interrupted` after a signal, `ResidscopeError` for the rest.
    """
    start = time.perf_counter()
    begun = has_begun(config.out) and not config.overwrite
    job = look_up(config, begun)
    if model and model.spec.fingerprint != job.settings.spec.fingerprint:
        raise IncompatibleError(f"model {model.spec.name}: its files were changed since it was loaded; load it again")
    for note in job.settings.notes:
        _say(note)
    if begun:
        store = _reopen(job)
    else:
        for source in job.sources:
            source.check()
        model = model or load_weights(job.settings)
        store = _begin(job, model)
    with store:
        try:
            save_options(config)  # Also when continuing, in case of a crash between making the store and this file.
        except UsageError:
            if not begun:
                remove_store(store.path) if isinstance(store.path, URL) else shutil.rmtree(store.path)
            raise
        if lost := lost_shards(store):  # After saving the options, which a repair needs.
            what = f"the files of {counted(len(lost), 'shard')} are gone or cut off, the first of shard {lost[0]}"
            raise IncompatibleError(f"{config.out}: {what}: `residscope verify --repair` computes them again")
        filled = Filled(0, 0, 0.0)
        if store.missing_shards():
            settings, by_workers = job.settings, config.workers != WorkerConfig()
            writers = n_writers(settings.device, n_cores() // (config.workers.n_workers or 1))
            memory = human_bytes(host_bytes(store.meta, settings.batch_size, writers))
            _say(f"host memory for activations: at most {memory}" + " a worker" * by_workers)
            if by_workers:
                model = None  # Workers load it themselves, and need the memory.
                torch.cuda.empty_cache()
                filled = fill_by_workers(store, config, settings)
            else:
                filled = fill(store, BatchRunner(model or load_weights(settings), settings), settings.batch_size)
        store.finalize()
        keep, names = store.tokens.keep, job.settings.tokenizer.text
        if filled.shards and not store.ring and (few := few_tokens(store, keep, names)):
            _say(f"warning: {few.words}")
        return HarvestResult.of(config.out, store, filled, time.perf_counter() - start)


def look_up(config: HarvestConfig, begun: bool) -> Job:
    """Look up model, tokenizer, lens and texts. begun: whether the store exists, so that no text will be read."""
    require_local_texts(config.text)
    settings = resolve(config)
    if begun and config.batch_size is None:
        # Use the store's, since the default may differ on this device.
        before = ActivationStore.open(config.out, partial=True).meta.provenance.get("config", {})
        settings = dataclasses.replace(settings, batch_size=before.get("batch_size", settings.batch_size))
    sources = open_sources(config.text, config.documents.shuffle_documents, settings.known_ids, contents=not begun)
    return Job(config, settings, sources, make_record(config, settings, sources))


def _reopen(job: Job) -> ActivationStore:
    """Open the store at --out to continue it, after checking that it was made with the same options."""
    out = job.config.out
    reader = ActivationStore.open(out, partial=True)
    provenance = reader.meta.provenance
    for note in refuse_differences(out, provenance.get("config"), job.record):
        _say(note)
    missing, n_shards = len(reader.missing_shards()), reader.meta.n_shards
    if missing:
        _say(f"continuing {out}: {n_shards - missing} of {n_shards} shards are complete")
        if changed := changed_surroundings(provenance, job.settings):
            _say(f"warning: changed since the store was started: {changed}; the new shards may differ in the last bits")
    store = ActivationStore.open(out, writable=True)
    if store.meta != reader.meta:
        store.close()
        raise IncompatibleError(f"{out} was replaced by another store while it was opened; run the command again")
    return store


def _begin(job: Job, model: LoadedModel) -> ActivationStore:
    """Make the store, with its token table but no shards."""
    config, settings, sources, record = job
    rolling = Rolling.of(config, settings)
    first = rolling.first if rolling else None
    tokens, mixture = make_table(sources, settings.tokenizer, settings.packing, config.max_tokens, first)
    require_in_vocabulary(settings, tokens.token_id)
    last = int(tokens.position.argmax())  # the last token of the longest sequence
    longest = tokens.token_id[last - int(tokens.position[last]) : last + 1]
    check_length(model, torch.from_numpy(longest.astype(np.int64)))
    for line in mixture.shortfalls([source.dataset for source in sources]):
        _say(line)
    n_tokens = len(tokens.token_id)
    require_room(config.out, settings, n_tokens, rolling and rolling.size)
    chunk, shard = settings.chunk_and_shard(n_tokens)
    provenance = make_provenance(settings, sources, mixture, record, model.architecture)
    if rolling:
        shard, ring = cut(n_tokens, rolling.aside(tokens), rolling, chunk, shard)
        provenance["ring"] = ring._asdict()
    if config.mask_norm:
        batch_tokens = settings.batch_size * settings.packing.context_length
        keep, medians = mask_by_norm(BatchRunner(model, settings), tokens, config.mask_norm, batch_tokens)
        n_kept, masked = int(tokens.keep.sum()), int((tokens.keep & ~keep).sum())
        _say(f"--mask-norm {config.mask_norm:g}: {masked:,} of {n_kept:,} tokens will not be trained on or analysed")
        provenance["mask_norm"] = {"medians": medians, "masked": masked}
        tokens = tokens._replace(keep=keep)
    _warn_of_little_text(tokens, config.max_tokens, settings.packing.context_length)
    meta = StoreMeta(
        n_tokens=n_tokens,
        layers=settings.layers,
        n_model_layers=settings.n_model_layers,
        d_model=settings.d_model,
        stored_dtype=settings.store_dtype,
        codec=config.storage.codec,
        chunk_tokens=chunk,
        shard_tokens=shard,
        context_length=settings.packing.context_length,
        lens=settings.lens.describe() if settings.lens else None,
        provenance=provenance,
        config_hash=config_hash({**record, "tokens": _table_hash(tokens)}),
    )
    if is_store(config.out):
        remove_store(config.out)
    return ActivationStore.create(config.out, meta, tokens)


def _warn_of_little_text(tokens: TokenTable, max_tokens: int, context_length: int) -> None:
    n_tokens = len(tokens.token_id)
    if not tokens.keep.any():
        _say(
            f"warning: none of the {n_tokens:,} tokens will be trained on or analysed: each is a special token or the"
            " first of its sequence; give more text, or --keep-first-position"
        )
    if max_tokens - n_tokens >= context_length:
        _say(f"the text ran out: {n_tokens:,} tokens instead of {max_tokens:,}")


def _table_hash(tokens: TokenTable) -> str:
    digest = xxhash.xxh3_128()
    for column in tokens:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def _say(note: str) -> None:
    print(note, file=sys.stderr)
