"""Several layers replaced at once: which, and what it costs beside the sum of what each costs alone.

A reconstruction at one layer acts on the true residual stream below it; at several, each acts on what those below it
made of the stream, so that errors add up, or undo each other: numbers of single layers do not tell (ReSAE, arXiv
2605.27819). The groups of layers are all, every 2nd, 4th and 8th from the first on, and the first and the last quarter,
half and three quarters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.model.downstream_numbers import Downstream
from analysis.quality import defined

EVERY, PARTS = (2, 4, 8), (0.25, 0.5, 0.75)
NUMBERS = ("delta_ce", "kl", "loss_recovered_mean", "mean_ablation_delta_ce", "mean_ablation_kl")


class Group(NamedTuple):
    """Layers that are replaced together."""

    kind: str
    """all, every, first or last."""
    n: int
    """Every n-th layer; the first or last n; or the number of all."""
    layers: tuple[int, ...]
    """The model's block indices, ascending."""


def group_words(kind: str, n: int) -> str:
    """What a group is."""
    ordinal = {2: "2nd"}.get(n, f"{n}th")
    return {"all": f"all {n}", "every": f"every {ordinal}"}.get(kind, f"{kind} {n}")


def groups_of(layers: Sequence[int]) -> list[Group]:
    """The groups of some ascending layers; none of a single layer."""
    n = len(layers)
    sizes = sorted({round(part * n) for part in PARTS} - {0, n})
    found = [Group("all", n, tuple(layers))]
    found += [Group("every", step, tuple(layers[::step])) for step in EVERY if step < n]
    found += [Group("first", size, tuple(layers[:size])) for size in sizes]
    found += [Group("last", size, tuple(layers[-size:])) for size in sizes]
    return found if n > 1 else []


def together_summary(groups: Sequence[Group], found: Downstream, alone: Downstream) -> dict[str, Any]:
    """`downstream.together` of summary.json. found: of the groups, alone: of each layer by itself."""
    result, single = found.result(), alone.result()
    rows: list[dict[str, Any]] = []
    for i, group in enumerate(groups):
        own = np.isin(alone.layers, group.layers)
        numbers = {name: defined(getattr(result, name)[i]) for name in NUMBERS}
        sums = {f"sum_alone_{name}": defined(getattr(single, name)[own].sum()) for name in ("delta_ce", "kl")}
        rows.append({"kind": group.kind, "n": group.n, "layers": list(group.layers), **numbers, **sums})
    sizes = {"n_tokens": int(result.n_tokens), "n_documents": len(found.documents)}
    return {**sizes, "true_ce": defined(result.true_ce), "groups": rows}
