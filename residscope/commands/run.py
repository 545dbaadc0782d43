"""`residscope run`: harvest and train at the same time, within a limit on disk space, with one command.

How: two child processes, `harvest --rolling` and `train --follow --resume`, write their lines and bars to the same
stderr. If either fails, both end, as they do at a signal or, on Linux, if this process dies; the same command
continues. Not here: how the two communicate (`store.care.ring`).
"""

import argparse
import ctypes
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from residscope.console import human_seconds, parse_bytes, run_command
from residscope.destinations import held_alone
from residscope.errors import IncompatibleError, UsageError, stage_failed
from residscope.options import CommandParser, parse_options, with_values

_POLL_SECONDS = 0.2
_RESERVED = {
    "train": ("--store", "--follow", "--resume", "--n-procs", "--shard-latents"),
    "harvest": ("--model", "--dataset", "--max-tokens", "--rolling", "--out"),
}
"""Flags of each side that `run` sets itself."""
_NEITHER = ("--overwrite", "--dry-run", "--help", "-h", "--version")
"""Flags that make no sense for one side of a run."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; `train` and `harvest` are lists of the words to pass on."""
    parser = CommandParser(
        prog="residscope run",
        description="Harvest and train at the same time, never storing more than --disk of activations. Other flags are"
        " passed to `train`. Run the same command again to continue.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="as `harvest --model` takes it")
    parser.add_argument("--dataset", required=True, nargs="+", help="as `harvest --dataset` takes it")
    parser.add_argument("--tokens", required=True, help="tokens to harvest, such as 1e9 or 1_000_000_000")
    parser.add_argument("--disk", required=True, help="maximum size of the store, such as 50GB")
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder for ckpt.pt and acts.zarr (run)")
    parser.add_argument("--store", type=Path, help="path of the store (OUT/acts.zarr); below /dev/shm: in memory")
    parser.add_argument("--harvest-flags", default="", help="further flags of `harvest`, quoted as one word")
    parser.add_argument("--dry-run", action="store_true", help="print bytes, hours and the slower side; write nothing")
    options, options.train = parser.parse_known_args(argv)
    try:
        options.tokens = int(float(options.tokens.replace("_", "")))
    except (ValueError, OverflowError):
        raise UsageError(f"--tokens should be a number such as 1e9, found {options.tokens!r}") from None
    if options.tokens < 1 or not parse_bytes(options.disk):
        found = f"{options.tokens} and {options.disk!r}"
        raise UsageError(f"--tokens should be at least 1, and --disk a size such as 50GB, found {found}")
    try:
        options.harvest = shlex.split(options.harvest_flags)
    except ValueError as error:
        raise UsageError(f"--harvest-flags {options.harvest_flags!r}: {str(error).lower()}") from None
    for side, flags in _RESERVED.items():
        words = [word.partition("=")[0].replace("--no-", "--") for word in getattr(options, side)]
        if taken := [word for word in words if word in (*flags, *_NEITHER)]:
            again = f". To start over, remove {_places(options)}" if taken[0] == "--overwrite" else ""
            reason = "does not take" if taken[0] in _NEITHER else "sets"
            raise UsageError(f"residscope run {reason} {taken[0]} of `{side}`: leave it out{again}")
    return options


def _places(options: argparse.Namespace) -> str:
    """Where the run's files are."""
    return f"the folder {options.out}" + (f" and the store {options.store}" if options.store else "")


def sides(options: argparse.Namespace) -> dict[str, list[str]]:
    """The two commands and their flags."""
    store = str(options.store or options.out / "acts.zarr")
    harvest = ["--model", options.model, "--dataset", *options.dataset, "--max-tokens", str(options.tokens)]
    harvest += ["--rolling", options.disk, "--out", store, *options.harvest]
    train = ["--store", store, "--out", str(options.out / "ckpt.pt"), "--follow", "--resume", *options.train]
    return {"harvest": harvest, "train": train}


def dry_run(commands: Mapping[str, Sequence[str]]) -> None:
    """Print what each side costs, both timed on this machine for some seconds: `harvest --dry-run`, and `train
    --dry-run` on a store of random vectors."""
    from harvest.config import HarvestConfig
    from harvest.estimate import estimate
    from harvest.result import print_result
    from residscope.commands.calibrate import try_training
    from train.config import TrainConfig
    from train.objective.recipes import batch_size
    from train.reporting.dry_run import describe

    store = estimate(parse_options(HarvestConfig, commands["harvest"], prog="harvest", description=""))
    config = parse_options(TrainConfig, commands["train"], prog="train", description="")
    layers = sorted(config.data.layers or store.layers)
    if missing := [str(layer) for layer in layers if layer not in store.layers]:
        raise UsageError(f"--layers: `harvest` does not store layer {' '.join(missing)}: see --harvest-flags")
    there = store.tokens * len(layers)
    batch = batch_size(config, there)
    steps = config.data.steps or -(-there // batch)
    vectors = steps * batch if config.data.steps else there
    if vectors > there or (config.data.epochs or 1) > 1:
        raise UsageError(f"each of the {store.tokens:,} tokens is trained on once: lower --steps or --epochs")
    step = try_training(with_values(config, batch_size=batch), layers, store.d_model)
    read, seconds = vectors * store.bytes_per_token // len(store.layers), steps * step.seconds_per_step
    known = {"vectors": vectors, "bytes_read": read, "shuffle_bytes": 2 * min(int(config.data.window_gb * 5e8), read)}
    print_result(store, dry_run=True, as_json=False)
    print()
    print(describe(replace(step, steps=steps, seconds=seconds, **known)))
    longer = "harvest" if store.seconds > seconds else "training"
    both = human_seconds(store.seconds + seconds)
    print(f"\nboth: about {both} if they share processors or a GPU; the {longer} takes longer")


def run(options: argparse.Namespace) -> None:
    """Run both until they end. Raises `ResidscopeError` with the exit code of the first that fails."""
    commands, began = sides(options), time.monotonic()
    if options.dry_run:
        dry_run(commands)
        return
    (lock := options.out / ".run").mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    on_death = prctl and partial(prctl, 1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    with held_alone(lock, options.out):
        try:
            for name, flags in commands.items():
                print(f"$ {shlex.join((name, *flags))}", file=sys.stderr, flush=True)
                # In its own session, so that only this process signals it on Ctrl-C. SIGTERM if this one is killed.
                command = [sys.executable, "-m", "residscope", name, *flags]
                running[name] = subprocess.Popen(command, start_new_session=True, preexec_fn=on_death)
            while None in (codes := {name: side.poll() for name, side in running.items()}).values():
                _require(codes, options)
                time.sleep(_POLL_SECONDS)
            _require(codes, options)
        finally:
            _end(running)
            with suppress(OSError):
                lock.rmdir()
    taken = human_seconds(time.monotonic() - began)
    made = ", ".join(map(str, sorted(options.out.glob("ckpt*.pt"))))  # A sweep makes several.
    print(f"{made}: trained within {options.disk} of activations in {taken}")


def _require(codes: Mapping[str, int | None], options: argparse.Namespace) -> None:
    """Raise `ResidscopeError` with the exit code of a side that failed, if one did."""
    for name, code in codes.items():
        if code:
            way_out = "once that is fixed, the same command continues both"
            if code in (UsageError.exit_code, IncompatibleError.exit_code):
                way_out = f"change what is named above, or, to start over, remove {_places(options)}"
            raise stage_failed(name, code, way_out)


def _end(running: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Stop those still running (with SIGTERM: background processes ignore Ctrl-C); a second Ctrl-C kills them."""
    try:
        for side in running.values():
            side.terminate()
        for side in running.values():
            side.wait()
    except KeyboardInterrupt:
        for side in running.values():
            side.kill()
            side.wait()
        raise


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("residscope run", lambda: run(parse(argv)))
