"""report.html: one self-contained page with the findings, the figures and every live latent of an analysis.

The page loads nothing: styles, scripts and data are inline, and a content security policy forbids every request and
every script but its own, which it allows by hash. Sections escape whatever they take from the files. The page opens
with the finding in one sentence, the tokens it holds for, warnings, and the main numbers.
"""

import base64
import hashlib
from html import escape
from importlib import import_module
from pathlib import Path

from analysis.report.data import Results, load_results
from analysis.report.figures import write_figures
from analysis.report.markup import Section, between, fill, integer, page_file, percent, prose, show, tiles
from analysis.report.sections.variance import why_no_ratio

RATIO = ("variance", "mass", "aggregate_over_token")


def page_header(results: Results) -> str:
    """What a reader should know even if they read nothing else."""
    other = "The reference's formula gives no number here: its rel_var_t is zero or not defined."
    if results.reference_ratio is not None:
        other = (
            f"The reference's formula gives {show(results.reference_ratio)} on the same codes, but the quantities it "
            'divides are not variances: <a href="#variance">why they differ</a>.'
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
        settled=_settled(results),
        warnings="".join(f'<p class="warning">{prose(words)}</p>' for words in results.summary["warnings"]),
        tiles=tiles(_main_numbers(results)),
    )


def _settled(results: Results) -> str:
    words = escape(results.get("convergence", "text") or "")
    kind = "note" if results.get("convergence", "last_quarter", "settled") else "warning"
    return words and f'<p class="{kind}">{words}</p>'


def headline(results: Results) -> str:
    """The main finding in one plain sentence."""
    if (ratio := results.number(*RATIO)) is None:
        return f"Aggregate over token-level variance is not defined here: {why_no_ratio(results)}."
    return f"The variance of a latent's layer is {show(ratio)} times as large over all tokens as at a single token."


def _main_numbers(results: Results) -> list[tuple[str, str, str]]:
    """Name, value, and a few words on the unit, direction or interval of each."""
    ratio_bounds, fvu_bounds = results.bounds(*RATIO), results.bounds("reconstruction", "fvu")
    live, n_latents = results.number("latents", "active") or 0.0, results.number("n_latents") or 0.0
    held_out = results.number("validation_fvu")
    ratio_words = f"95 % interval {between(ratio_bounds)}" if ratio_bounds else why_no_ratio(results)
    live_words = f"of {integer(n_latents)}" + (f" ({percent(live / n_latents)})" if n_latents else "")
    few = results.number("reconstruction", "fvu_without_few")
    fvu_words = (
        "lower is better"
        + (f"; 95 % interval {between(fvu_bounds)}" if fvu_bounds else "")
        + (f"; without outlier tokens {show(few)}" if few is not None else "")
        + (f"; held-out text {show(held_out)}" if held_out is not None else "")
    )
    k = results.get("provenance", "sae", "k")
    k_words = "active latents per vector" + (f"; k = {integer(k)}" if k else "")
    return [
        ("Aggregate / token-level variance", show(results.number(*RATIO)), ratio_words or "no interval computed"),
        ("The same ratio by the reference's formula", show(results.reference_ratio), "not a ratio of variances"),
        ("Tokens", integer(results.get("n_tokens")), f"in {integer(results.get('split', 'n_documents'))} documents"),
        ("Live latents", integer(live), live_words),
        ("FVU, mean over layers", show(results.number("reconstruction", "fvu")), fvu_words),
        ("L0", show(results.number("reconstruction", "l0")), k_words),
    ]


SECTIONS = (
    *("variance", "latents", "prompt", "layers", "persistence", "nulls", "kinds", "redundancy", "contexts"),
    *("reconstruction", "downstream", "training", "provenance", "method"),
)
"""The sections in page order. Each name is a module of analysis/report/sections, which makes it, and its anchor."""


def write_report(out_dir: Path) -> Path:
    """Write the figures and report.html into `out_dir`, from the files that `analyze` wrote there.

    Returns the page's path. Without matplotlib no figure files are written; the page draws its own and is complete.
    Raises ResidscopeError for a missing file, IncompatibleError for files with another schema_version.
    """
    results = load_results(out_dir)
    write_figures(results, out_dir)
    path = out_dir / "report.html"
    path.write_text(render_report(results), encoding="utf-8", errors="replace")
    return path


def render_report(results: Results) -> str:
    """The complete page as text; the same text for the same results."""
    modules = {name: import_module(f"analysis.report.sections.{name}") for name in SECTIONS}
    sections: dict[str, Section] = {name: module.section(results) for name, module in modules.items()}
    script = "".join(map(page_file, ("report.js", "search.js", "latent.js", "prompt.js")))
    model = results.get("provenance", "store", "model") or "unnamed model"
    return fill(
        "report.html",
        title=escape(f"{model}: how its latents spread over layers"),
        css=page_file("report.css"),
        header=page_header(results),
        nav="".join(f'<a href="#{name}">{escape(section.title)}</a>' for name, section in sections.items()),
        sections="\n".join(
            f'<section id="{name}"><h2>{escape(section.title)}</h2>{section.body}</section>'
            for name, section in sections.items()
        ),
        version=escape(str(results.get("provenance", "analysis", "versions", "residscope") or "")),
        data="".join(section.data for section in sections.values()),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
