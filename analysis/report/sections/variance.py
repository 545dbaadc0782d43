"""Section: variance of the layer, its parts, and the reference's numbers. Tested in test_page.py."""

import math
from html import escape

from analysis.report.charts import Plot, log_ticks
from analysis.report.data import PARTS, WEIGHTINGS, Results
from analysis.report.markup import Section, between, columns, figure, integer, percent, show, small, table

ROWS = {**PARTS, "total": "total", "aggregate": "aggregate", "aggregate_over_token": "aggregate / token-level"}
COMPAT = ("exp_var_l_tf", "exp_var_l_f", "var_l", "rel_var_f", "rel_var_t")

INTRODUCTION = """<p>The layer L at which a latent is active varies for three reasons: at one token the latent is active
at several layers (within a token), its mean layer moves from token to token (between tokens), and latents differ in
their mean layer (between latents). The three add up to the total. No part is better or worse.</p>"""

WHY_THEY_DIFFER = """<div><h3>Why the reference's formula gives another number</h3>
<p>It averages p = a / Σ<sub>l</sub> a over all tokens, including those at which the latent is silent and p is zero. The
result sums to q, the share of tokens at which the latent fires, and not to 1. So its Σ l² p &minus; (Σ l p)² is not a
variance: it also contains q (1 &minus; q) E[L]², which grows with the layer's <em>number</em> rather than with any
spread, and changes if layers are numbered from 1. This inflates the aggregate and leaves the token-level term alone, so
the ratio is large even where every token has the same profile.</p></div>"""


def section(results: Results) -> Section:
    """Charts of the shares and the ratio, both as a table, and the reference's numbers."""
    note = "Bars, and numbers in brackets: 95 % intervals." if isinstance(results.get("uncertainty"), dict) else ""
    caption = f"1: a latent keeps the same mean layer at every token. {note}"
    ratio, reference = results.number("variance", "mass", "aggregate_over_token"), results.reference_ratio
    ours = "not defined" if ratio is None else show(ratio)
    theirs = "gives none" if reference is None else f"gives {show(reference)}"
    ratio_title = f"Aggregate over token-level variance: {ours}; the reference's formula {theirs}"
    compat = [(f"<code>{name}</code>", show(results.number("variance", "mlsae_compat", name))) for name in COMPAT]
    compat.append(("<code>1 / rel_var_t</code>", show(results.reference_ratio)))
    body = (
        INTRODUCTION
        + columns(
            figure(variance_title(results), _shares_chart(results)),
            figure(ratio_title, _ratio_chart(results), caption, "ratio"),
        )
        + table(
            ("Variance of the layer, in layers²", *map(escape, WEIGHTINGS.values())),
            [(words, *(_cell(results, weighting, name) for weighting in WEIGHTINGS)) for name, words in ROWS.items()],
            "result-last",
        )
        + '<p class="note">Columns: what counts as one (see <a href="#method">Method</a>). In brackets: share of the '
        f"total. The last row is a ratio and has no unit. {escape(_about_intervals(results))} "
        f"{escape(_about_dashes(results))}</p>"
        + columns(WHY_THEY_DIFFER, table(("The reference's numbers (mlsae_compat)", "Value"), compat))
    )
    return Section("Variance of the layer", body)


def variance_title(results: Results) -> str:
    """How the variance splits into its three parts, by activation mass."""
    if not (found := variance_shares(results, "mass")):
        return "The layers of active latents do not vary on these tokens"
    within, tokens, latents = (percent(found.get(part, 0.0)) for part in PARTS)
    return f"{within} of the layer variance lies within a token, {tokens} between tokens, {latents} between latents"


def why_no_ratio(results: Results, weighting: str = "mass") -> str:
    """Why aggregate / token-level variance is not defined; empty where it is."""
    if results.number("variance", weighting, "aggregate_over_token") is not None:
        return ""
    if results.get("n_layers") == 1:
        return "only one layer was analysed, so there is nothing to vary"
    if len(results.counts) == 0:
        return "no latent fired on these tokens"
    if results.number("variance", weighting, "within_token") == 0:
        return "at every token, each latent fires at one layer only, so the token-level variance is 0"
    return "summary.json has no value for it"


