"""The command `harvest`. Imports nothing heavy before the options are read."""

from collections.abc import Sequence

from harvest.config import HarvestConfig
from residscope.console import run_command
from residscope.options import parse_options

DESCRIPTION = """\
Run text through a causal language model and store the residual stream after every block
(before the final norm), for `train` and `analyze`. Running the same command again continues
a run that was stopped."""

EPILOG = """\
examples:
  harvest --model smollm2-135m --dataset pydoc --max-tokens 50000 --out acts.zarr
  harvest --model pythia-1b --max-tokens 1000000 --layers 0-7 --out acts.zarr --dry-run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `harvest` with `argv` (default: the process's own); returns the exit code (residscope.errors)."""

    def command() -> None:
        config = parse_options(HarvestConfig, argv, prog="harvest", description=DESCRIPTION, epilog=EPILOG)
        if config.dry_run:
            from harvest.estimate import estimate as run
        else:
            from harvest.run import harvest as run
        from harvest.result import print_result

        print_result(run(config), dry_run=config.dry_run, as_json=config.json)

    return run_command("harvest", command, interrupted="interrupted; run the same command to continue")
