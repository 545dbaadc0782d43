"""The sections of the report: functions of `Results` that fill the templates of templates/ with escaped text.

A section says what its numbers mean in which direction they are better, and why one is missing. A new view is a new
function and template, added to `SECTIONS`. Which words state a finding is decided in `analysis.report.data`, how a
chart looks in `analysis.report.charts`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from analysis.report.charts import fvu_chart, l0_chart, layer_profile_chart, ratio_chart, variance_chart
from analysis.report.contexts import contexts_section
from analysis.report.data import (
    EN_DASH,
    PARTS,
    WEIGHTINGS,
    Results,
    between,
    finite,
    headline,
    heat_map,
    integer,
    layer_profile_title,
    percent,
    ratio_title,
    reconstruction_title,
    show,
    variance_title,
    why_no_ratio,
)
from analysis.report.downstream import downstream_section
from analysis.report.prompt import prompt_section
from analysis.report.structure import KINDS, kinds_section, nulls_section, persistence_section, redundancy_section
from analysis.report.template import Section, fill, page_file

LAYER_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("fvu", "FVU", show),
    ("validation_fvu", "FVU, held-out", show),
    ("pca_fvu", "FVU of PCA, held-out", show),
    ("mse", "MSE", show),
    ("l0", "L0", show),
    ("mean_norm", "Mean norm", show),
    ("cosine_to_next", "Cosine to next", show),
    ("active_latents", "Active latents", integer),
    ("mass_share", "Mass share", percent),
)
"""Columns of layers.parquet in the table by layer: name, heading, and how a value is shown."""


def page_header(results: Results) -> str:
    """What a reader should know who reads nothing else: the finding, its direction, its tokens, its warnings."""
    reference = results.reference_ratio
    if reference is None:
        other = "The reference's formula gives no number here: its rel_var_t is zero or not defined."
    else:
        other = (
            f"The reference's formula reads {show(reference)} on the same codes, but what it divides are not "
            'variances: <a href="#variance">why they differ</a>.'
        )
    return fill(
        "header.html",
        model=escape(str(results.get("provenance", "store", "model") or "unnamed model")),
        dataset=escape(str(results.get("provenance", "store", "dataset") or "unnamed text")),
        headline=escape(headline(results)),
        aggregate=show(results.number("variance", "mass", "aggregate")),
        token=show(results.number("variance", "mass", "within_token")),
        reference=other,
        tokens=escape(str(results.get("split", "text") or f"{integer(results.get('n_tokens'))} tokens.")),
        warnings="".join(f'<p class="warning">{_flags(warning)}</p>' for warning in _warnings(results)),
        tiles="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(words)}</small></dd></div>"
            for name, value, words in _tiles(results)
        ),
    )


def _tiles(results: Results) -> list[tuple[str, str, str]]:
    """The headline numbers: name, value, and a few words on unit, direction or interval."""
    bounds = results.interval("mass", "aggregate_over_token")
    live, n_latents = results.number("latents", "active") or 0.0, results.number("n_latents") or 0.0
    share = f" ({percent(live / n_latents)})" if n_latents else ""
    held_out, fvu_bounds = results.number("validation_fvu"), results.bounds("reconstruction", "fvu")
    k = integer(results.get("provenance", "sae", "k"))
    return [
        (
            "Aggregate / token-level variance",
            show(results.number("variance", "mass", "aggregate_over_token")),
            f"95 % interval {between(bounds)}" if bounds else why_no_ratio(results) or "no interval computed",
        ),
        ("The same by the reference's formula", show(results.reference_ratio), "not a ratio of variances"),
        ("Tokens", integer(results.get("n_tokens")), f"in {integer(results.get('split', 'n_documents'))} documents"),
        ("Live latents", integer(live), f"of {integer(n_latents)}{share}"),
        (
            "FVU, mean over layers",
            show(results.number("reconstruction", "fvu")),
            "lower is better"
            + (f"; 95 % interval {between(fvu_bounds)}" if fvu_bounds else "")
            + (f"; held-out text {show(held_out)}" if held_out is not None else ""),
        ),
        ("L0", show(results.number("reconstruction", "l0")), f"active latents per vector; k = {k}"),
    ]


def _warnings(results: Results) -> list[str]:
    """The summary's own warnings, and one about training tokens where it has none."""
    warnings = [str(warning) for warning in results.get("warnings") or []]
    trained = results.get("split", "trained_on")
    if not warnings and trained in ("some", "all"):
        warnings.append("The SAE was trained on some of these tokens: numbers on held-out text may be worse.")
    elif not warnings and trained == "unknown":
        warnings.append("It is not known whether the SAE was trained on these tokens.")
    return warnings


def _flags(words: str) -> str:
    """Escaped text with its command-line flags set as code, so that no line ends inside one."""
    return re.sub(r"--[\w-]+", r"<code>\g<0></code>", escape(words))


