"""Section: whether a latent has the same top contexts at every layer. Tested in test_page.py."""

from analysis.report.charts import lines_chart
from analysis.report.data import Results
from analysis.report.markup import Section, figure, integer, show, table

TITLE = "The same contexts at each layer?"
INTRODUCTION = """<p>A latent's top contexts at a layer are the {n} tokens at which it is most active there. If it means
the same at every layer, any two layers share many of them. <b>Chance</b> is the overlap if, at each layer, its
activations fell at random on the tokens at which it fires at all. An overlap well above chance says that the latent
keeps its meaning; a high overlap alone does not, because latents that fire rarely have one by chance.</p>"""


def section(results: Results) -> Section:
    """Overlap of top contexts by the distance between two layers, observed and by chance."""
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
        "distance between the two layers (in analysed layers)",
    )
    rows = zip(distances, observed, expected, strict=True)
    by_distance = table(
        ("Distance in analysed layers", "overlap, 0 to 1 (higher: more agreement)", "by chance", "overlap / chance"),
        [(str(d), show(a), show(b), show(a / b if b else None)) for d, a, b in rows],
    )
    times = f"{show(ratio)} times as many as by chance ({show(chance)})"
    title = f"Two layers share {show(overlap)} of a latent's top contexts, {times}"
    caption = (
        f"Means over pairs of layers at each distance, for the {integer(found.get('latents'))} latents with top "
        "contexts at two layers or more. The numbers in the title are means over latents."
    )
    details = f"<details><summary>Table by distance</summary>{by_distance}</details>"
    return Section(TITLE, INTRODUCTION.format(n=integer(found.get("n"))) + figure(title, chart, caption) + details)
