"""The command `residscope fit-lens`. Imports nothing heavy before the options are read; tested in test_fit.py."""

from collections.abc import Sequence

from harvest.lens.config import FitLensConfig
from residscope.console import run_command
from residscope.options import parse_options

COMMAND = "residscope fit-lens"

DESCRIPTION = """\
Fit a tuned lens: one affine map per layer from its residual stream to the last layer's, by ridge
regression and then by minimising the KL divergence to the model's final logits. Prints, for held-out
documents, the KL of each layer without a map, with the ridge map and with the trained map, and writes
the format of published lenses, for `harvest --lens`."""

EPILOG = """\
examples:
  residscope fit-lens --model smollm2-135m --dataset pydoc --max-tokens 50000 --out lens
  residscope fit-lens --model pythia-1b --store acts.zarr --method ridge --out lens
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own); returns the exit code."""

    def command() -> None:
        config = parse_options(FitLensConfig, argv, prog=COMMAND, description=DESCRIPTION, epilog=EPILOG)
        from harvest.lens.fit import fit_lens
        from harvest.lens.result import print_fit

        print_fit(fit_lens(config), as_json=config.json)

    interrupted = "interrupted; nothing was written. Run the same command to start again"
    return run_command(COMMAND, command, interrupted=interrupted)
