"""summary.json: what was found, in numbers, in the schema that others read.

Nothing is computed here but means over layers; a number that is not defined is null. Not here: the words on the
terminal (`analysis.words`), the tables (`analysis.tables`).
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.baselines.nulls import null_numbers
from analysis.config import AnalyzeConfig
from analysis.encoder import weights_hash
from analysis.latents.profiles import KINDS, profile_kinds
from analysis.latents.redundancy import MAX_OVERLAP, Redundancy
from analysis.model.downstream_summary import layer_columns
from analysis.model.parts import ModelFindings
from analysis.model.parts import summary_of as model_summary
from analysis.moments import VARIANCE_NAMES, WEIGHTINGS, LatentTable, LayerMoments, mlsae_compat, variances
from analysis.persistence import PAIR_WEIGHTINGS, distributions, persistence_numbers
from analysis.quality import QualityResult
from analysis.selection import Selection
from analysis.uncertainty import METHOD, MIN_INTERVAL_GROUPS, Interval, ReconstructionIntervals
from residscope.console import counted
from store.activations import ActivationStore
from train.checkpoint import Checkpoint

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The PCA baseline, as evaluated."""

    k: int
    n_train_vectors: int
    n_validation_vectors: int
    fvu: NDArray[np.float64]
    """[L] on the validation vectors."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that an analysis found."""

    config: AnalyzeConfig
    store: ActivationStore
    checkpoint: Checkpoint
    selection: Selection
    held_out: NDArray[np.bool_]
    """[n_documents]"""

    same_store: bool
    """Whether the autoencoder was trained on this very store."""

    doubts: Sequence[str]
    """What a user must know of how checkpoint and store fit: sentences."""

    moments: LayerMoments
    analysed: QualityResult
    validation: QualityResult | None
    """On the held-out documents; None if there are none."""

    baseline: Baseline | None
    intervals: Mapping[str, Mapping[str, Interval | None]]
    persistence_intervals: Mapping[str, Mapping[str, Interval | None]]
    reconstruction_intervals: ReconstructionIntervals | None
    nulls: Mapping[str, LayerMoments]
    """By name; empty if they were not asked for."""

    model: ModelFindings
    """What the transformer told."""

    table: LatentTable
    redundancy: Redundancy | None
    """None if it was not asked for."""

    parts: Mapping[str, Any]
    """By key, what the optional parts (`analysis.parts`) found; None for those not asked for."""

    seconds: float


def build(found: Findings) -> dict[str, Any]:
    """summary.json: plain JSON values, None where a number is not defined."""
    moments, config = found.moments, found.config
    fired = moments.counts.any(axis=1)
    split, warnings = describe_split(found)
    variance, persistence = _variance(found), _persistence(found)
    return {
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
        "persistence": persistence,
        "nulls": {
            "seed": config.seed,
            "chunk_tokens": found.store.meta.chunk_tokens,
            **{name: null_numbers(variance, persistence, null) for name, null in found.nulls.items()},
        }
        if found.nulls
        else None,
        "profiles": _profiles(found.table),
        "redundancy": _redundancy(found.redundancy),
        "uncertainty": {
            "method": METHOD,
            "n_groups": len(moments.groups),
            "n_documents": found.selection.n_documents,
            "n_replicates": len(moments.groups),
        }
        if found.intervals
        else None,
        **model_summary(found.model),
        "validation_fvu": _number(found.validation.fvu.mean()) if found.validation else None,
        "validation": _validation(found),
        "baseline": {"pca": _pca(found.baseline)},
        **found.parts,
        "seconds": found.seconds,
    }


def _reconstruction(found: Findings) -> dict[str, Any]:
    names = ("fvu", "mse", "l0")
    result: dict[str, Any] = {name: _number(getattr(found.analysed, name).mean()) for name in names}
    bounds = {name: getattr(found.reconstruction_intervals, name, None) for name in names}
    result["ci95"] = (
        {name: list(i) if i else None for name, i in bounds.items()} if found.reconstruction_intervals else {}
    )
    return result


