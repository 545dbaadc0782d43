"""Section: when latents switch on and off along the layers. Tested in test_page.py."""

from analysis.report.charts import lines_chart
from analysis.report.data import Results
from analysis.report.markup import Section, columns, figure, integer, percent, show, table, with_interval

TITLE = "Switching on, staying on"
MEANS = (
    ("n_layers_active", "layers active", "layers"),
    ("onset", "onset, first active layer", "layer"),
    ("offset", "offset, last active layer", "layer"),
    ("run_length", "longest run", "layers"),
    ("n_runs", "runs: times it switches on", "runs"),
    ("contiguity", "contiguity", "0 to 1"),
    ("unbroken", "unbroken: a single run", "share"),
    ("single_layer", "active at one layer only", "share"),
    ("contiguity_multi", "contiguity, several layers", "0 to 1"),
    ("unbroken_multi", "unbroken, several layers", "share"),
    ("stays_on", "stays on at the next layer", "share"),
)
"""Numbers of `persistence`: name, label, unit."""

INTRODUCTION = """<p>At one token, a latent switches on at its onset, the first layer at which it is active, and is last
active at its offset. If it stays on in between, its longest run of layers goes from onset to offset, and its contiguity
is 1. Each (token, latent) pair is weighted by its activation mass, or all pairs equally.</p>"""


def section(results: Results) -> Section:
    """Two figures of distributions over layers, and the means as a table."""
    if results.number("persistence", "mass", "n_layers_active") is None:
        return Section(TITLE, "<p>Not shown: no latent fired on these tokens.</p>")
    unbroken = results.number("persistence", "mass", "unbroken_multi")
    single = percent(results.number("persistence", "mass", "single_layer"))
    onset, offset = (show(results.number("persistence", "mass", name)) for name in ("onset", "offset"))
    rest = f"; of the rest, {percent(unbroken)} is unbroken" if unbroken is not None else ""
    note = "" if unbroken is not None else "An en dash: every pair is active at one layer only."
    rows = [
        (words, *(with_interval(results, "persistence", w, name) for w in ("mass", "equal")), unit)
        for name, words, unit in MEANS
    ]
    body = (
        INTRODUCTION
        + columns(
            figure(
                f"{single} of the activation mass is of latents on at one layer only{rest}",
                _chart(results, ("n_layers_active", "layers active", "other"), ("run_length", "longest run", "ours")),
                "Share of pairs, weighted by mass, by number of active layers and by length of the longest run.",
            ),
            figure(
                f"On average, a latent is on from layer {onset} to layer {offset}",
                _chart(results, ("onset", "onset", "ours"), ("offset", "offset", "other"), of_layers=True),
                "Share of pairs, weighted by mass, that are first (onset) or last (offset) active at a layer.",
            ),
        )
        + table(("Mean over (token, latent) pairs", "activation mass", "equal pairs", "unit"), rows)
        + f'<p class="note">{integer(results.get("persistence", "n_pairs"))} pairs. In small print, where available: '
        "95 % intervals over documents. A pair that is active at one layer only is unbroken and has contiguity 1 by "
        f'definition; the rows "several layers" leave it out. {note}</p>'
    )
    return Section(TITLE, body)


def _chart(results: Results, *lines: tuple[str, str, str], of_layers: bool = False) -> str:
    """Distributions by mass, over layers or numbers of layers. lines: name, legend, class of report.css."""
    key = ("persistence", "mass", "distributions")
    series = [(results.numbers(*key, name), words, kind) for name, words, kind in lines]
    if of_layers:
        return lines_chart(series, "share of pairs", results.layer_numbers)
    return lines_chart(series, "share of pairs", range(1, len(results.layer_numbers) + 1), "layers")
