"""The `analyze` command."""

import sys
from collections.abc import Sequence

from analysis.config import AnalyzeConfig, CompareConfig
from residscope.console import run_command
from residscope.errors import UsageError
from residscope.options import parse_options

DESCRIPTION = """Measure how the latents of a multi-layer sparse autoencoder spread over layers, and how well it
reconstructs each.

  analyze --store acts.zarr --sae ckpt.pt
  analyze --store acts.zarr --sae ckpt.pt --prompt "When Mary and John went to the store"
  analyze --compare A.analysis B.analysis --out comparison    (analyses side by side; --help after it says more)
"""

COMPARE_DESCRIPTION = """Put analyses side by side: one table and one figure, with variances over that of an evenly
drawn layer, so that models of different depth can be compared.

  analyze --compare A.analysis B.analysis C.analysis --out comparison
"""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)

    def compare_command() -> None:
        arguments = ["--help"] if {"-h", "--help"} & set(words) else words  # so that --compare may lack its folders
        config = parse_options(CompareConfig, arguments, prog="analyze", description=COMPARE_DESCRIPTION)
        from analysis.compare.measure import compare

        compare(config)

    def command() -> None:
        config = parse_options(AnalyzeConfig, words, prog="analyze", description=DESCRIPTION)
        delphi = config.delphi.export_delphi or config.delphi.delphi_scores
        if delphi and config.prompts.prompt:
            raise UsageError("give --prompt and delphi's flags one after the other: each adds to the same analysis")
        if config.prompts.prompt:
            from analysis.prompt.run import analyze_prompts as run
        elif delphi:
            from analysis.delphi.exchange import exchange_with_delphi as run
        else:
            from analysis.run import analyze as run
        run(config)

    comparing = any(word.partition("=")[0] == "--compare" for word in words)
    return run_command("analyze", compare_command if comparing else command)
