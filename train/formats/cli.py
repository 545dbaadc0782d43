"""`residscope convert SRC DST --to FORMAT`: an autoencoder from one project's format to another's.

Writes a model card, README.md, beside the weights, and prints what the target format cannot express.

Tested in tests/train/formats/test_hub.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from residscope.console import run_command
from residscope.options import CommandParser

FORMATS = ("residscope", "mlsae", "saelens", "sparsify")
COMMAND = "residscope convert"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on `argv` (default: the process's own) and return the exit code."""
    return run_command(COMMAND, lambda: _convert(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=COMMAND,
        description="Convert a sparse autoencoder between residscope, mlsae, SAELens and sparsify.",
        epilog="examples:\n"
        "  residscope convert ckpt.pt out --to saelens\n"
        "  residscope convert tim-lawson/mlsae-pythia-70m-deduped-x64-k32 out --to residscope\n"
        "  residscope convert EleutherAI/sae-pythia-70m-32k out --to residscope --subfolder layers.3\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="ckpt.pt, a folder in any format, or a hub id (owner/name)")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write; made if necessary")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    which = "which autoencoder of SRC, if it holds one per sub-folder (hookpoint)"
    parser.add_argument("--subfolder", metavar="NAME", help=which)
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a hub SRC")
    parser.add_argument(
        "--hookpoints",
        metavar="NAME",
        nargs="+",
        default=(),
        help="saelens and sparsify: write a complete copy to a sub-folder for each of these names, such as layers.3",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are already in DST")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="afterwards upload DST to this hub repository")
    parser.add_argument("--private", action="store_true", help="make that repository private if it is new")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _convert(options: argparse.Namespace) -> None:
    from residscope.destinations import refuse_taken
    from residscope.errors import UsageError
    from residscope.names import beside
    from store.folder import refuse_inside_store
    from train.formats import files, hub

    refuse_inside_store(options.destination, "DST")
    weights, others = files.outputs(options.destination, options.to, options.hookpoints)
    source = Path(options.source)
    if options.destination not in (source, source.parent):  # in its own folder both formats are wanted
        for name in {*files.known_files()} - {*weights, *others}:
            if (there := options.destination / name).exists():
                raise UsageError(f"{there} is there, in another format: choose another folder, or remove it")
    refuse_taken(options.destination, [*weights, *others, files.CARD], options.overwrite, files.OVERWRITE)
    sae, origin = files.read_sae(options.source, subfolder=options.subfolder, revision=options.revision)
    metrics = hub.last_metrics(beside(source, ".metrics.jsonl")) if source.is_file() else {}
    written = files.write_sae(
        sae,
        options.destination,
        options.to,
        store=origin.store,
        trainer=origin.trainer,
        hookpoints=options.hookpoints,
        overwrite=options.overwrite,
        card=lambda notes: hub.model_card(origin, metrics, notes=(*origin.notes, *notes)),
    )
    notes, paths = (*origin.notes, *written.notes), [*map(str, written.files)]
    address = None
    if options.push_to_hub:
        address = hub.push_to_hub(options.destination, options.push_to_hub, private=options.private)
    if options.json:
        report = {"from": origin.format, "to": options.to, "files": paths, "notes": notes, "hub": address}
        print(json.dumps(report))
        return
    shape = sae.config
    print(
        f"{origin.path} ({origin.format}): d_model {shape.d_model}, {shape.n_latents} latents, {shape.activation}, "
        f"k {shape.active or '-'}, standardisation {shape.standardize}; written as {options.to}:"
    )
    for place in [*paths, *([address] if address else [])]:
        print(f"  {place}")
    for note in notes:
        print(f"{COMMAND}: note: {note}", file=sys.stderr)
