"""`residscope demo`: harvest, train and analyze from start to end, on a small model and text that need no network.

Each stage is an ordinary command, printed before it runs and timed; running the demo again continues where it
stopped. At the end it prints what the analysis found.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residscope.console import human_seconds, run_command
from residscope.destinations import require_folder
from residscope.errors import stage_failed
from residscope.options import parse_options, require_at_least

# The demo's size: chosen so that two cores finish all stages in under six minutes.
CONTEXT_LENGTH = 256
# Batches of 2,048 tokens fit the cache of a small machine; larger ones are slower there.
# The beginnings of many documents, not all of a few: intervals need at least 20 documents.
HARVEST_FLAGS: tuple[str, ...] = ("--context-length", str(CONTEXT_LENGTH), "--batch-size", "8", "--no-pack")
# One sequence: takes half a minute on two cores, half as long as the default.
ANALYZE_FLAGS: tuple[str, ...] = ("--downstream-tokens", "254")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo."""

    out: Path = Path("demo")
    """Folder for the store (acts.zarr), the checkpoint (ckpt.pt), the results and report.html."""
    tokens: int = 30_208
    """Tokens to harvest."""
    model: str = "smollm2-135m"
    """Model, as `harvest --model` takes it."""
    dataset: str = "pydoc"
    """Text, as `harvest --dataset` takes it."""

    def __post_init__(self) -> None:
        require_at_least(CONTEXT_LENGTH, tokens=self.tokens)


def stages(config: DemoConfig) -> dict[str, tuple[str, ...]]:
    """The three commands and their flags."""
    store, sae = str(config.out / "acts.zarr"), str(config.out / "ckpt.pt")
    text = ("--model", config.model, "--dataset", config.dataset, "--max-tokens", str(config.tokens))
    return {
        "harvest": (*text, "--out", store, *HARVEST_FLAGS),
        "train": ("--store", store, "--out", sae, "--resume", "--validation-fraction", "0.1"),  # of 148 documents
        "analyze": ("--store", store, "--sae", sae, "--out", str(config.out), *ANALYZE_FLAGS),
    }


def demo(config: DemoConfig) -> None:
    """Run the stages and print the findings. Raises `ResidscopeError` with a stage's exit code if it fails."""
    from store.folder import refuse_inside_store  # Imports numpy, which --help does not need.

    refuse_inside_store(config.out)
    require_folder(config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    seconds = {}
    for name, flags in stages(config).items():
        print(f"\n$ {shlex.join((name, *flags))}", flush=True)
        started = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "residscope", name, *flags], check=False).returncode
        if code:
            raise stage_failed(name, code, "once that is fixed, run the same command again")
        seconds[name] = time.monotonic() - started
        print(f"{name} took {human_seconds(seconds[name])}", flush=True)
    summary = json.loads((config.out / "summary.json").read_text(encoding="utf-8"))
    times = ", ".join(f"{name} {human_seconds(time_)}" for name, time_ in seconds.items())
    total = f"Time: {times}; together {human_seconds(sum(seconds.values()))}."
    print("\n".join(["", *closing_words(summary), "", total]), flush=True)
    if (report := config.out / "report.html").exists():
        print(f"Open {report} in a browser.", flush=True)


def closing_words(summary: dict[str, Any]) -> list[str]:
    """The findings in a few lines: the decomposition, then reconstruction and dead latents."""
    mass, n_latents = summary["variance"]["mass"], summary["n_latents"]
    model, n_layers = summary["provenance"]["store"]["model"], summary["n_layers"]
    ratio = mass["aggregate_over_token"]
    lines = [
        f"{model}, {n_layers} layers, {summary['n_tokens']:,} tokens: variance of the layer that latents are active at",
        f"  within a token, E[Var(L | latent, token)]     {mass['within_token']:8.3g} layers^2",
        f"  between tokens, E[Var(E[L | latent, token])]  {mass['between_tokens']:8.3g}",
        f"  between latents, Var(E[L | latent])           {mass['between_latents']:8.3g}",
        f"  total, their sum                              {mass['total']:8.3g}",
        f"The aggregate variance (within + between tokens) is {'-' if ratio is None else f'{ratio:.3g}'} times "
        "the token-level variance (within a token).",
        *filter(None, [(summary.get("convergence") or {}).get("text")]),
    ]
    pca = summary["baseline"]["pca"]
    if summary["validation"]:
        line = f"Validation FVU, mean over layers (lower is better): {summary['validation_fvu']:.3f}"
        lines.append(line + (f"; PCA with {pca['k']} components {pca['fvu']:.3f}" if pca else "") + ".")
    dead = summary["latents"]["dead"]
    share = f"{100 * dead / n_latents:.0f} %"
    return [*lines, f"Dead latents: {dead:,} of {n_latents:,} ({share}) never fired on these tokens."]


def main(argv: Sequence[str] | None = None) -> int:
    name = "residscope demo"
    description = "Harvest, train and analyze on a small model and Python's own documentation; needs no network."
    return run_command(name, lambda: demo(parse_options(DemoConfig, argv, prog=name, description=description)))
