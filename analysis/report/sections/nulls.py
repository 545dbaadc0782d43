"""Section: the numbers under null models, and observed over null. Tested in test_page.py."""

from analysis.baselines.nulls import NULLS
from analysis.report.charts import lines_chart
from analysis.report.data import Results
from analysis.report.markup import Section, figure, integer, show, table, with_interval
from analysis.report.sections.persistence import MEANS

TITLE = "Against chance"
ROWS = (
    ("variance", "within_token", "variance within a token, layers²"),
    ("variance", "between_tokens", "variance between tokens, layers²"),
    ("variance", "between_latents", "variance between latents, layers²"),
    ("variance", "aggregate_over_token", "aggregate / token-level"),
    *(("persistence", name, words) for name, words, _ in MEANS if name not in ("onset", "offset")),
)
"""Rows of the table: part of the summary, name, label."""

INTRODUCTION = """<p>Two null models show what chance alone would give. <b>Layers permuted</b>: within each token, the
codes are shuffled among the layers; latents still share their tokens, but the order of layers is lost. <b>Tokens
permuted</b>: within each layer, codes are exchanged between the tokens of a stretch of {chunk} tokens; each latent
keeps its profile over layers, but the layers of one token no longer belong together. A ratio of 1 means that chance
explains the number.</p>"""


def section(results: Results) -> Section:
    """The distribution of runs, observed and under both null models, and every number over its null's."""
    if not results.get("nulls") or results.number("persistence", "mass", "n_layers_active") is None:
        return Section(TITLE, "<p>Not shown: this analysis was made without null models, or no latent fired.</p>")
    stays = show(results.number("nulls", "layers_permuted", "ratio", "persistence", "mass", "stays_on"))
    within = show(results.number("nulls", "layers_permuted", "ratio", "variance", "mass", "within_token"))
    title = f"Latents stay on {stays} times as often, and spread {within} times as widely, as with layers permuted"
    head = ("By mass", "observed", "layers permuted", "observed / null", "tokens permuted", "observed / null")
    body = (
        INTRODUCTION.format(chunk=integer(results.get("nulls", "chunk_tokens")))
        + figure(title, _chart(results), "Share of pairs, weighted by mass, by length of the longest run.")
        + table(head, [_row(results, *row) for row in ROWS])
        + '<p class="note">In small print, where available: the ends of the observed number\'s 95 % interval, '
        "divided by the null's value, whose own error is not counted.</p>"
    )
    return Section(TITLE, body)


def _row(results: Results, part: str, name: str, words: str) -> list[str]:
    cells = [words, show(results.number(part, "mass", name))]
    for null in NULLS:
        cells.append(show(results.number("nulls", null, part, "mass", name)))
        cells.append(with_interval(results, "nulls", null, "ratio", part, "mass", name))
    return cells


def _chart(results: Results) -> str:
    lines = [(results.numbers("persistence", "mass", "distributions", "run_length"), "observed", "ours")]
    for null, kind in zip(NULLS, ("null dashed", "other dotted"), strict=True):
        values = results.numbers("nulls", null, "distributions", "mass", "run_length")
        lines.append((values, null.replace("_", " "), kind))
    return lines_chart(lines, "share of pairs", range(1, len(results.layer_numbers) + 1), "layers in a row")
