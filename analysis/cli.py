"""The `analyze` command."""

from collections.abc import Sequence

from analysis.config import AnalyzeConfig
from store.console import run_command
from store.options import parse_options

DESCRIPTION = """Measure how the latents of a multi-layer sparse autoencoder spread over layers, and how well it
reconstructs each.

  analyze --store acts.zarr --sae ckpt.pt
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `analyze`; returns the exit code."""

    def command() -> int:
        config = parse_options(AnalyzeConfig, argv, prog="analyze", description=DESCRIPTION)
        from analysis.run import analyze

        analyze(config)
        return 0

    return run_command("analyze", command)


if __name__ == "__main__":
    raise SystemExit(main())