def _cell(results: Results, weighting: str, name: str) -> str:
    value, total = (results.number("variance", weighting, key) for key in (name, "total"))
    share = f" ({percent(value / total)})" if name in PARTS and total and value is not None else ""
    return show(value) + share + small(results.bounds("variance", weighting, name))


def _about_intervals(results: Results) -> str:
    found = results.get("uncertainty")
    if not isinstance(found, dict):
        return "No intervals were computed in this run."
    sizes = ", ".join(f"{integer(found.get(f'n_{name}'))} {name}" for name in ("groups", "documents", "replicates"))
    return f"In small print: 95 % intervals, {found.get('method')} ({sizes})."


def _about_dashes(results: Results) -> str:
    reasons: dict[str, list[str]] = {}
    for weighting, words in WEIGHTINGS.items():
        reasons.setdefault(why_no_ratio(results, weighting), []).append(words)
    missing = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items() if reason)
    return f"An en dash: not defined ({missing})." if missing else ""


def variance_shares(results: Results, weighting: str) -> dict[str, float]:
    """Each part's share of the total, by its name in `PARTS`; empty where there is no variance to split."""
    parts = {part: results.number("variance", weighting, part) for part in PARTS}
    total = results.number("variance", weighting, "total")
    return {part: value / total for part, value in parts.items() if total and value is not None}


def _shares_chart(results: Results) -> str:
    """Shares of the total variance: a bar per weighting, split into the three parts."""
    rows = []
    for weighting, name in WEIGHTINGS.items():
        cells = ""
        for part, share in variance_shares(results, weighting).items():
            tip = f"{PARTS[part]}: {percent(share)}, {show(results.number('variance', weighting, part))} layers²"
            shown = percent(share) if share >= 0.08 else ""
            cells += f'<span class="{part}" style="flex:{share:.5f}" title="{escape(tip)}">{shown}</span>'
        cells = cells or '<span class="none">no variance to split</span>'
        rows.append(f'<div class="stack"><b>{escape(name)}</b><div>{cells}</div></div>')
    legend = "".join(f'<span><i class="swatch {part}"></i>{words}</span>' for part, words in PARTS.items())
    return (
        f'<div class="legend">{legend}</div>{"".join(rows)}'
        '<p class="axis">share of the total variance of the layer, by weighting; the two coloured parts add up to '
        "the aggregate variance</p>"
    )


def _ratio_chart(results: Results) -> str:
    """Aggregate over token-level variance on a logarithmic axis: three weightings, and the reference's number."""
    keys = [("variance", weighting, "aggregate_over_token") for weighting in WEIGHTINGS]
    names = zip(WEIGHTINGS.values(), keys, strict=True)
    rows = [(words, results.number(*key), results.bounds(*key)) for words, key in names]
    rows.append(("reference's formula (not variances)", results.reference_ratio, None))
    start, end = 0.8, 1.6 * max([2.0, *(value for _, value, _ in rows if value is not None)])

    def place(value: float) -> float:
        return math.log(value / start) / math.log(end / start)

    plot = Plot("Aggregate over token-level variance, by weighting and by the reference's formula.", 13)
    ticks = log_ticks(end, 6)
    for tick in ticks:
        plot.line([(place(tick), 0), (place(tick), 1)], "one" if tick == 1 else "grid")
    plot.x_ticks([(place(tick), f"{tick:,}") for tick in ticks], "aggregate / token-level variance (ratio, log scale)")
    for row, (words, value, bounds) in enumerate(rows):
        y = 1 - (row + 0.72) / len(rows)
        kind = "reference" if row == len(rows) - 1 else "ours"
        interval = f" ({between(bounds)})" if bounds else ""
        plot.text(place(1) + 0.015, y, f"{words}: {show(value)}{interval}", f"tag {kind}")
        if bounds:
            plot.line([(place(max(bound, start)), y) for bound in bounds], "interval")
        if value is not None:
            plot.mark(place(value), y, kind)
    return plot.render()
