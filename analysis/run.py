"""One analysis, from options to files: check, sum over shards, fit PCA, look at latents, run the model, write."""

import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis import jobs
from analysis.config import AnalyzeConfig
from analysis.encoder import kept_places
from analysis.inputs import Inputs, TaskSpec, open_data, open_inputs, opened_here
from analysis.latents.redundancy import find_redundancy
from analysis.latents.table import latent_table
from analysis.latents.views import view_latents
from analysis.model.findings import find_model, run_model
from analysis.model.transformer import spec_of_store
from analysis.quality import ratio, sum_in_order
from analysis.report.page import write_report
from analysis.results.folder import FILES, REPORT, SUMMARY, may_be_replaced
from analysis.results.summary import Baseline, Findings
from analysis.results.write import tell, write_results
from analysis.selection import Selection
from analysis.task import VALIDATION, Sums, measure, pca_error
from analysis.tiles import codes_folder, shards_with
from analysis.uncertainty import NO_INTERVALS, all_intervals
from harvest.model.load import load_tokenizer
from residscope.destinations import together
from residscope.errors import ResidscopeError, UsageError
from store.activations import ActivationStore
from store.care.outliers import few_tokens
from store.folder import refuse_inside_store
from train.model import sae_hash


def analyze(config: AnalyzeConfig, inputs: Inputs | None = None) -> dict[str, Any]:
    """Run an analysis, write its files to `config.out_dir`, print a summary, and return what summary.json holds.

    inputs: what `open_inputs` returned, if already open. Raises `ResidscopeError` or a subclass for what a user can
    fix: a missing, damaged or mismatched store or checkpoint, nothing to analyse, no scheduler, a full disk.
    """
    started, workers = time.monotonic(), config.workers
    for path, flag in ((config.out_dir, "--out"), (workers.performance_report, "--performance-report")):
        if path is not None:
            refuse_inside_store(path, flag)
    report = workers.performance_report
    if report and (report.name in FILES or (report.exists() and report.suffix != ".html")):
        raise UsageError(f"--performance-report {report} exists, or is the name of a results file: choose another")
    inputs = inputs or open_inputs(config.store, config.sae)
    selection = inputs.select(config.tokens)
    store, model_path = inputs.store, config.transformer.model
    few = few_tokens(
        store,
        selection.analysed,
        lambda ids: load_tokenizer(spec_of_store(store, model_path, offline=True)).text(ids),
        inputs.layers,
    )
    if few:
        inputs = replace(inputs, notes=[*inputs.notes, f"{few.words}."])
    found_model = find_model(config.transformer, inputs.store)
    with together(config.out_dir, FILES, [SUMMARY], replace=may_be_replaced(config)) as folder:
        spec = replace(task_spec(config, inputs, selection, folder), few=few.tokens if few else ())
        shards = shards_with(inputs.store, selection.needed(spec.pca))
        with (
            opened_here(spec, inputs, selection),
            ExitStack() as cleanup,
            jobs.open_pool(workers.scheduler, workers.n_workers, len(shards), workers.performance_report) as pool,
        ):
            if spec.codes_folder:  # Errors are ignored because a task that is being stopped may still add a file.
                cleanup.callback(shutil.rmtree, spec.codes_folder, ignore_errors=True)
            if spec.save_latents:
                _make_codes(spec, inputs.store)
            sums = jobs.run(pool, "encode", measure, (spec,), Sums.merged, shards)
            baseline = _pca_baseline(spec, inputs, selection, sums, pool) if sums.pca else None
            table = latent_table(sums.moments)
            redundancy = None
            if config.latents.redundancy:
                redundancy = find_redundancy(inputs.sae.W_dec, table.probs, config.latents.redundancy_cosine)
            views = None
            if config.latents.examples:
                views = view_latents(spec, inputs, selection, table, config.transformer.model, folder)
        live, pca = np.flatnonzero(table.n_fired), baseline and baseline.sae
        model = run_model(config, found_model, inputs, selection, live, folder, pca)
        intervals = all_intervals(sums.moments, sums.analysed) if config.statistics.intervals else NO_INTERVALS
        findings = Findings(
            config=config,
            inputs=inputs,
            selection=selection,
            sums=sums,
            intervals=intervals,
            baseline=baseline,
            table=table,
            redundancy=redundancy,
            views=views,
            model=model,
            few=few.words if few else None,
            seconds=time.monotonic() - started,
        )
        summary = write_results(findings, folder)
        failed = None
        try:
            if config.output.report:
                write_report(folder)
        except Exception as error:  # The numbers are kept even if their report fails.
            (folder / REPORT).unlink(missing_ok=True)
            failed = error
    if failed:
        raise failed
    tell(config, summary)
    return summary


def task_spec(config: AnalyzeConfig, inputs: Inputs, selection: Selection, folder: Path | None) -> TaskSpec:
    """What the tasks need to know. folder: where codes may be kept during the analysis; None: nowhere."""
    split = inputs.validation if selection.held_out.any() else None
    places = kept_places(inputs.sae.config)
    return TaskSpec(
        store=str(config.store.resolve()),
        content_hash=inputs.store.content_hash,
        sae=str(config.sae.resolve() if config.sae.exists() else config.sae),
        sae_hash=sae_hash(inputs.sae),
        layers=inputs.layers,
        tokens=config.tokens,
        statistics=config.statistics,
        validation=tuple((name, split[name]) for name in ("fraction", "seed")) if split else (),
        pca=config.statistics.pca and bool(selection.fit.any()),
        save_latents=config.latents.save_latents,
        codes_folder=folder and codes_folder(folder, config, selection.n_analysed, len(inputs.layers), places),
    )


def _make_codes(spec: TaskSpec, store: ActivationStore) -> None:
    """Make the arrays for codes before any task runs, so that a read-only store is reported at once."""
    try:
        open_data(spec)
    except OSError as error:
        problem = f"cannot write to {store.path} ({error.strerror})"
        raise ResidscopeError(f"--save-latents: {problem}: leave the flag out, or copy the store") from None


def _pca_baseline(spec: TaskSpec, inputs: Inputs, selection: Selection, sums: Sums, pool: jobs.Pool) -> Baseline:
    """PCA with as many components as the autoencoder has active latents, on the validation tokens."""
    assert sums.pca is not None
    components = sums.pca.fit(max(1, round(float(sums.analysed.l0.mean()))))
    shards = shards_with(inputs.store, selection.validation)
    errors = jobs.run(pool, "pca", pca_error, (spec, components), sum_in_order, shards)
    return Baseline(
        sae=components.autoencoder() if inputs.sae.config.standardize == "vector" else None,
        k=len(components.directions),
        n_train_vectors=sums.pca.n,
        n_validation_vectors=int(sums.quality.n_tokens[VALIDATION]) * len(inputs.layers),
        fvu=ratio(errors, sums.quality.spread(VALIDATION)),
    )
