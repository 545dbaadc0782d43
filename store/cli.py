"""`residscope`: look at a store, check it, or run one of the other commands.

How: `info` and `verify` are here; the other commands are looked up by name and loaded only when asked for. What it does
not do: read or check anything itself (activations.py, verify.py).
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from store.console import human_bytes, run_command

COMMANDS = {
    "harvest": ("harvest.cli", "write the residual stream of a model into a store"),
    "train": ("train.cli", "train a multi-layer sparse autoencoder on a store"),
    "analyze": ("analysis.cli", "measure how the latents of an autoencoder spread over layers"),
    "demo": ("analysis.demo", "all three on a small model, start to end"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's); gives the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[words[0]][0])
        return module.main(words[1:])
    arguments = _parser().parse_args(words)
    if arguments.command == "info":
        return run_command("residscope info", lambda: _info(arguments.store, arguments.json))
    return run_command("residscope verify", lambda: _verify(arguments.store, arguments.json))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="residscope", description="Look at a store, check it, or run a command.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("info", "what a store holds"),
        ("verify", "check every file of a store; exit code 1 and a list when something is damaged or missing"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("store", metavar="STORE", type=Path, help="folder of the store")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of words")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _info(path: Path, as_json: bool) -> int:
    from store.activations import ActivationStore

    store = ActivationStore.open(path, partial=True)
    meta, tokens, missing = store.meta, store.tokens, store.missing_shards()
    statistics = store.statistics()
    found: dict[str, Any] = {
        "path": str(path),
        **meta.to_attributes(),
        "n_kept": int(tokens.keep.sum()),
        "n_documents": int(tokens.document.max()) + 1,
        "n_shards": meta.n_shards,
        "missing_shards": missing,
        "bytes": sum(store.record(shard).bytes for shard in range(meta.n_shards) if shard not in missing),
        "content_hash": store.content_hash,
        "layer_norm": statistics.norm.tolist() if statistics.count else None,
    }
    if as_json:
        print(json.dumps(found))
        return 0
    rows = {
        "model": meta.provenance.get("model", "unknown"),
        "tokens": f"{meta.n_tokens:,} ({found['n_kept']:,} kept) of {found['n_documents']:,} documents, "
        f"in sequences of up to {meta.context_length:,}",
        "layers": f"{meta.n_layers} of {meta.n_model_layers}, d_model {meta.d_model}",
        "numbers": f"{meta.stored_dtype}, codec {meta.codec}",
        "lens": "none" if meta.lens is None else meta.lens.get("id", "yes"),
        "size": f"{human_bytes(found['bytes'])} in {meta.n_shards - len(missing)} of {meta.n_shards} shards "
        f"of {meta.shard_tokens:,} tokens",
        "mean norm": "not known yet"
        if not statistics.count
        else f"{statistics.norm[0]:.4g} after block {meta.layers[0]}, {statistics.norm[-1]:.4g} after block "
        f"{meta.layers[-1]}",
        "state": "whole"
        if not missing
        else f"{len(missing)} shards are missing; run the same `harvest` command again to fill them",
    }
    print(path)
    for name, value in rows.items():
        print(f"  {name:<10} {value}")
    return 0


def _verify(path: Path, as_json: bool) -> int:
    from tqdm import tqdm

    from store.verify import verify

    with tqdm(unit="shard", leave=False, disable=None, desc="verify") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        bad = verify(path, progress=show)
    if as_json:
        print(json.dumps({"path": str(path), "bad": [{"shard": found.index, "reason": found.reason} for found in bad]}))
    else:
        for found in bad:
            print(found.reason if found.index is None else f"shard {found.index}: {found.reason}")
        print(f"{path}: {len(bad)} faults" if bad else f"{path}: whole")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
