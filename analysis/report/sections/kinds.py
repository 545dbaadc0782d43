"""Section: kinds of latents by their layer profile. Tested in test_page.py."""

from analysis.latents.table import KINDS
from analysis.report.charts import lines_chart
from analysis.report.data import Results
from analysis.report.markup import Section, figure, integer, percent, table

TITLE = "Kinds of latents"
INTRODUCTION = """<p>Each live latent has one kind, by its share of activation mass at each layer. Persistent:
2<sup>entropy</sup> is at least two thirds of the number of layers. Bimodal: two groups of layers, each with at
least a quarter of the mass, a valley of at most half the lower peak between them, and mean layers at least a quarter of
the depth apart. Early, middle, late: the mean layer lies in the first, second or last third of the depth.</p>"""


def section(results: Results) -> Section:
    if len(results.kinds) == 0:
        return Section(TITLE, "<p>Not shown: no latent fired on these tokens.</p>")
    numbers = {kind: results.number("profiles", kind, "latents") or 0 for kind in KINDS}
    shares = {kind: percent(number / len(results.kinds)) for kind, number in numbers.items()}
    members = {kind: results.probs[results.kinds == kind] for kind in KINDS}
    series = [(found.mean(axis=0), kind, kind) for kind, found in members.items() if len(found)]
    most = max(KINDS, key=lambda kind: numbers[kind])
    chart = lines_chart(series, "mean P(layer | latent)", results.layer_numbers, height_rem=14)
    caption = "Mean of P(layer | latent) over the latents of a kind."
    mass = {kind: percent(results.get("profiles", kind, "mass_share")) for kind in KINDS}
    rows = [(kind, integer(numbers[kind]), shares[kind], mass[kind]) for kind in KINDS]
    numbers_table = table(("Kind", "live latents", "share of them", "mass share"), rows)
    title = f"{shares[most]} of live latents are {most}"
    return Section(TITLE, INTRODUCTION + figure(title, chart, caption) + numbers_table)
