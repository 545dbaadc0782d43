"""The command `train`: flags in, one line per error out, the summary on stdout with --json."""

import json
import sys
from collections.abc import Sequence

from store.console import run_command
from store.options import parse_options
from train.config import TrainConfig

_EPILOG = """\
examples:
  train --store acts.zarr --out ckpt.pt
  train --store acts.zarr --expansion-factor 64 --k 32 --epochs 1 --resume
  train --store acts.zarr --n-latents 9216 --batch-size 2048 --steps 600 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 usage, 3 incompatible, 130 interrupted."""

    def command() -> None:
        config = parse_options(
            TrainConfig,
            argv,
            prog="train",
            description="Train one multi-layer sparse autoencoder on a store of residual stream activations.",
            epilog=_EPILOG,
        )
        from train.loop import train
        from train.report import describe, summary

        result = train(config)
        print(describe(result), file=sys.stderr)
        if config.json:
            print(json.dumps(summary(result)))

    return run_command("train", command)


if __name__ == "__main__":
    sys.exit(main())
