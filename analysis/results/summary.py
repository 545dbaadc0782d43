"""summary.json: the numbers that were found, in a schema that other programs read (docs/outputs.md).

Only means over layers are computed here; a number that is not defined is null.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.baselines.nulls import null_numbers
from analysis.config import AnalyzeConfig
from analysis.inputs import Inputs
from analysis.latents.redundancy import MAX_OVERLAP, Redundancy
from analysis.latents.table import KINDS, LatentTable
from analysis.latents.views import LatentViews
from analysis.model.downstream_numbers import layer_columns
from analysis.model.findings import ModelFindings
from analysis.moments import variance_numbers
from analysis.persistence import distributions, persistence_summary
from analysis.quality import QualityResult, defined
from analysis.reference import mlsae_compat
from analysis.selection import Selection
from analysis.task import VALIDATION, WITHOUT_FEW, Sums
from analysis.uncertainty import METHOD, MIN_INTERVAL_GROUPS, Interval, Intervals, SumIntervals
from residscope.console import counted
from residscope.errors import IncompatibleError
from residscope.names import versions
from residscope.reading import read_json, reading
from store.meta import config_hash
from train.checkpoint import Checkpoint
from train.hardware import resolve_device
from train.model import MLSAE, sae_hash
from train.reporting.convergence import in_words, is_curve, last_quarter

SCHEMA_VERSION = 1
_AGAIN = "run `analyze` again"
HASH = "content_hash"
"""The key of `content_hash`'s result."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The PCA baseline's result."""

    k: int
    n_train_vectors: int
    n_validation_vectors: int
    fvu: NDArray[np.float64]
    """[L] on the validation vectors."""
    sae: MLSAE | None
    """The same as an autoencoder; None unless each vector is standardised by its own mean and deviation."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All results of an analysis; None for what was not requested or could not be computed."""

    config: AnalyzeConfig
    inputs: Inputs
    selection: Selection
    sums: Sums
    intervals: SumIntervals
    baseline: Baseline | None
    table: LatentTable
    redundancy: Redundancy | None
    views: LatentViews | None
    model: ModelFindings
    few: str | None  # describes the few tokens that carry much of a layer's variance
    seconds: float

    @property
    def validation(self) -> QualityResult | None:
        """Quality on the held-out documents; None if there are none."""
        return self.sums.quality.result(VALIDATION) if self.selection.validation.any() else None

    @property
    def without_few(self) -> QualityResult | None:
        """Quality on the analysed tokens without the outlier tokens; None if there are no such tokens."""
        quality = self.sums.quality
        return quality.result(WITHOUT_FEW) if len(quality.n_tokens) > WITHOUT_FEW else None


def build(found: Findings) -> dict[str, Any]:
    """summary.json: plain JSON values, None where a number is not defined."""
    moments = found.sums.moments
    fired = moments.counts.any(axis=1)
    split, warnings = describe_split(found)
    variance, persistence = _variance(found), _persistence(found)
    summary = {
        "schema_version": SCHEMA_VERSION,
        "provenance": _provenance(found),
        "split": split,
        "warnings": warnings,
        "n_tokens": int(moments.n_tokens.sum()),
        "n_layers": len(moments.layers),
        "n_latents": moments.n_latents,
        "layer_numbers": moments.layers.tolist(),
        "latents": {"active": int(fired.sum()), "dead": int((~fired).sum())},
        "reconstruction": _reconstruction(found),
        "layers": layer_rows(found),
        "variance": variance,
        "convergence": _convergence(found.inputs.checkpoint),
        "persistence": persistence,
        "nulls": _nulls(found, variance, persistence) if found.sums.nulls else None,
        "profiles": _profiles(found.table),
        "redundancy": _redundancy(found.redundancy),
        "uncertainty": {
            "method": METHOD,
            "n_groups": len(moments.groups),
            "n_documents": found.selection.n_documents,
            "n_replicates": len(moments.groups),
        }
        if found.intervals.variance
        else None,
        **found.model.summary(),
        "validation_fvu": defined(found.validation.fvu.mean()) if found.validation else None,
        "validation": _validation(found),
        "baseline": {"pca": _pca(found.baseline)},
        "examples": found.views.summary if found.views else None,
        "seconds": found.seconds,
    }
    return {**summary, HASH: content_hash(summary)}


def read_summary(file: Path) -> dict[str, Any]:
    """The content of a summary.json written by this version's `analyze`; `IncompatibleError` for any other."""
    summary = read_json(file, _AGAIN)
    if (version := version_of(summary)) != SCHEMA_VERSION:
        raise IncompatibleError(f"{file}: schema_version is {version}, expected {SCHEMA_VERSION}: {_AGAIN}")
    if HASH not in summary:
        print(f"note: {file}: written by an earlier version, without a content_hash to check", file=sys.stderr)
        return summary
    with reading(f"{file}: damaged", _AGAIN):  # a NaN would not be valid JSON
        if summary[HASH] != content_hash(summary):
            raise ValueError("changed after `analyze` wrote it")
    return summary