def _variance_section(results: Results) -> Section:
    names = {**PARTS, "total": "total", "aggregate": "aggregate", "aggregate_over_token": "aggregate / token-level"}
    rows = []
    for name, words in names.items():
        cells = ""
        for weighting in WEIGHTINGS:
            value, total = (results.number("variance", weighting, key) for key in (name, "total"))
            share = f" ({percent(value / total)})" if name in PARTS and total and value is not None else ""
            bounds = between(results.interval(weighting, name))
            cells += f"<td>{show(value)}{share}<small>{bounds}</small></td>"
        strong = ' class="strong"' if name == "aggregate_over_token" else ""
        rows.append(f"<tr{strong}><th>{words}</th>{cells}</tr>")
    reasons: dict[str, list[str]] = {}
    for weighting, words in WEIGHTINGS.items():
        reasons.setdefault(why_no_ratio(results, weighting), []).append(words)
    missing = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items() if reason)
    compat = [(name, results.number("variance", "mlsae_compat", name)) for name in COMPAT]
    compat.append(("1 / rel_var_t", results.reference_ratio))
    uncertainty = results.get("uncertainty")
    if isinstance(uncertainty, dict):
        sizes = ", ".join(f"{integer(uncertainty.get(f'n_{name}'))} {name}" for name in UNCERTAINTY_SIZES)
        how = f"Small numbers: 95 % intervals, {uncertainty.get('method')} ({sizes})."
    else:
        how = "No intervals were computed in this run."
    body = fill(
        "variance.html",
        shares_title=escape(variance_title(results)),
        shares_chart=variance_chart(results),
        ratio_title=escape(ratio_title(results)),
        ratio_chart=ratio_chart(results),
        interval_note="Bars, and numbers in brackets: 95 % intervals." if isinstance(uncertainty, dict) else "",
        weightings="".join(f"<th>{escape(words)}</th>" for words in WEIGHTINGS.values()),
        rows="".join(rows),
        uncertainty=escape(how),
        missing=escape(f"An en dash: not defined ({missing})." if missing else ""),
        compat="".join(f"<tr><th><code>{name}</code></th><td>{show(value)}</td></tr>" for name, value in compat),
    )
    return Section("variance", "Variance of the layer", body)


COMPAT = ("exp_var_l_tf", "exp_var_l_f", "var_l", "rel_var_f", "rel_var_t")
UNCERTAINTY_SIZES = ("groups", "documents", "replicates")


def _layers_section(results: Results) -> Section:
    heat = heat_map(results)
    if heat.n_latents == 0:
        return Section("layers", "Where latents are active", f"<p>{escape(layer_profile_title(results))}.</p>")
    binned = f"A column is the mean of {show(heat.per_bin, 2)} latents that are neighbours in this order."
    body = fill(
        "layers.html",
        title=escape(layer_profile_title(results)),
        chart=layer_profile_chart(results),
        columns=binned if heat.per_bin > 1 else "A column is a live latent.",
        widest=show(np.std(results.layer_numbers), 2),
    )
    return Section("layers", "Where latents are active", body)


def _reconstruction_section(results: Results) -> Section:
    rows = []
    for i, layer in enumerate(results.layer_numbers):
        cells = "".join(
            f"<td>{form(results.layers[name][i])}{_fvu_bounds(results, i) if name == 'fvu' else ''}</td>"
            for name, _, form in LAYER_COLUMNS
        )
        rows.append(f"<tr><th>{layer}</th>{cells}</tr>")
    missing = ["the last layer has no next one"]
    if results.get("validation") is None:
        missing.append("this run has no held-out tokens")
    if results.get("baseline", "pca") is None:
        missing.append("the PCA baseline was not computed")
    body = fill(
        "reconstruction.html",
        fvu_title=escape(reconstruction_title(results)),
        fvu_chart=fvu_chart(results),
        l0_title=f"On average {show(results.number('reconstruction', 'l0'))} latents are active in a vector",
        l0_chart=l0_chart(results),
        columns="".join(f"<th>{escape(words)}</th>" for _, words, _ in LAYER_COLUMNS),
        rows="".join(rows),
        missing=escape("; ".join(missing)),
    )
    return Section("reconstruction", "Reconstruction by layer", body)


def _fvu_bounds(results: Results, i: int) -> str:
    """The 95 % interval of a layer's FVU, small; empty where there is none."""
    bounds = [finite(results.layers[name][i]) for name in ("fvu_low", "fvu_high") if name in results.layers]
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
        return ""
    return f"<small>{between((bounds[0], bounds[1]))}</small>"


def _latents_section(results: Results) -> Section:
    if len(results.counts) == 0:
        return Section("latents", "Latents", "<p>No latent fired in these tokens, so there is none to show.</p>")
    kinds = "".join(f"<option>{kind}</option>" for kind in KINDS) if len(results.kinds) else ""
    return Section("latents", "Latents", fill("latents.html", kinds=kinds))


def _provenance_section(results: Results) -> Section:
    tables = []
    for title, key in (("Activations", "store"), ("Autoencoder", "sae"), ("Analysis", "analysis")):
        facts = results.get("provenance", key)
        rows = "".join(
            f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{_value(value)}</td></tr>"
            for name, value in _flat(facts if isinstance(facts, dict) else {})
        )
        tables.append(f'<div><h3>{title}</h3><table class="facts"><tbody>{rows}</tbody></table></div>')
    seconds = results.number("seconds")
    took = f"The analysis took {show(seconds)} s." if seconds is not None else ""
    return Section("provenance", "Provenance", fill("provenance.html", tables="".join(tables), took=took))


def _flat(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}: {inner}", item) for inner, item in _flat(value))
        else:
            yield name, value


def _value(value: Any) -> str:
    """A recorded value as escaped HTML; runs of whole numbers as "0 to 29"."""
    if value is None or value == "":
        return EN_DASH
    if isinstance(value, list):
        if len(value) > 2 and value == list(range(value[0], value[0] + len(value))):
            return f"{value[0]} to {value[-1]}"
        return escape(", ".join(str(item) for item in value)) or EN_DASH
    if isinstance(value, float):
        return show(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"<code>{escape(value)}</code>" if isinstance(value, str) else escape(str(value))


def _method_section(_: Results) -> Section:
    return Section("method", "Method", page_file("method.html"))


SECTIONS: Sequence[Callable[[Results], Section]] = (
    _variance_section,
    _layers_section,
    persistence_section,
    nulls_section,
    kinds_section,
    redundancy_section,
    contexts_section,
    _reconstruction_section,
    downstream_section,
    _latents_section,
    prompt_section,
    _provenance_section,
    _method_section,
)
"""The page, in order."""
