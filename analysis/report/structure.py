"""The report's sections on structure: persistence along the layers, null models, kinds of profiles, and redundancy.

Sections as in `analysis.report.sections`, in a module of their own. Each says why it is empty where an analysis was
made without its numbers.
"""

from html import escape

import numpy as np

from analysis.report.charts import layer_ticks, lines_chart
from analysis.report.data import Results, between, integer, percent, show
from analysis.report.template import Section, fill

MEANS = (
    ("n_layers_active", "layers active", "layers"),
    ("onset", "onset, first active layer", "layer"),
    ("offset", "offset, last active layer", "layer"),
    ("run_length", "longest run", "layers"),
    ("n_runs", "runs: times it switches on", "runs"),
    ("contiguity", "contiguity", "0 to 1"),
    ("unbroken", "unbroken: on once, on until off", "share"),
    ("single_layer", "active at one layer only", "share"),
    ("contiguity_multi", "contiguity, the others", "0 to 1"),
    ("unbroken_multi", "unbroken, the others", "share"),
    ("stays_on", "stays on at the next layer", "share"),
)
"""Numbers of `persistence`: name, words and unit."""

NULL_ROWS = (
    ("variance", "within_token", "variance within a token, layers²"),
    ("variance", "between_tokens", "variance between tokens, layers²"),
    ("variance", "between_latents", "variance between latents, layers²"),
    ("variance", "aggregate_over_token", "aggregate / token-level"),
    *(("persistence", name, words) for name, words, _ in MEANS if name not in ("onset", "offset")),
)
"""Rows of the null models' table: part of the summary, name and words."""

KINDS = ("early", "middle", "late", "persistent", "bimodal")


def persistence_section(results: Results) -> Section:
    """When latents switch on and off along the layers of a token."""
    anchor, title = "persistence", "Switching on, staying on"
    if results.number("persistence", "mass", "n_layers_active") is None:
        reason = (
            "no latent fired in these tokens" if results.get("persistence") else "this analysis holds no such numbers"
        )
        return Section(anchor, title, f"<p>Not shown: {reason}.</p>")
    rows = ""
    for name, words, unit in MEANS:
        cells = "".join(
            f"<td>{show(results.number('persistence', w, name))}"
            f"<small>{between(results.bounds('persistence', w, name))}</small></td>"
            for w in ("mass", "equal")
        )
        rows += f"<tr><th>{escape(words)}</th>{cells}<td>{unit}</td></tr>"
    unbroken = results.number("persistence", "mass", "unbroken_multi")
    shares = {name: _shares(results, "persistence", "mass", "distributions", name) for name in DISTRIBUTIONS}
    n_layers = len(results.layer_numbers)
    single = percent(results.number("persistence", "mass", "single_layer"))
    onset, offset = (show(results.number("persistence", "mass", name)) for name in ("onset", "offset"))
    body = fill(
        "persistence.html",
        length_title=f"{single} of activity is of a latent that is on at one layer only"
        + (f"; of the rest, {percent(unbroken)} is on without a break" if unbroken is not None else ""),
        length_chart=lines_chart(
            [(shares["n_layers_active"], "layers active", "other"), (shares["run_length"], "longest run", "ours")],
            "share of pairs",
            layer_ticks(range(1, n_layers + 1)),
            "layers",
            13,
        ),
        onset_title=f"On average on from layer {onset} to layer {offset}",
        onset_chart=lines_chart(
            [(shares["onset"], "onset", "ours"), (shares["offset"], "offset", "other")],
            "share of pairs",
            layer_ticks(results.layer_numbers),
            "layer (after block)",
            13,
        ),
        rows=rows,
        pairs=integer(results.get("persistence", "n_pairs")),
        missing="" if unbroken is not None else "An en dash: every pair is active at one layer only.",
    )
    return Section(anchor, title, body)


DISTRIBUTIONS = ("n_layers_active", "run_length", "onset", "offset")


