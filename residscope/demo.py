"""`residscope demo`: harvest, train and analyze on a small model and text that need no network, start to end.

Each stage is the user's own command, printed before it runs and timed after; run again, the demo continues.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from residscope.console import human_seconds, run_command
from residscope.destinations import require_folder
from residscope.errors import ResidscopeError, UsageError
from residscope.options import parse_options

# The demo's size: chosen so that two cores finish all stages in under six minutes.
CONTEXT_LENGTH = 256
# Batches of 2,048 tokens stay in the cache of a small machine; larger ones are slower there.
# The openings of many documents rather than the whole of few: intervals need at least 20 of them.
HARVEST_FLAGS: tuple[str, ...] = ("--context-length", str(CONTEXT_LENGTH), "--batch-size", "8", "--no-pack")
# Six times the scaling law, which is made for runs of 10^5 steps: in one of a few hundred it moves too little.
TRAIN_FLAGS: tuple[str, ...] = (
    *("--expansion-factor", "16", "--k", "32", "--epochs", "1", "--lr", "0.0016"),
    *("--validation-fraction", "0.1", "--validation-tokens", "1024"),
)
# One sequence: half a minute on two cores, half of the default.
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
        if self.tokens < CONTEXT_LENGTH:
            raise UsageError(f"--tokens should be at least {CONTEXT_LENGTH}, found {self.tokens}")


def stages(config: DemoConfig) -> dict[str, tuple[str, ...]]:
    """The three commands and their flags."""
    store, sae = str(config.out / "acts.zarr"), str(config.out / "ckpt.pt")
    text = ("--model", config.model, "--dataset", config.dataset, "--max-tokens", str(config.tokens))
    return {
        "harvest": (*text, "--out", store, *HARVEST_FLAGS),
        "train": ("--store", store, "--out", sae, "--resume", *TRAIN_FLAGS),
        "analyze": ("--store", store, "--sae", sae, "--out", str(config.out), *ANALYZE_FLAGS),
    }


def demo(config: DemoConfig) -> None:
    """Run the stages and print the findings. Raises `ResidscopeError` with a stage's exit code if it fails."""
    from store.folder import refuse_inside_store  # Imports numpy, which --help does without.

    refuse_inside_store(config.out)
    require_folder(config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    seconds = {}
    for name, flags in stages(config).items():
        print(f"\n$ {shlex.join((name, *flags))}", flush=True)
        started = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "residscope", name, *flags], check=False).returncode
        if code:
            raise _failed(name, code)
        seconds[name] = time.monotonic() - started
        print(f"{name} took {human_seconds(seconds[name])}", flush=True)
    times = ", ".join(f"{name} {human_seconds(time_)}" for name, time_ in seconds.items())
    print(f"\nTime: {times}; together {human_seconds(sum(seconds.values()))}.", flush=True)
    if (report := config.out / "report.html").exists():
        print(f"Open {report} in a browser.", flush=True)


def _failed(stage: str, code: int) -> ResidscopeError:
    code = 128 - code if code < 0 else code  # a signal's number, as a shell gives it
    error = ResidscopeError(f"{stage} ended with exit code {code}; once that is fixed, run the same command again")
    error.exit_code = code
    return error


def main(argv: Sequence[str] | None = None) -> int:
    """Run `residscope demo`; returns the exit code."""
    name = "residscope demo"
    description = "Harvest, train and analyze on a small model and Python's own documentation; needs no network."
    return run_command(name, lambda: demo(parse_options(DemoConfig, argv, prog=name, description=description)))
