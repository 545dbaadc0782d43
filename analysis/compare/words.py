"""What `analyze --compare` says on the terminal: three tables, a row for each run.

Made from compare.json's runs alone. Not here: any number that is not in them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.baselines.nulls import NULLS
from analysis.results.words import shown, table, with_interval


def compare_words(runs: Sequence[Mapping[str, Any]]) -> str:
    """The decomposition by mass over that of an evenly drawn layer, what the reconstruction costs, and persistence."""
    first = ("run", "R", "k")
    names = [(run["run"], shown(run["expansion_factor"]), shown(run["k"])) for run in runs]
    decomposition = [
        (
            *name,
            layer_words(run["layers"]),
            *(shown(run["normalised"]["mass"][part]) for part in ("within_token", "between_tokens", "between_latents")),
            with_interval(run["normalised"]["mass"], "total"),
            with_interval(run["variance"]["mass"], "aggregate_over_token"),
            shown(run["reference_ratio"]),
            kind_words(run),
        )
        for name, run in zip(names, runs, strict=True)
    ]
    quality = [
        (
            *name,
            f"{run['n_latents']:,}",
            f"{run['n_latents'] - run['live_latents']:,}",
            f"{run['n_tokens']:,}",
            *(_bounded(run, part) for part in ("fvu",)),
            shown(run["validation_fvu"]),
            shown(run["l0"]),
            *(_bounded(run, part) for part in ("delta_ce", "kl", "loss_recovered_mean")),
        )
        for name, run in zip(names, runs, strict=True)
    ]
    persistence = [
        (
            *name,
            *(shown(_at(run, "persistence", "mass", part)) for part in ("n_layers_active", "run_length", "stays_on")),
            *(shown(_at(run, "null_ratio", null, "variance", "mass", "within_token")) for null in NULLS),
            *(shown(_at(run, "null_ratio", null, "persistence", "mass", "stays_on")) for null in NULLS),
        )
        for name, run in zip(names, runs, strict=True)
    ]
    parts = ("layers", "within token", "between tokens", "between latents", "total", "aggregate / token-level")
    nulls = tuple(f"{what}, {null.replace('_', ' ')}" for what in ("within token", "stays on") for null in NULLS)
    return "\n".join(
        [
            "R: expansion factor. Variance of the layer, by mass, over that of an evenly drawn layer, (layers^2 - 1) / "
            "12; aggregate / token-level as it is; [95 % intervals over documents]",
            *table((*first, *parts, "reference's formula", "what"), decomposition),
            "",
            "Means over layers. FVU, delta CE (nats per token) and KL (nats per token): lower is better, 0 is perfect. "
            "Loss recovered (against mean ablation): higher is better, 1 is perfect",
            *table(
                (
                    *(*first, "latents", "never fired", "tokens", "FVU", "validation FVU", "L0"),
                    *("delta CE", "KL", "loss recovered"),
                ),
                quality,
            ),
            "",
            "Along the layers of a token, by mass: layers on, longest run, share on at the next layer too; "
            "and observed / null model, 1: chance explains it",
            *table((*first, "layers on", "run", "stays on", *nulls), persistence),
        ]
    )


def kind_words(run: Mapping[str, Any]) -> str:
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


def _bounded(run: Mapping[str, Any], name: str) -> str:
    low, high = run[f"{name}_low"], run[f"{name}_high"]
    return shown(run[name]) if low is None else f"{shown(run[name])} [{low:.3g}, {high:.3g}]"


def _at(value: Any, *keys: str) -> float | None:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
