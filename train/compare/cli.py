"""`train compare`: autoencoders and PCA on the same held-out tokens, by layer. Tested in test_measure.py."""

import json
import sys
from collections.abc import Sequence

from residscope.console import run_command
from residscope.destinations import comparison, refuse_comparison_of
from residscope.options import parse_options
from train.compare.config import TrainCompareConfig

_EPILOG = """\
examples:
  train compare --store acts.zarr --sae ckpt.pt per-layer/
  train compare --store acts.zarr --sae sweep.*.pt --out comparison --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> None:
        config = parse_options(
            TrainCompareConfig,
            argv,
            prog="train compare",
            description="Compare autoencoders, for all layers or one for each, and PCA: FVU by layer, held-out tokens.",
            epilog=_EPILOG,
        )
        from store.folder import refuse_inside_store
        from train.compare.measure import compare
        from train.compare.report import as_json, words, write

        refuse_inside_store(config.out)
        refuse_comparison_of("analyze --compare", config.out, "schema_version")
        with comparison(config.out) as folder:
            result = compare(config)
            files = write(result, folder)
        print(json.dumps(as_json(result)) if config.json else words(result))
        print(f"train compare: written {', '.join(str(config.out / name) for name in files)}", file=sys.stderr)

    return run_command("train compare", command)
