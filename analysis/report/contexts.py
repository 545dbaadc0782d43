"""The report's section on top contexts: whether a latent is strongest at the same tokens at each layer, against chance.

A section as in `analysis.report.sections`. Not here: the numbers (`analysis.latents.contexts`).
"""

import numpy as np

from analysis.report.charts import layer_ticks, lines_chart
from analysis.report.data import Results, integer, show
from analysis.report.template import Section, fill


def contexts_section(results: Results) -> Section:
    """Overlap of top contexts by the distance of two layers, observed and by chance."""
    anchor, title = "contexts", "The same contexts at each layer?"
    overlap = results.number("examples", "agreement", "overlap")
    if overlap is None:
        return Section(
            anchor,
            title,
            "<p>Not shown: this analysis was made without examples, or no latent fired often enough at two layers.</p>",
        )
    chance = results.number("examples", "agreement", "chance")
    ratio = results.number("examples", "agreement", "overlap_over_chance")
    observed, expected = (
        np.array([np.nan if x is None else x for x in results.get("examples", "agreement", name)], np.float64)
        for name in ("overlap_by_distance", "chance_by_distance")
    )
    distances = range(1, len(observed) + 1)
    rows = "".join(
        f"<tr><th>{d}</th><td>{show(a)}</td><td>{show(b)}</td><td>{show(a / b if b else None)}</td></tr>"
        for d, a, b in zip(distances, observed, expected, strict=True)
    )
    body = fill(
        "contexts.html",
        n=integer(results.get("examples", "agreement", "n")),
        latents=integer(results.get("examples", "agreement", "latents")),
        title=f"Two layers share {show(overlap)} of a latent's top contexts; chance gives {show(chance)} "
        f"({show(ratio)} times less)",
        chart=lines_chart(
            [(observed, "observed", "ours"), (expected, "by chance", "null dashed")],
            "overlap: share of top contexts in common (0 to 1)",
            layer_ticks(distances),
            "distance of the two layers (analysed layers)",
            13,
        ),
        rows=rows,
    )
    return Section(anchor, title, body)