def version_of(summary: Any) -> Any:
    """The `schema_version` of a summary.json's content; None if it has none."""
    return summary.get("schema_version") if isinstance(summary, dict) else None


def content_hash(summary: Mapping[str, Any]) -> str:
    """XXH3-128 of a summary without the hash itself and all `seconds`, which differ even between equal results."""
    text = json.dumps({key: value for key, value in summary.items() if key != HASH})
    return config_hash(json.loads(text, object_hook=lambda part: {k: v for k, v in part.items() if k != "seconds"}))


def _convergence(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How settled the numbers are, from the training's curve; None if the checkpoint has no curve."""
    curve = checkpoint.trainer.get("curve")
    moved = last_quarter(curve) if is_curve(curve) else None
    return None if moved is None else {"last_quarter": moved, "text": in_words(moved), "curve": curve}


def _reconstruction(found: Findings) -> dict[str, Any]:
    result: dict[str, Any] = {n: defined(getattr(found.sums.analysed, n).mean()) for n in ("fvu", "mse", "l0")}
    result["fvu_without_few"] = found.without_few and defined(found.without_few.fvu.mean())
    result["few_tokens"] = found.few
    return {**result, "ci95": _plain(found.intervals.reconstruction)}


def layer_rows(found: Findings) -> list[dict[str, Any]]:
    """One row for each layer, the columns of layers.parquet."""
    moments, quality = found.sums.moments, found.sums.analysed
    mass = moments.totals.sum(axis=0)
    share = np.divide(mass, mass.sum(), out=np.zeros_like(mass), where=mass.sum() > 0)
    active = (moments.counts > 0).sum(axis=0)
    downstream = layer_columns(found.model.downstream, found.model.intervals, len(moments.layers))
    by_layer = [i or (None, None) for i in found.intervals.fvu_by_layer or [None] * len(moments.layers)]
    return [
        {
            "layer": int(layer),
            **{name: defined(getattr(quality, name)[i]) for name in QualityResult._fields[2:]},
            "n_vectors": quality.n_tokens,
            "active_latents": int(active[i]),
            "mass_share": float(share[i]),
            "validation_fvu": defined(found.validation.fvu[i]) if found.validation else None,
            "pca_fvu": defined(found.baseline.fvu[i]) if found.baseline else None,
            "fvu_without_few": found.without_few and defined(found.without_few.fvu[i]),
            "fvu_low": by_layer[i][0],
            "fvu_high": by_layer[i][1],
            **downstream[i],
        }
        for i, layer in enumerate(moments.layers)
    ]


def describe_split(found: Findings) -> tuple[dict[str, Any], list[str]]:
    """Which tokens were analysed, and the warnings about them."""
    inputs, selection, split = found.inputs, found.selection, found.config.tokens.split
    n, held_out = selection.n_analysed, selection.held_out
    n_held_out = int((selection.analysed & held_out[inputs.store.tokens.document]).sum())
    if not inputs.same_store:
        trained_on, fate = "unknown", "this is not the store that the autoencoder was trained on"
    elif n_held_out == n:
        trained_on, fate = "none", "all held out from training"
    elif n_held_out:
        trained_on, fate = "some", f"{n - n_held_out:,} of them from documents that the autoencoder was trained on"
    else:
        trained_on, fate = "all", "from documents that the autoencoder was trained on"
    whose = {"all": "store", "train": "training documents", "validation": "validation documents"}[split]
    limit = found.config.tokens.max_tokens
    which = f"the first {limit:,} kept tokens of the {whose}" if limit == n else f"every kept token of the {whose}"
    warnings = [*inputs.notes]
    if trained_on in ("some", "all"):
        share = 100 * (n - n_held_out) / n
        shown = "All" if share == 100 else f"{share:.0f} %"
        one = "harvest several documents" if len(held_out) == 1 else "train with --validation-fraction above 0"
        way_out = "use `--split validation`" if held_out.any() else one
        warnings.append(f"{shown} of these tokens are from training documents: {way_out} for held-out numbers.")
    if trained_on == "unknown":
        warnings.append("The autoencoder was not trained on this store, but perhaps on the same text.")
    if not inputs.checkpoint.trainer.get("finished", True):
        warnings.append(f"Training has not finished: this is step {inputs.checkpoint.trainer.get('step')}.")
    if not found.intervals.variance and found.config.statistics.intervals:
        warnings.append(
            f"No 95 % intervals: at least {MIN_INTERVAL_GROUPS} groups of documents of similar size are needed, found "
            f"{counted(selection.n_documents, 'document')} in {counted(selection.n_groups, 'group')}."
        )
    return {
        "name": split,
        "n_tokens": n,
        "n_documents": selection.n_documents,
        "n_validation_tokens": n_held_out,
        "trained_on": trained_on,
        "text": f"{n:,} tokens of {counted(selection.n_documents, 'document')}: {which}; {fate}.",
    }, warnings


def _provenance(found: Findings) -> dict[str, Any]:
    store, config, checkpoint = found.inputs.store, found.config, found.inputs.checkpoint
    meta, sae = store.meta, checkpoint.config
    origin = {name: meta.provenance.get(name) for name in ("model", "architecture", "random_init", "dataset")}
    return {
        "store": {
            "name": store.path.name,
            "content_hash": store.content_hash,
            "config_hash": meta.config_hash,
            **origin,
            "revision": meta.provenance.get("model_revision"),
            **{name: getattr(meta, name) for name in ("context_length", "lens", "stored_dtype", "n_tokens")},
            "layers": list(meta.layers),
        },
        "sae": {
            "name": config.sae.name,
            "hash": sae_hash(checkpoint.sae),
            **{name: getattr(sae, name) for name in ("n_latents", "activation", "d_model")},
            "k": sae.active or None,
            "seed": (checkpoint.trainer.get("config") or {}).get("seed"),
            "expansion_factor": sae.n_latents / sae.d_model,
            "trained_tokens": trained_tokens(checkpoint),
            "store_content_hash": checkpoint.store.get("content_hash"),
        },
        "analysis": {
            "dtype": config.statistics.dtype,
            "device": resolve_device(config.statistics.device).type,
            "split": config.tokens.split,
            "max_tokens": config.tokens.max_tokens,
            "seed": config.statistics.seed,
            "versions": versions("residscope", "torch", "numpy", "numba", "dask"),
        },
    }


def trained_tokens(checkpoint: Checkpoint) -> int | None:
    """Tokens trained on, including repeats; None if the checkpoint does not say."""
    trainer, plan = checkpoint.trainer, checkpoint.trainer.get("config") or {}
    step, batch, layers = trainer.get("step"), plan.get("batch_size"), plan.get("layers")
    if not (step and batch and layers):
        return None
    if trainer.get("vectors"):  # this run's own: for one of a --per-layer set, only its layer's
        return trainer["vectors"] // len(layers)
    streamed = plan.get("stream_layers") or layers
    return min(step * batch, plan.get("vectors", step * batch)) // len(streamed)


def _variance(found: Findings) -> dict[str, Any]:
    result: dict[str, Any] = variance_numbers(found.sums.moments.pooled())
    _add_intervals(result, found.intervals.variance)
    return {**result, "mlsae_compat": mlsae_compat(found.sums.moments)}


def _persistence(found: Findings) -> dict[str, Any]:
    moments = found.sums.moments
    result = persistence_summary(moments)
    _add_intervals(result, found.intervals.persistence)
    for weighting, shares in distributions(moments).items():
        result[weighting]["distributions"] = shares
    return {"n_pairs": int(moments.pooled()[4].sum()), **result}


def _add_intervals(numbers: dict[str, dict[str, Any]], intervals: Intervals) -> None:
    """Add the 95 % intervals, where there are any, to the numbers of each weighting."""
    for weighting, row in numbers.items():
        row["ci95"] = _plain(intervals.get(weighting, {}))


def _plain(intervals: Mapping[str, Interval | None]) -> dict[str, list[float] | None]:
    return {name: list(interval) if interval else None for name, interval in intervals.items()}


def _nulls(found: Findings, variance: dict[str, Any], persistence: dict[str, Any]) -> dict[str, Any]:
    return {
        "seed": found.config.statistics.seed,
        "chunk_tokens": found.inputs.store.meta.chunk_tokens,
        **{name: null_numbers(variance, persistence, null) for name, null in found.sums.nulls.items()},
    }


def _profiles(table: LatentTable) -> dict[str, dict[str, float]]:
    kinds = np.array(table.kinds, dtype=object)
    total = table.total.sum()
    return {
        kind: {
            "latents": int((kinds == kind).sum()),
            "mass_share": float(table.total[kinds == kind].sum() / total) if total > 0 else 0.0,
        }
        for kind in KINDS
    }


def _redundancy(found: Redundancy | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "mmcs": defined(found.mmcs),
        "cosine_threshold": found.threshold,
        "overlap_threshold": MAX_OVERLAP,
        "parallel_pairs": found.n_parallel,
        "redundant_pairs": found.n_redundant,
        "redundant_latents": found.n_redundant_latents,
    }


def _validation(found: Findings) -> dict[str, Any] | None:
    if not found.validation:
        return None
    n_documents = len(np.unique(found.inputs.store.tokens.document[found.selection.validation]))
    return {"n_tokens": found.validation.n_tokens, "n_documents": n_documents, **_fvu(found.validation.fvu)}


def _fvu(by_layer: NDArray[np.float64]) -> dict[str, Any]:
    return {"fvu": defined(by_layer.mean()), "fvu_per_layer": [defined(fvu) for fvu in by_layer]}


def _pca(baseline: Baseline | None) -> dict[str, Any] | None:
    if baseline is None:
        return None
    return {
        "k": baseline.k,
        **_fvu(baseline.fvu),
        "n_train_vectors": baseline.n_train_vectors,
        "n_validation_vectors": baseline.n_validation_vectors,
    }
