"""One analysis, from options to files: check, sum over shards, fit and evaluate the baseline, write.

Results are made in a folder of their own inside the output folder and moved into place when all are there, summary.json
last: a folder without summary.json holds no whole analysis. Not here: what the numbers mean (`analysis.moments`,
`analysis.quality`), how they are said (`analysis.words`), how they are drawn (`analysis.report.page`).
"""

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import jobs, spilled_codes, tables
from analysis.baselines import pca
from analysis.config import AnalyzeConfig
from analysis.encoder import doubts, kept_places, layers_of_store, load_encoder
from analysis.latents import views as latent_views
from analysis.latents.redundancy import find_redundancy
from analysis.model import parts as with_model
from analysis.moments import latent_table
from analysis.parts import Context, Part
from analysis.quality import ratio
from analysis.selection import held_out_documents, select
from analysis.summary import Baseline, Findings, build
from analysis.task import ANALYSED, VALIDATION, Sums, Work, add_errors, measure, open_codes, pca_error
from analysis.uncertainty import persistence_intervals, reconstruction_intervals, variance_intervals
from analysis.words import words
from residscope.errors import ResidscopeError, UsageError
from residscope.options import to_toml
from store.activations import ActivationStore
from store.files import held_alone
from store.outputs import refuse_inside_store
from train.checkpoint import Checkpoint
from train.formats.files import read_sae

SUMMARY, LATENTS, LAYERS, CONFIG = "summary.json", "latents.parquet", "layers.parquet", "analyze.config.toml"
REDUNDANCY = "redundancy.parquet"
LATENT_LOGITS = with_model.LATENT_LOGITS

PARTS: tuple[Part, ...] = (latent_views.PART,)
"""Optional parts, in the order in which they run and stand in summary.json."""

_FIGURES = ("layer_profile", "variance", "reconstruction", "downstream")
_DRAWN = ("report.html", *(f"{name}.{kind}" for name in _FIGURES for kind in ("png", "svg")))
"""What `analysis.report.page` may write beside them."""


def analyze(config: AnalyzeConfig) -> dict[str, Any]:
    """Run an analysis, write its files to `config.out_dir`, print its words, and return summary.json's content.

    Raises `ResidscopeError` or a subclass for what a user can act on: no such or broken store or checkpoint, one that
    does not fit the other, nothing to analyse, a scheduler that does not answer, a folder that cannot be written.
    """
    started = time.monotonic()
    for path, flag in ((config.out_dir, "--out"), (config.performance_report, "--performance-report")):
        if path is not None:
            refuse_inside_store(path, flag)
    store = ActivationStore.open(config.store)
    sae, origin = read_sae(config.sae)
    checkpoint = Checkpoint(config=sae.config, sae=sae, store=origin.store, trainer=origin.trainer)
    layers = layers_of_store(checkpoint, store, config.sae)
    same_store = checkpoint.store.get("content_hash") == store.content_hash
    split = checkpoint.store.get("validation")
    held_out = held_out_documents(store.tokens, split, same_store=same_store)
    selection = select(
        store.tokens, held_out, config.split, max_tokens=config.max_tokens, n_latents=checkpoint.config.n_latents
    )
    found_model = with_model.find_model(config, store)
    with _partial_dir(config.out_dir) as partial_dir:
        work = Work(
            store=str(config.store.resolve()),
            content_hash=store.content_hash,
            sae=str(config.sae.resolve() if config.sae.exists() else config.sae),
            layers=layers,
            dtype=config.dtype,
            split=config.split,
            max_tokens=config.max_tokens,
            validation=(split["fraction"], split["seed"], len(held_out)) if split and held_out.any() else None,
            same_store=same_store,
            baseline=config.pca and bool(selection.fit.any()),
            nulls=config.nulls,
            seed=config.seed,
            save_latents=config.save_latents,
            spill=spilled_codes.folder_for(
                partial_dir, config, selection.n_analysed, len(layers), kept_places(sae.config)
            ),
        )
        if config.save_latents:
            _make_codes(work, store)
        needed = selection.needed if work.baseline else selection.analysed | selection.validation
        shards = _shards_with(store, needed)
        with (
            spilled_codes.lasting(work.spill),
            jobs.open_pool(config.scheduler, config.n_workers, len(shards), config.performance_report) as pool,
        ):
            sums = jobs.run(_shard_sum("encode", measure, (work,), Sums.merged, store, needed), pool)
            baseline = None
            if sums.gram is not None:
                measured = max(1, round(float(sums.quality.result(ANALYSED).l0.mean())))
                # k is 0 where it is not known of a foreign autoencoder.
                components = pca.fit(sums.gram, checkpoint.config.k or measured)
                total = _shard_sum("pca", pca_error, (work, components), add_errors, store, selection.validation)
                spread = sums.quality.spread(VALIDATION)
                baseline = Baseline(
                    k=len(components.directions),
                    n_train_vectors=int(sums.gram.n),
                    n_validation_vectors=int(sums.quality.n_tokens[VALIDATION]) * len(layers),
                    fvu=ratio(jobs.run(total, pool), spread),
                )
            table, analysed = latent_table(sums.moments), sums.quality.result(ANALYSED)
            redundancy = (
                find_redundancy(sae.W_dec, table.probs, config.redundancy_cosine) if config.redundancy else None
            )
            context = Context(
                config=config,
                store=store,
                checkpoint=checkpoint,
                work=work,
                selection=selection,
                pool=pool,
                moments=sums.moments,
                table=table,
                redundancy=redundancy,
                folder=partial_dir,
            )
            parts = {part.name: part.make(context) if part.wanted(config) else None for part in PARTS}

        live = np.flatnonzero(table.n_fired)
        model = with_model.run_model(config, found_model, store, sae, layers, selection, live, partial_dir)
        found = Findings(
            config=config,
            store=store,
            checkpoint=checkpoint,
            selection=selection,
            held_out=held_out,
            same_store=same_store,
            doubts=[*doubts(checkpoint, store), *origin.notes],
            moments=sums.moments,
            analysed=analysed,
            validation=sums.quality.result(VALIDATION) if selection.validation.any() else None,
            baseline=baseline,
            intervals=variance_intervals(sums.moments) if config.intervals else {},
            persistence_intervals=persistence_intervals(sums.moments) if config.intervals else {},
            reconstruction_intervals=reconstruction_intervals(sums.by_group, analysed, sae.config.d_model)
            if config.intervals
            else None,
            nulls=sums.nulls,
            model=model,
            table=table,
            redundancy=redundancy,
            parts=parts,
            seconds=time.monotonic() - started,
        )
        summary = build(found)
        tables.write_latents(partial_dir / LATENTS, sums.moments, table, redundancy, context.columns)
        if found.redundancy:
            tables.write_redundancy(partial_dir / REDUNDANCY, found.redundancy, table)
        tables.write_layers(partial_dir / LAYERS, summary["layers"])
        (partial_dir / SUMMARY).write_text(json.dumps(summary, indent=2, allow_nan=False), encoding="utf-8")
        (partial_dir / CONFIG).write_text(to_toml(asdict(config)), encoding="utf-8")
        say = partial(print, file=sys.stderr) if config.json else print
        missing = _write_report(partial_dir) if config.report else None
        _move_into_place(partial_dir, config.out_dir)
        say(words(summary))
        if missing:
            say(missing)
        written = sorted(path.name for path in config.out_dir.iterdir() if path.name in _ours())
        say(f"Written to {config.out_dir}: {', '.join(written)}.")
        if config.json:
            print(json.dumps(summary, allow_nan=False))
        return summary


