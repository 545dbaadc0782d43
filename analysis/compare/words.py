"""The text that `analyze --compare` prints: three tables, one row for each run. Tested in test_measure.py."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from analysis.baselines.nulls import NULLS
from analysis.results.words import shown, table, with_interval

Run = Mapping[str, Any]
UNLIKE = 1.5
"""How many times as long as another run's a training must be for a note."""
Columns = Mapping[str, Callable[[Run], str]]
"""By heading, the text of a run's cell."""


def compare_words(runs: Sequence[Run]) -> str:
    """The decomposition by mass (over the variance of a uniformly drawn layer), reconstruction, and persistence."""
    return "\n".join(
        [
            "R: expansion factor. Variance of the layer index, by mass, divided by that of a layer drawn uniformly "
            "from the analysed ones (aggregate / token-level is not divided); [95 % intervals over documents]",
            *_table(runs, DECOMPOSITION),
            "",
            "Means over layers. FVU, delta CE (nats per token) and KL (nats per token): lower is better, 0 is perfect. "
            "Loss recovered (against mean ablation): higher is better, 1 is perfect",
            *_table(runs, QUALITY),
            "",
            "Along the layers of a token, by mass: layers on, longest run, share still on at the next layer; "
            "and observed / null model (1: explained by chance)",
            *_table(runs, PERSISTENCE),
            *unlike_training(runs),
        ]
    )


def unlike_training(runs: Sequence[Run]) -> list[str]:
    """Notes if the amounts of training differ, or if the numbers of a run had not settled."""
    lengths = [run["trained_tokens"] for run in runs if run["trained_tokens"]]
    notes = [f"{run['run']}: its ratio had not settled when training ended." for run in runs if run["settled"] is False]
    if lengths and max(lengths) > UNLIKE * min(lengths):
        seen = ", ".join(f"{run['run']} {run['trained_tokens']:,}" for run in runs if run["trained_tokens"])
        notes.append(f"Trained on different amounts of text, in tokens: {seen}; this alone may change their numbers.")
    return ["", *notes] if notes else []


def _table(runs: Sequence[Run], columns: Columns) -> list[str]:
    first: Columns = {"run": itemgetter("run"), "R": _number("expansion_factor"), "k": _number("k")}
    if len({run["activation"] for run in runs}) > 1:
        first = {**first, "activation": lambda run: run["activation"] or "-"}
    columns = first | dict(columns)
    return table(tuple(columns), [tuple(cell(run) for cell in columns.values()) for run in runs])


def _number(*keys: str) -> Callable[[Run], str]:
    """The number at a path of keys; a dash if the path ends early."""

    def cell(run: Run) -> str:
        value: Any = run
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return shown(value)

    return cell


def _bounded(name: str) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        low, high = run[f"{name}_low"], run[f"{name}_high"]
        return with_interval({name: run[name], "ci95": {} if low is None else {name: (low, high)}}, name)

    return cell


def kind_words(run: Run) -> str:
    """The model's name, and whether it is untrained or seen through a tuned lens."""
    untrained, lens = ("untrained" if run["random_init"] else ""), ("tuned lens" if run["lens"] else "")
    return ", ".join(filter(None, (run["model"] or "-", untrained, lens)))


def layer_words(layers: Sequence[int]) -> str:
    """The number of layers, or which layer if there is only one."""
    return f"layer {layers[0]} only" if len(layers) == 1 else str(len(layers))


DECOMPOSITION: Columns = {
    "layers": lambda run: layer_words(run["layers"]),
    "within token": _number("normalised", "mass", "within_token"),
    "between tokens": _number("normalised", "mass", "between_tokens"),
    "between latents": _number("normalised", "mass", "between_latents"),
    "total": lambda run: with_interval(run["normalised"]["mass"], "total"),
    "aggregate / token-level": lambda run: with_interval(run["variance"]["mass"], "aggregate_over_token"),
    "reference's formula": _number("reference_ratio"),
    "what": kind_words,
}
QUALITY: Columns = {
    "latents": lambda run: f"{run['n_latents']:,}",
    "never fired": lambda run: f"{run['n_latents'] - run['live_latents']:,}",
    "tokens": lambda run: f"{run['n_tokens']:,}",
    "FVU": _bounded("fvu"),
    "validation FVU": _number("validation_fvu"),
    "L0": _number("l0"),
    "delta CE": _bounded("delta_ce"),
    "KL": _bounded("kl"),
    "loss recovered": _bounded("loss_recovered_mean"),
    "delta CE, all layers at once": _number("delta_ce_all_layers"),
}
PERSISTENCE: Columns = {
    "layers on": _number("persistence", "mass", "n_layers_active"),
    "longest run": _number("persistence", "mass", "run_length"),
    "stays on": _number("persistence", "mass", "stays_on"),
} | {
    f"{name}, {null}".replace("_", " "): _number("null_ratio", null, part, "mass", name)
    for part, name in (("variance", "within_token"), ("persistence", "stays_on"))
    for null in NULLS
}
