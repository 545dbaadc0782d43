"""A comparison for people and programs: a table on the terminal, compare.parquet, compare.json, and a figure.

Tested in tests/train/compare/test_measure.py.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from residscope.console import aligned
from residscope.escape import figure_text
from train.compare.measure import FOUND, Comparison, Entrant
from train.metrics import finite


def as_json(result: Comparison) -> dict[str, Any]:
    return finite(
        {
            "store": result.store,
            "tokens": result.tokens,
            "layers": list(result.layers),
            "matches": [match._asdict() for match in result.matches],
            "runs": [
                {
                    "run": entrant.name,
                    "kind": entrant.kind,
                    "n_latents": entrant.n_latents(),
                    "k": entrant.k() or None,
                    "vectors": entrant.vectors,
                    "fvu": mean(entrant.by_layer(result.layers, "fvu_per_layer")),
                    "trained_layers": entrant.own_layers(result.layers),
                    "fvu_trained_layers": own_mean(entrant, result.layers),
                    "fvu_per_layer": entrant.by_layer(result.layers, "fvu_per_layer"),
                    "l0_per_layer": entrant.by_layer(result.layers, "l0_per_layer"),
                }
                for entrant in result.entrants
            ],
        }
    )


def write(result: Comparison, folder: Path) -> list[str]:
    """Write the files, with the figure if matplotlib is installed; returns their names."""
    import pandas as pd

    pd.DataFrame(_rows(result)).to_parquet(folder / "compare.parquet", index=False)
    (folder / "compare.json").write_text(json.dumps(as_json(result), indent=2), encoding="utf-8")
    _draw(result, folder / "compare.png")
    return sorted(path.name for path in folder.glob("compare.*"))


def words(result: Comparison) -> str:
    """The table on the terminal: a row for each layer, a column for each run."""
    columns = [entrant.by_layer(result.layers, "fvu_per_layer") for entrant in result.entrants]
    own = [entrant.own_layers(result.layers) for entrant in result.entrants]
    common = [layer for layer in result.layers if all(layer in layers for layers in own)]
    shared = [mean([column[result.layers.index(layer)] for layer in common]) for column in columns]
    best = min((value for value in shared if value is not None), default=math.nan)
    everywhere = len(common) == len(result.layers)
    of_own = [own_mean(entrant, result.layers) for entrant in result.entrants]
    l0 = [own_mean(entrant, result.layers, "l0_per_layer") for entrant in result.entrants]
    lines = [
        ["layer", *(entrant.name for entrant in result.entrants)],
        *(
            [str(layer), *(_cell(column[i], layer in layers) for column, layers in zip(columns, own, strict=True))]
            for i, layer in enumerate(result.layers)
        ),
        ["mean" if everywhere else "mean, all", *(number(mean(column)) for column in columns)],
        *([] if everywhere else [["mean, own", *map(number, of_own)]]),
        ["over the best", *(number(None if value is None else value / best) for value in shared)],
        ["latents", *(f"{entrant.n_latents():,}" for entrant in result.entrants)],
        ["k", *(str(entrant.k() or "-") for entrant in result.entrants)],
        ["L0", *("-" if value is None else f"{value:.1f}" for value in l0)],
        ["vectors", *("-" if entrant.vectors is None else f"{entrant.vectors:,}" for entrant in result.entrants)],
    ]
    title = f"FVU (lower is better) by layer, on {result.tokens:,} held-out tokens; "
    title += "latents and vectors are of all members of a set together"
    if not everywhere:
        title += (
            "; (in brackets): a layer that it was not trained on; mean, own: over those that it was trained on; over "
            f"the best: on layers {' '.join(map(str, common)) or '-'}, which all were trained on"
        )
    return "\n".join([title, *aligned(lines), *_found_again(result)])


def _found_again(result: Comparison) -> list[str]:
    """The second table on the terminal, for autoencoders of several layers."""
    names = list(dict.fromkeys(match.run for match in result.matches))
    cells = {(match.run, match.other): f"{match.mmcs:.3f} ({match.found:.0%})" for match in result.matches}
    if not names:
        return []
    title = (
        "the row's latents found in the column's autoencoder: mean over those that fired of the highest cosine of "
        f"decoder rows (1: all are there), and the share above {FOUND}"
    )
    rows = [[row, *(cells.get((row, name), "") for name in names)] for row in names]
    return ["", title, *aligned([["", *names], *rows])]


def _rows(result: Comparison) -> list[dict[str, Any]]:
    """A row for each autoencoder and layer that it was measured on."""
    return [
        {
            "run": entrant.name,
            "kind": entrant.kind,
            "n_latents": entrant.n_latents(),
            "active_at_most": entrant.k() or None,
            "vectors": entrant.vectors,
            "trained_layer": trained,
            "layer": layer,
            "own": layer in entrant.own_layers(result.layers) and (trained is None or trained == layer),
            "fvu": found.fvu_per_layer[position],
            "l0": found.l0_per_layer[position],
            "tokens": result.tokens,
        }
        for entrant in result.entrants
        for trained, found in entrant.found.items()
        for position, layer in enumerate(result.layers)
        if not math.isnan(found.fvu_per_layer[position])  # not measured there
    ]


def _draw(result: Comparison, path: Path) -> None:
    """Plot FVU against the layer as a PNG, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    styles: dict[str, Any] = {
        "multi-layer": {"linewidth": 2.2, "marker": "o", "markersize": 3},
        "per-layer": {"linewidth": 1.4, "marker": "s", "markersize": 2.5},
        "pca": {"linewidth": 1.2, "linestyle": "--"},
    }
    for entrant in result.entrants:
        values = [math.nan if v is None else v for v in entrant.by_layer(result.layers, "fvu_per_layer")]
        of = "components" if entrant.kind == "pca" else "latents"
        label = f"{figure_text(entrant.name)} ({entrant.n_latents():,} {of})"
        axes.plot(result.layers, values, label=label, **styles[entrant.kind])
    axes.set(xlabel="layer", ylabel="FVU (lower is better)", yscale="log")
    axes.set_title(f"Held-out reconstruction by layer, {result.tokens:,} tokens", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def mean(values: Sequence[float | None]) -> float | None:
    """Mean over layers; None unless every layer has a value, so that all means are over the same layers."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there and len(there) == len(values) else None


def own_mean(entrant: Entrant, layers: Sequence[int], name: str = "fvu_per_layer") -> float | None:
    """Mean FVU, or the number `name`, over those of the store's `layers` that the entrant was trained on."""
    values = entrant.by_layer(layers, name)
    return mean([values[list(layers).index(layer)] for layer in entrant.own_layers(layers)])


def _cell(value: float | None, own: bool) -> str:
    return number(value) if own or value is None else f"({number(value)})"


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"
