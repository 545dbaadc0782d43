"""report.html: one self-contained page with the findings, the figures and every live latent of an analysis.

The page loads nothing: style, scripts and data are in it, and a content security policy forbids every request,
and every script but its own, by hash. Whatever comes from the files is escaped where a section puts it into HTML.
"""

import base64
import hashlib
from html import escape
from importlib import import_module
from pathlib import Path

from analysis.report.data import Results, load_results
from analysis.report.figures import write_figures
from analysis.report.header import page_header
from analysis.report.markup import Section, fill, page_file

SECTIONS = (
    *("variance", "layers", "persistence", "nulls", "kinds", "redundancy", "contexts"),
    *("reconstruction", "downstream", "latents", "prompt", "training", "provenance", "method"),
)
"""The page in order. Each name is a module of analysis/report/sections, whose `section` makes it, and its anchor."""


def write_report(out_dir: Path) -> Path:
    """Write the figures and report.html into `out_dir`, from the files of `analyze` there.

    Returns the page's path. Without matplotlib there are no figure files; the page draws its own and is complete.
    Raises ResidscopeError for a missing file, IncompatibleError for files of another schema_version.
    """
    results = load_results(out_dir)
    write_figures(results, out_dir)
    path = out_dir / "report.html"
    path.write_text(render_report(results), encoding="utf-8")
    return path


def render_report(results: Results) -> str:
    """The complete page as text; the same text for the same results."""
    modules = {name: import_module(f"analysis.report.sections.{name}") for name in SECTIONS}
    sections: dict[str, Section] = {name: module.section(results) for name, module in modules.items()}
    script = page_file("report.js") + page_file("latent.js") + page_file("prompt.js")
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
