"""Everything that an analysis leaves: its tables, summary.json, options, figures and report, and its words."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from analysis.config import AnalyzeConfig
from analysis.results import folder as files
from analysis.results import tables
from analysis.results.summary import Findings, build
from analysis.results.words import words
from residscope.options import to_flat, to_toml


def write_results(found: Findings, folder: Path) -> dict[str, Any]:
    """Write all files but the report's into `folder`; summary.json's content."""
    summary = build(found)
    columns = found.views.columns if found.views else {}
    tables.write_latents(folder / files.LATENTS, found.sums.moments, found.table, found.redundancy, columns)
    if found.redundancy:
        tables.write_redundancy(folder / files.REDUNDANCY, found.redundancy, found.table)
    tables.write_layers(folder / files.LAYERS, summary["layers"])
    (folder / files.SUMMARY).write_text(json.dumps(summary, indent=2, allow_nan=False), encoding="utf-8")
    (folder / files.CONFIG).write_text(to_toml(to_flat(found.config)), encoding="utf-8")
    return summary


def write_report_of(folder: Path) -> str | None:
    """Figures and report.html of what is in `folder`; the reason if there are none."""
    try:
        from analysis.report.page import write_report

        write_report(folder)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return "No figures, no report.html: they need matplotlib; get the plots extra: pip install 'residscope[plots]'."
    return None


def tell(config: AnalyzeConfig, summary: dict[str, Any], missing: str | None) -> None:
    """Print the findings; with --json on stderr, and summary.json on stdout. missing: what `write_report_of` gave."""
    say = partial(print, file=sys.stderr) if config.output.json else print
    say(words(summary))
    if missing:
        say(missing)
    written = sorted(path.name for path in config.out_dir.iterdir() if path.name in files.FILES)
    say(f"Written to {config.out_dir}: {', '.join(written)}.")
    if config.output.json:
        print(json.dumps(summary, allow_nan=False))
