"""Entry points of `residscope` and the three commands, whose modules are loaded only when needed.

`residscope verify` is here too; the checking and repairing itself is in store/care/.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from residscope.commands.info import info
from residscope.console import counted, run_command
from residscope.options import CommandParser
from residscope.urls import as_path

COMMANDS = {
    "harvest": ("harvest.cli", "write the residual stream of a model into a store"),
    "train": ("train.cli", "train a multi-layer sparse autoencoder on a store"),
    "compare": ("train.compare.cli", "compare autoencoders and PCA on held-out tokens, by FVU at each layer"),
    "analyze": ("analysis.cli", "measure how the latents of an autoencoder spread over layers"),
    "explore": ("analysis.explore.cli", "browse an analysis and its model on a local web page"),
    "fit-lens": ("harvest.lens.cli", "fit a tuned lens: a map per layer into the last layer's basis"),
    "convert": ("train.formats.cli", "read and write autoencoders in the formats of other tools"),
    "plan": ("residscope.commands.plan", "estimate the bytes, memory and hours of a run in advance"),
    "run": ("residscope.commands.run", "harvest and train at the same time, within a limit on disk space"),
    "demo": ("residscope.commands.demo", "harvest, train and analyze on a small model, from start to end"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[words[0]][0])
        return module.main(words[1:])
    arguments = _parser().parse_args(words)
    if arguments.command == "info":
        run = info
    else:
        run = _repair if arguments.repair else _verify
    return run_command(f"residscope {arguments.command}", lambda: run(as_path(arguments.store), arguments.json))


def _command(name: str) -> Callable[[], int]:
    """What the script `name` calls; it is here so that our packages are found before others with the same names."""
    return lambda: main([name, *sys.argv[1:]])


harvest, train, analyze = map(_command, ("harvest", "train", "analyze"))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="residscope", description="Look at a store, check it, or run a command.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("info", "what a store holds"),
        ("verify", "check every file of a store; list what is damaged or missing, with exit code 1"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("store", metavar="STORE", help="folder or URL of the store")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        if name == "verify":
            text = "recompute bad and missing shards with the model, and compare their hashes with the old ones"
            command.add_argument("--repair", action="store_true", help=text)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _verify(path: Path, as_json: bool) -> int:
    from store.care.verify import verify

    bad = verify(path)
    if as_json:
        print(json.dumps({"path": str(path), "bad": _as_json(bad)}))
        return 1 if bad else 0
    _print_faults(bad)
    faults = [found for found in bad if not found.to_come]
    print(f"{path}: {counted(len(faults), 'fault') if faults else 'not whole yet' if bad else 'complete'}")
    if faults and not any(found.lasting for found in faults):
        print(f"`residscope verify {path} --repair` recomputes the bad shards with the store's model", file=sys.stderr)
    return 1 if bad else 0


def _repair(path: Path, as_json: bool) -> None:
    from store.care.repair import repair

    # harvest.refill imports torch, which is needed only if there are bad shards.
    done = repair(path, lambda store: importlib.import_module("harvest.refill").prepare(store))
    if as_json:
        repaired = {"bad": _as_json(done.found), "refilled": done.refilled, "proven": done.proven}
        print(json.dumps({"path": str(path), **repaired}))
        return
    _print_faults(done.found)
    recomputed = f"{counted(len(done.refilled), 'shard')} recomputed"
    print(f"{path}: complete; {recomputed}, {len(done.proven)} of them with the same hashes as before")


def _as_json(bad: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"shard": fault.index, "reason": fault.reason} for fault in bad]


def _print_faults(bad: Sequence[Any]) -> None:
    for fault in bad:
        print(fault.reason if fault.index is None else f"shard {fault.index}: {fault.reason}")
