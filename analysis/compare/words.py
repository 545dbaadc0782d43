"""What `analyze --compare` says on the terminal: three tables, a row for each run.

Made from compare.json's runs alone. Tested in tests/analysis/compare/test_measure.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from analysis.baselines.nulls import NULLS
from analysis.word_tables import shown, table, with_interval

Run = Mapping[str, Any]


def compare_words(runs: Sequence[Run]) -> str:
    """The decomposition by mass over that of an evenly drawn layer, what the reconstruction costs, and persistence."""
    return "\n".join(
        [
            "R: expansion factor. Variance of the layer, by mass, over that of an evenly drawn layer, (layers^2 - 1) / "
            "12; aggregate / token-level as it is; [95 % intervals over documents]",
            *_table(runs, _DECOMPOSITION, _decomposition),
            "",
            "Means over layers. FVU, delta CE (nats per token) and KL (nats per token): lower is better, 0 is perfect. "
            "Loss recovered (against mean ablation): higher is better, 1 is perfect",
            *_table(runs, _QUALITY, _quality),
            "",
            "Along the layers of a token, by mass: layers on, longest run, share on at the next layer too; "
            "and observed / null model, 1: chance explains it",
            *_table(runs, _PERSISTENCE, _persistence),
        ]
    )


def _table(runs: Sequence[Run], head: Sequence[str], cells: Callable[[Run], Sequence[str]]) -> list[str]:
    """A table whose rows begin with what tells runs apart."""
    rows = [(run["run"], shown(run["expansion_factor"]), shown(run["k"]), *cells(run)) for run in runs]
    return table(("run", "R", "k", *head), rows)


_DECOMPOSITION = (
    *("layers", "within token", "between tokens", "between latents", "total", "aggregate / token-level"),
    *("reference's formula", "what"),
)


def _decomposition(run: Run) -> Sequence[str]:
    parts = run["normalised"]["mass"]
    return (
        layer_words(run["layers"]),
        *(shown(parts[part]) for part in ("within_token", "between_tokens", "between_latents")),
        with_interval(parts, "total"),
        with_interval(run["variance"]["mass"], "aggregate_over_token"),
        shown(run["reference_ratio"]),
        kind_words(run),
    )


_QUALITY = (
    *("latents", "never fired", "tokens", "FVU", "validation FVU", "L0"),
    *("delta CE", "KL", "loss recovered"),
)


def _quality(run: Run) -> Sequence[str]:
    return (
        f"{run['n_latents']:,}",
        f"{run['n_latents'] - run['live_latents']:,}",
        f"{run['n_tokens']:,}",
        _bounded(run, "fvu"),
        shown(run["validation_fvu"]),
        shown(run["l0"]),
        *(_bounded(run, part) for part in ("delta_ce", "kl", "loss_recovered_mean")),
    )


_PERSISTENCE = (
    *("layers on", "run", "stays on"),
    *(f"{what}, {null.replace('_', ' ')}" for what in ("within token", "stays on") for null in NULLS),
)


def _persistence(run: Run) -> Sequence[str]:
    means, ratios = (run["persistence"] or {}).get("mass", {}), run["null_ratio"] or {}
    parts = (("variance", "within_token"), ("persistence", "stays_on"))
    return (
        *(shown(means.get(name)) for name in ("n_layers_active", "run_length", "stays_on")),
        *(shown(ratios[null][part]["mass"][name] if ratios else None) for part, name in parts for null in NULLS),
    )


def kind_words(run: Run) -> str:
    """Which model, trained or not, through a lens or not."""
    words = [str(run["model"] or "-")]
    if run["random_init"]:
        words.append("untrained")
    if run["lens"]:
        words.append("tuned lens")
    return ", ".join(words)


def layer_words(layers: Sequence[int]) -> str:
    """How many layers, or which one."""
    return f"layer {layers[0]} only" if len(layers) == 1 else str(len(layers))


def _bounded(run: Run, name: str) -> str:
    """A mean over layers with its interval."""
    low, high = run[f"{name}_low"], run[f"{name}_high"]
    return with_interval({name: run[name], "ci95": {} if low is None else {name: (low, high)}}, name)