def _ours() -> set[str]:
    """Names of all files that an analysis may write."""
    of_prompts = {"prompt.json", "prompt.parquet"}  # `analysis.prompt.run` adds them to an analysis
    always = {*of_prompts, *_DRAWN, CONFIG, LATENT_LOGITS, LATENTS, LAYERS, REDUNDANCY, SUMMARY}
    return always | {name for part in PARTS for name in part.files}


def _make_codes(work: Work, store: ActivationStore) -> None:
    """Make the arrays for codes before any task asks for them, so that a store that cannot be written is said at
    once."""
    try:
        open_codes(work, store, load_encoder(Path(work.sae), work.dtype))
    except OSError as error:
        raise ResidscopeError(
            f"--save-latents: {store.path} cannot be written ({error.strerror}): leave the flag out, or copy the store"
        ) from None


def _shards_with(store: ActivationStore, needed: NDArray[np.bool_]) -> tuple[int, ...]:
    """Shards that hold a needed token."""
    bounds = (store.meta.shard_bounds(shard) for shard in range(store.meta.n_shards))
    return tuple(shard for shard, (start, stop) in enumerate(bounds) if needed[start:stop].any())


def _shard_sum(
    name: str, task: Any, arguments: Any, merge: Any, store: ActivationStore, needed: NDArray[np.bool_]
) -> Any:
    shards = _shards_with(store, needed)
    tokens = tuple(int(needed[slice(*store.meta.shard_bounds(shard))].sum()) for shard in shards)
    return jobs.ShardSum(name=name, task=task, arguments=arguments, merge=merge, shards=shards, tokens=tokens)


@contextmanager
def _partial_dir(out: Path) -> Iterator[Path]:
    """An empty folder inside `out` to make results in, held alone; made before the work, so that a folder that cannot
    be written stops the run at once."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} should be a folder, found a file: choose another name")
    folder = out / ".partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"--out {out}: a part of this path is a file, not a folder: choose another") from None
    with held_alone(folder, out):
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # Of the several libraries that write here most do not say where.
            raise OSError(error.errno, os.strerror(error.errno), error.filename or str(out)) from error


def _write_report(folder: Path) -> str | None:
    """Figures and report.html; the reason if there are none."""
    try:
        from analysis.report.page import write_report

        write_report(folder)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return "No figures, no report.html: they need matplotlib; get the plots extra: pip install 'residscope[plots]'."
    return None


def _move_into_place(partial_dir: Path, out: Path) -> None:
    """Replace what an earlier analysis left by what this one made, summary.json first away and last back."""
    (out / SUMMARY).unlink(missing_ok=True)
    for name in _ours():
        if not (partial_dir / name).exists():
            (out / name).unlink(missing_ok=True)
    for path in sorted(partial_dir.iterdir(), key=lambda path: path.name == SUMMARY):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(out / path.name)
    shutil.rmtree(partial_dir)
