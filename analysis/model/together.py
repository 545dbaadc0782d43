"""Several layers replaced at once: which layers, and the cost, compared with the sum of the costs of single layers.

Each reconstruction is of a stream that was already changed at the layers below, so errors accumulate or cancel, which
results for single layers do not show (ReSAE, arXiv 2605.27819). Groups: `groups_of`, and docs/method.md.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.model.downstream_numbers import Downstream
from analysis.quality import defined

EVERY, PARTS = (2, 4, 8), (0.25, 0.5, 0.75)
NUMBERS = ("delta_ce", "kl", "loss_recovered_mean", "mean_ablation_delta_ce", "mean_ablation_kl")
PCA_NUMBERS = {"pca_delta_ce": "zero_ablation_delta_ce", "pca_kl": "zero_ablation_kl"}
"""PCA's numbers take the place of zero ablation's (`measure_downstream`)."""


class Group(NamedTuple):
    """Layers replaced together."""

    kind: str  # all, every, first or last
    n: int  # every n-th layer; the first or last n; the number of all
    layers: tuple[int, ...]  # the model's block indices, ascending


def group_words(kind: str, n: int) -> str:
    ordinal = {2: "2nd"}.get(n, f"{n}th")
    return {"all": f"all {n}", "every": f"every {ordinal}"}.get(kind, f"{kind} {n}")


def groups_of(layers: Sequence[int]) -> list[Group]:
    """The groups for some ascending layers; none for a single layer."""
    n = len(layers)
    sizes = sorted({round(part * n) for part in PARTS} - {0, n})
    found = [Group("all", n, tuple(layers))]
    found += [Group("every", step, tuple(layers[::step])) for step in EVERY if step < n]
    found += [Group("first", size, tuple(layers[:size])) for size in sizes]
    found += [Group("last", size, tuple(layers[-size:])) for size in sizes]
    return found if n > 1 else []


def together_summary(groups: Sequence[Group], found: Downstream, pca: bool, intervals: bool) -> dict[str, Any]:
    """`downstream.together` of summary.json. found: results for the groups, then for each layer by itself. pca: whether
    PCA was measured."""
    result, bounds = found.result(), found.intervals() if intervals else {}
    rows: list[dict[str, Any]] = []
    names = dict(zip(NUMBERS, NUMBERS, strict=True)) | (PCA_NUMBERS if pca else {})
    for i, (kind, n, layers) in enumerate(groups):
        own = np.append(np.zeros(len(groups), bool), np.isin(found.layers[len(groups) :], layers))
        row = {"kind": kind, "n": n, "layers": list(layers), **dict.fromkeys(PCA_NUMBERS)}
        row |= {name: defined(getattr(result, of)[i]) for name, of in names.items()}
        row |= {f"sum_alone_{name}": defined(getattr(result, name)[own].sum()) for name in ("delta_ce", "kl")}
        rows.append(row | {"ci95": {name: list(bounds[of][i] or ()) or None for name, of in names.items() if bounds}})
    whole = {"n_tokens": int(result.n_tokens), "n_documents": len(found.documents)}
    return {**whole, "true_ce": defined(result.true_ce), "groups": rows}
