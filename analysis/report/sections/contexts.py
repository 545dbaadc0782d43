"""Section: whether a latent has the same top contexts at each layer. Tested in test_page.py."""

from analysis.report.charts import lines_chart
from analysis.report.data import Results
from analysis.report.markup import Section, figure, integer, show, table

TITLE = "The same contexts at each layer?"
INTRODUCTION = """<p>A latent's top contexts at a layer are the {n} tokens at which it is most active there. If it means
the same at each layer, two layers have many of them in common. <b>Chance</b>: the overlap if, at each layer, its
activations were placed at random on the tokens at which it fires at all. Higher overlap, against chance, says that the
latent keeps its meaning; the overlap alone is also high for latents that fire rarely.</p>"""


def section(results: Results) -> Section:
    """Overlap of top contexts by the distance of two layers, observed and by chance."""
    found = results.get("examples", "agreement") or {}
    overlap, chance, ratio = (found.get(name) for name in ("overlap", "chance", "overlap_over_chance"))
    if overlap is None:
        reason = "this analysis was made without examples, or no latent fired often enough at two layers"
        return Section(TITLE, f"<p>Not shown: {reason}.</p>")
    keys = ("examples", "agreement")
    observed, expected = (results.numbers(*keys, f"{name}_by_distance") for name in ("overlap", "chance"))
    distances = range(1, len(observed) + 1)
    chart = lines_chart(
        [(observed, "observed", "ours"), (expected, "by chance", "null dashed")],
        "overlap: share of top contexts in common (0 to 1)",
        distances,
        "distance of the two layers (analysed layers)",
    )
    rows = zip(distances, observed, expected, strict=True)
    by_distance = table(
        ("Distance, analysed layers", "overlap, 0 to 1 (higher agrees more)", "by chance", "overlap / chance, ratio"),
        [(str(d), show(a), show(b), show(a / b if b else None)) for d, a, b in rows],
    )
    times = f"{show(ratio)} times what chance gives ({show(chance)})"
    title = f"Two layers share {show(overlap)} of a latent's top contexts, {times}"
    caption = (
        f"Means over all pairs of layers of the {integer(found.get('latents'))} latents that have top contexts at two "
        "layers or more, by the distance of the two. The title's numbers are means over latents."
    )
    details = f"<details><summary>Table by distance</summary>{by_distance}</details>"
    return Section(TITLE, INTRODUCTION.format(n=integer(found.get("n"))) + figure(title, chart, caption) + details)
