"""The command `train`: flags in, one line per error out, the summary on stdout with --json."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from residscope.console import run_command
from residscope.options import parse_options
from train.config import TrainConfig

_EPILOG = """\
examples:
  train --store acts.zarr --out ckpt.pt
  train --store acts.zarr --expansion-factor 64 --k 32 --epochs 1 --resume
  train --store acts.zarr --sweep k=16,32,64 expansion_factor=8,16 --out sweep.pt
  train --store acts.zarr --per-layer total --out layers/
  train compare --store acts.zarr --sae ckpt.pt layers/          (`train compare --help`)
  train --store acts.zarr --n-latents 9216 --batch-size 2048 --steps 600 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code: 0 done, 1 failed, 2 usage, 3 incompatible, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["compare"]:
        from train.compare.cli import main as compare

        return compare(words[1:])

    def command() -> None:
        config = parse_options(
            TrainConfig,
            words,
            prog="train",
            description="Train one multi-layer sparse autoencoder on a store of residual stream activations.",
            epilog=_EPILOG,
        )
        from train.parallel.launch import joined
        from train.reporting import dry_run
        from train.reporting.report import describe, summary, table_of, write_table
        from train.run import train_all, try_run

        with joined(config, words) as ranks:
            foreseen = try_run(config, ranks) if config.dry_run else None
            results = [] if foreseen else train_all(config, ranks)
        if not ranks.first:
            return
        if foreseen:
            print(json.dumps(asdict(foreseen)) if config.json else dry_run.describe(foreseen))
            return
        print(describe(results[0]) if len(results) == 1 else table_of(results), file=sys.stderr)
        table = write_table(config.out, results) if config.sweep or config.per_layer else None
        if table is not None:
            print(f"table: {table}", file=sys.stderr)
        if config.json:
            runs = [summary(result) for result in results]
            print(json.dumps({"table": str(table), "runs": runs} if table else runs[0]))

    rank, size, *place = (os.environ.get(n, "") for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    # Only the first of several processes prints; so does one that cannot be one of them, after a leftover variable.
    silent = all(place) and rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size)
    out, err = (None, None) if silent else (sys.stdout, sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return run_command("train", command)