def nulls_section(results: Results) -> Section:
    """What chance would give, and how many times that was observed."""
    anchor, title = "nulls", "Against chance"
    if not results.get("nulls") or results.number("persistence", "mass", "n_layers_active") is None:
        return Section(
            anchor, title, "<p>Not shown: this analysis was made without null models, or no latent fired.</p>"
        )
    rows = ""
    for part, name, words in NULL_ROWS:
        cells = f"<td>{show(results.number(part, 'mass', name))}</td>"
        for null in ("layers_permuted", "tokens_permuted"):
            ratio = ("nulls", null, "ratio", part, "mass", name)
            cells += f"<td>{show(results.number('nulls', null, part, 'mass', name))}</td>"
            cells += f"<td>{show(results.number(*ratio))}<small>{between(results.bounds(*ratio))}</small></td>"
        rows += f"<tr><th>{escape(words)}</th>{cells}</tr>"
    stays = results.number("nulls", "layers_permuted", "ratio", "persistence", "mass", "stays_on")
    within = results.number("nulls", "layers_permuted", "ratio", "variance", "mass", "within_token")
    series = [(_shares(results, "persistence", "mass", "distributions", "run_length"), "observed", "ours")]
    for null, words, kind in (
        ("layers_permuted", "layers permuted", "null dashed"),
        ("tokens_permuted", "tokens permuted", "other dotted"),
    ):
        series.append((_shares(results, "nulls", null, "distributions", "mass", "run_length"), words, kind))
    body = fill(
        "nulls.html",
        chunk=f"{integer(results.get('nulls', 'chunk_tokens'))} tokens",
        title=f"Latents stay on {show(stays)} times as often, and spread {show(within)} times as widely, "
        "as with layers permuted",
        chart=lines_chart(
            series, "share of pairs", layer_ticks(range(1, len(results.layer_numbers) + 1)), "layers in a row", 13
        ),
        rows=rows,
    )
    return Section(anchor, title, body)


def kinds_section(results: Results) -> Section:
    """Latents by kind of layer profile."""
    anchor, title = "kinds", "Kinds of latents"
    if not results.get("profiles") or len(results.kinds) == 0:
        return Section(anchor, title, "<p>Not shown: this analysis holds no kinds, or no latent fired.</p>")
    n_live, rows, series = len(results.kinds), "", []
    for kind in KINDS:
        number = results.number("profiles", kind, "latents") or 0
        share = results.get("profiles", kind, "mass_share")
        rows += f"<tr><th>{kind}</th><td>{integer(number)}</td><td>{percent(number / n_live)}</td>"
        rows += f"<td>{percent(share)}</td></tr>"
        members = results.probs[results.kinds == kind]
        if len(members):
            series.append((members.mean(axis=0), kind, kind))
    most = max(KINDS, key=lambda kind: results.number("profiles", kind, "latents") or 0)
    share = percent((results.number("profiles", most, "latents") or 0) / n_live)
    chart = lines_chart(series, "mean P(layer | latent)", layer_ticks(results.layer_numbers), "layer (after block)", 14)
    return Section(
        anchor, title, fill("kinds.html", title=f"{share} of live latents are {most}", chart=chart, rows=rows)
    )


def redundancy_section(results: Results) -> Section:
    """How alike decoder rows are, and which pairs."""
    anchor, title = "redundancy", "Redundancy"
    if not results.get("redundancy"):
        return Section(anchor, title, "<p>Not shown: this analysis was made without comparing decoder rows.</p>")
    number = {
        name: results.number("redundancy", name)
        for name in ("mmcs", "parallel_pairs", "redundant_pairs", "redundant_latents")
    }
    tiles = (
        ("MMCS", show(number["mmcs"]), "lower is less redundant; 1: every latent has a parallel one"),
        ("Near-parallel pairs", integer(number["parallel_pairs"]), "of live latents"),
        ("Redundant pairs", integer(number["redundant_pairs"]), "near-parallel, with disjoint layer profiles"),
        ("Latents in one", integer(number["redundant_latents"]), f"of {integer(len(results.counts))} live latents"),
    )
    rows = "".join(
        f"<tr><th>{pair['latent_a']}</th><td>{pair['latent_b']}</td><td>{show(pair['cosine'])}</td>"
        f"<td>{show(pair['overlap'])}</td><td>{show(pair['layer_mean_a'])}</td><td>{show(pair['layer_mean_b'])}</td></tr>"
        for pair in results.pairs
    )
    table = (
        '<div class="scroll"><table class="numbers"><thead><tr><th>latent a</th><th>latent b</th><th>cosine</th>'
        "<th>overlap of profiles</th><th>mean layer of a</th><th>mean layer of b</th></tr></thead>"
        f'<tbody>{rows}</tbody></table></div><p class="note">The foremost pairs, redundant ones first; '
        "redundancy.parquet holds more.</p>"
    )
    body = fill(
        "redundancy.html",
        threshold=show(results.get("redundancy", "cosine_threshold")),
        overlap=show(results.get("redundancy", "overlap_threshold")),
        tiles="".join(
            f"<div><dt>{name}</dt><dd>{value}<small>{words}</small></dd></div>" for name, value, words in tiles
        ),
        pairs=table if rows else "<p>No pair is near-parallel.</p>",
    )
    return Section(anchor, title, body)


def _shares(results: Results, *keys: str) -> np.ndarray:
    values = results.get(*keys)
    n_layers = len(results.layer_numbers)
    return np.asarray(values, np.float64) if isinstance(values, list) else np.full(n_layers, np.nan)