def layer_rows(found: Findings) -> list[dict[str, Any]]:
    """One row for each layer, the columns of layers.parquet."""
    moments, quality = found.moments, found.analysed
    mass = moments.totals.sum(axis=0)
    share = np.divide(mass, mass.sum(), out=np.zeros_like(mass), where=mass.sum() > 0)
    active = (moments.counts > 0).sum(axis=0)
    intervals = found.reconstruction_intervals
    downstream = layer_columns(found.model.downstream, found.model.intervals, len(moments.layers))
    by_layer = [i or (None, None) for i in (intervals.fvu_by_layer if intervals else [None] * len(moments.layers))]
    return [
        {
            "layer": int(layer),
            "fvu": _number(quality.fvu[i]),
            "mse": _number(quality.mse[i]),
            "l0": _number(quality.l0[i]),
            "mean_norm": _number(quality.mean_norm[i]),
            "cosine_to_next": _number(quality.cosine_to_next[i]),
            "n_vectors": quality.n_tokens,
            "active_latents": int(active[i]),
            "mass_share": float(share[i]),
            "validation_fvu": _number(found.validation.fvu[i]) if found.validation else None,
            "pca_fvu": _number(found.baseline.fvu[i]) if found.baseline else None,
            "fvu_low": by_layer[i][0],
            "fvu_high": by_layer[i][1],
            **downstream[i],
        }
        for i, layer in enumerate(moments.layers)
    ]


