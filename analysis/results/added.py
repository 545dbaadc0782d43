"""Adding to a finished analysis (prompts, explanations): the analysis is made first unless the folder already has that
of the same store and autoencoder, and its report is written again afterwards."""

import contextlib
import sys
from pathlib import Path

from analysis.config import AnalyzeConfig
from analysis.encoder import sae_hash
from analysis.inputs import Inputs
from analysis.report.data import load_results
from analysis.report.page import render_report
from analysis.results.folder import REPORT, SUMMARY
from analysis.results.summary import SCHEMA_VERSION, read_summary, version_of
from analysis.run import analyze
from residscope.errors import IncompatibleError
from residscope.options import with_values
from residscope.reading import read_json, reading
from store.files import atomic_write


def make_unless_there(config: AnalyzeConfig, inputs: Inputs) -> None:
    """Make the analysis of `inputs` in the output folder, unless it is already there."""
    if not has_analysis(config.out_dir, inputs):
        with contextlib.redirect_stdout(sys.stderr) if config.output.json else contextlib.nullcontext():
            analyze(with_values(config, json=False), inputs)


def require_there(config: AnalyzeConfig, inputs: Inputs) -> None:
    """Raise `IncompatibleError` if the output folder no longer holds that analysis."""
    if not has_analysis(config.out_dir, inputs):
        raise IncompatibleError(f"{config.out_dir}: another analysis was put there in the meantime; give another --out")


def has_analysis(out: Path, inputs: Inputs) -> bool:
    """Whether `out` holds a complete analysis of this store and autoencoder, by this version. Raises
    `IncompatibleError` if it is damaged: making it again would lose what was added to it."""
    if not (out / SUMMARY).is_file() or version_of(read_json(out / SUMMARY)) != SCHEMA_VERSION:
        return False
    provenance = read_summary(out / SUMMARY)["provenance"]
    with reading(f"{out / SUMMARY}: damaged", "run `analyze` again"):
        found = (provenance["store"]["content_hash"], provenance["sae"]["hash"])
    return found == (inputs.store.content_hash, sae_hash(inputs.sae))


def write_report_again(config: AnalyzeConfig) -> None:
    """Write report.html again, with what was added, unless --no-report was given."""
    if config.output.report:
        with reading(f"{config.out_dir}: the analysis there is damaged", "run `analyze` again"):
            page = render_report(load_results(config.out_dir))
            atomic_write(config.out_dir / REPORT, [page.encode(errors="replace")])