def describe_split(found: Findings) -> tuple[dict[str, Any], list[str]]:
    """Which tokens the numbers speak of, and what to be wary of."""
    tokens, selection, split = found.store.tokens, found.selection, found.config.split
    n = selection.n_analysed
    n_held_out = int((selection.analysed & found.held_out[tokens.document]).sum())
    if not found.same_store:
        trained_on, fate = "unknown", "this is not the store that the autoencoder was trained on"
    elif n_held_out == n:
        trained_on, fate = "none", "all held out from training"
    elif n_held_out:
        trained_on, fate = "some", f"{n - n_held_out:,} of them are of documents that the autoencoder was trained on"
    else:
        trained_on, fate = "all", "of documents that the autoencoder was trained on"
    whose = {"all": "of the store", "train": "of the training documents", "validation": "of the validation documents"}[
        split
    ]
    limit = found.config.max_tokens
    which = f"the first {limit:,} kept tokens {whose}" if limit == n else f"every kept token {whose}"
    warnings = [*found.doubts]
    if trained_on in ("some", "all"):
        share = 100 * (n - n_held_out) / n
        shown = "All" if share == 100 else f"{share:.0f} %"
        way_out = "use --split validation" if found.held_out.any() else "train with --validation-fraction above 0"
        warnings.append(f"{shown} of these tokens are of training documents: {way_out} for held-out numbers.")
    if trained_on == "unknown":
        warnings.append(
            "Whether the autoencoder was trained on this text is not known: it was trained on another store."
        )
    if not found.checkpoint.trainer.get("finished", True):
        warnings.append(f"Training was not finished: this is its step {found.checkpoint.trainer.get('step')}.")
    if not found.intervals and found.config.intervals:
        warnings.append(
            f"No 95 % intervals are given: they are drawn over documents, in groups of about the same size, and take "
            f"{MIN_INTERVAL_GROUPS} groups; {counted(selection.n_documents, 'document')} in "
            f"{counted(selection.n_groups, 'group')}: too few."
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
    meta, config, checkpoint = found.store.meta, found.config, found.checkpoint
    sae = checkpoint.config
    origin = {name: meta.provenance.get(name) for name in ("model", "architecture", "random_init", "dataset")}
    return {
        "store": {
            "name": found.store.path.name,
            "content_hash": found.store.content_hash,
            "config_hash": meta.config_hash,
            **origin,
            "revision": meta.provenance.get("model_revision"),
            "context_length": meta.context_length,
            "lens": meta.lens,
            "stored_dtype": meta.stored_dtype,
            "n_tokens": meta.n_tokens,
            "layers": list(meta.layers),
        },
        "sae": {
            "name": config.sae.name,
            "hash": weights_hash(checkpoint.sae),
            "n_latents": sae.n_latents,
            "k": sae.k,
            "d_model": sae.d_model,
            "expansion_factor": sae.n_latents / sae.d_model,
            "trained_tokens": trained_tokens(checkpoint),
            "store_content_hash": checkpoint.store.get("content_hash"),
        },
        "analysis": {
            "dtype": config.dtype,
            "split": config.split,
            "max_tokens": config.max_tokens,
            "seed": config.seed,
            "versions": versions(),
        },
    }


def trained_tokens(checkpoint: Checkpoint) -> int | None:
    """Tokens of training, repeats included, as far as the checkpoint tells."""
    trainer, plan = checkpoint.trainer, checkpoint.trainer.get("config") or {}
    step, batch, layers = trainer.get("step"), plan.get("batch_size"), plan.get("layers")
    if not (step and batch and layers):
        return None
    if trainer.get("vectors"):  # its own: of one of a --per-layer set, those of its layer
        return trainer["vectors"] // len(layers)
    streamed = plan.get("stream_layers") or layers
    return min(step * batch, plan.get("vectors", step * batch)) // len(streamed)


def versions() -> dict[str, str]:
    """Our version, Python's, and those of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("residscope", "torch", "numpy", "numba", "dask"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _variance(found: Findings) -> dict[str, Any]:
    pooled = found.moments.pooled()
    result: dict[str, Any] = {}
    for weighting in WEIGHTINGS:
        value = variances(pooled, weighting)
        result[weighting] = {name: _number(getattr(value, name)) for name in VARIANCE_NAMES}
        intervals = found.intervals.get(weighting, {})
        result[weighting]["ci95"] = {name: list(i) if i else None for name, i in intervals.items()}
    result["mlsae_compat"] = mlsae_compat(found.moments)._asdict()
    return result


def _persistence(found: Findings) -> dict[str, Any]:
    moments = found.moments
    histograms, shape = moments.persistence.histograms.sum(axis=0), moments.persistence.shape.sum(axis=0)
    result: dict[str, Any] = {"n_pairs": int(moments.pooled()[4].sum())}
    for weighting in PAIR_WEIGHTINGS:
        means = persistence_numbers(histograms, shape, moments.layers, weighting)
        result[weighting] = {name: _number(value) for name, value in means._asdict().items()}
        intervals = found.persistence_intervals.get(weighting, {})
        result[weighting]["ci95"] = {name: list(i) if i else None for name, i in intervals.items()}
        shares = distributions(histograms, weighting)
        result[weighting]["distributions"] = {name: row.tolist() for name, row in shares.items()}
    return result


def _profiles(table: LatentTable) -> dict[str, dict[str, float]]:
    kinds = np.array(profile_kinds(table.probs, table.entropy), dtype=object)
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
        "mmcs": _number(found.mmcs),
        "cosine_threshold": found.threshold,
        "overlap_threshold": MAX_OVERLAP,
        "parallel_pairs": found.n_parallel,
        "redundant_pairs": found.n_redundant,
        "redundant_latents": found.n_redundant_latents,
    }


def _validation(found: Findings) -> dict[str, Any] | None:
    if not found.validation:
        return None
    document = found.store.tokens.document[found.selection.validation]
    return {
        "n_tokens": found.validation.n_tokens,
        "n_documents": len(np.unique(document)),
        "fvu": _number(found.validation.fvu.mean()),
        "fvu_per_layer": [_number(fvu) for fvu in found.validation.fvu],
    }


def _pca(baseline: Baseline | None) -> dict[str, Any] | None:
    if baseline is None:
        return None
    return {
        "k": baseline.k,
        "fvu": _number(baseline.fvu.mean()),
        "fvu_per_layer": [_number(fvu) for fvu in baseline.fvu],
        "n_train_vectors": baseline.n_train_vectors,
        "n_validation_vectors": baseline.n_validation_vectors,
    }


def _number(value: Any) -> float | None:
    """A JSON number, or None for what is not defined."""
    return float(value) if np.isfinite(value) else None
