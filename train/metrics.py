"""Training metrics: sums between two logged steps, and the file that gets one JSON line per logged step.

The sums stay on the training device until they are logged, and are kept in the checkpoint for a resume.

Shapes: N rows of a batch, L layers trained on.
"""

import fcntl
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residscope.console import counted
from residscope.errors import IncompatibleError, ResidscopeError
from residscope.reading import read_whole, reading
from train.model import Standardized
from train.objective.step import StepResult
from train.parallel.ranks import ALONE, Ranks

_MOST_BYTES = 1 << 30
"""The largest metrics file that is read."""
_NUMBERS = ("vectors", "loss", "fvu", "l0", "dead_fraction")
"""The numbers of a line that are checked when it is read, if present and not null."""


class MetricsWindow:
    """Sums over the steps since the last logged one."""

    def __init__(self, raw_denominators: Tensor, *, sparsity: bool = False, ranks: Ranks = ALONE) -> None:
        """raw_denominators: float64 [L], E|x - mean_l|^2 in raw space, the FVU's. sparsity: whether the loss has a
        sparsity term. ranks: each sums its own rows; `line`, `vectors` and `state_dict` add up those of all."""
        self._raw_denominators, self._ranks = raw_denominators, ranks
        self._means = ("loss", "auxk", "sparsity") if sparsity else ("loss", "auxk")
        self._sums: dict[str, Tensor] = {}
        self._unknown: set[str] = set()  # means whose sums an older checkpoint lacks
        self.clear()

    def clear(self) -> None:
        by_layer = torch.zeros_like(self._raw_denominators)
        self._unknown = set()
        self._sums = {name: by_layer.new_zeros(()) for name in ("steps", *self._means, "active")}
        self._sums |= {"vectors": by_layer, "error": by_layer.clone()}

    def add(self, layer: Tensor, standardized: Standardized, result: StepResult) -> None:
        """Count one step over rows of layers `layer` int64 [N]."""
        sums = self._sums
        raw_error = result.squared_error.double() * standardized.std.squeeze(1).double().square()
        sums["steps"] += 1
        for name in self._means:
            sums[name] += getattr(result, name).double()
        sums["active"] += result.active
        sums["vectors"].index_add_(0, layer, torch.ones_like(raw_error))
        sums["error"].index_add_(0, layer, raw_error)

    def _joined(self) -> dict[str, Tensor]:
        joined = {name: value.clone() for name, value in self._sums.items()}
        self._ranks.rows.sum_(*(value for name, value in joined.items() if name != "steps"))
        self._ranks.latents.sum_(joined["active"])
        return joined

    def line(self) -> dict[str, Any]:
        """Means over the window: loss, fvu, fvu_per_layer (null for a layer without rows), l0, auxk, sparsity."""
        sums = self._joined()
        if not sums["steps"]:  # a run on one layer, of which no vector came
            nothing = dict.fromkeys(self._means)
            return {"loss": None, "fvu": None, "fvu_per_layer": [None] * len(sums["error"]), "l0": None, **nothing}
        means = {n: None if n in self._unknown else (sums[n] / sums["steps"]).item() for n in self._means}
        fvu, seen = sums["error"] / sums["vectors"] / self._raw_denominators, sums["vectors"] > 0
        return {
            "loss": means["loss"],
            "fvu": fvu[seen].mean().item(),
            "fvu_per_layer": [value if there else None for value, there in zip(fvu.tolist(), seen, strict=True)],
            "l0": (sums["active"] / sums["vectors"].sum()).item(),
            **means,
        }

    @property
    def vectors(self) -> int:
        """Vectors in the window."""
        return int(self._joined()["vectors"].sum())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self._joined().items() if name not in self._unknown}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["steps"]:  # checkpoints from before the sparsity term was counted lack it
            self._unknown = {name for name in self._means if name not in state}
        for name in self._sums.keys() & state.keys() if self._ranks.rows.first else ("steps",):
            if name != "active" or self._ranks.latents.first:  # "active" is a sum over rows and latents
                self._sums[name].copy_(state[name])


class MetricsFile:
    """`ckpt.metrics.jsonl`: one line per logged step, none twice. Its lock keeps two runs off the same checkpoint."""

    def __init__(self, path: Path, *, resume_step: int, check: Callable[[], object] = lambda: None) -> None:
        """Open for appending, after cutting off all that follows the last whole line of a step up to `resume_step`,
        because those steps are repeated; 0 empties the file. Damaged lines before it stay, with a warning. Raises
        `ResidscopeError` if another process has it open, and whatever `check` raises, before anything is changed."""
        self._file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            check()
            self._file.truncate(_bytes_up_to(path, resume_step))
        except BaseException as error:
            self._file.close()
            if not isinstance(error, BlockingIOError):
                raise
            reason = "another run writes this checkpoint; choose another --out"
            raise ResidscopeError(f"{path} is in use: {reason}") from None

    def write(self, line: dict[str, Any]) -> None:
        """Append a line and flush it; NaN and infinities are null, because JSON has neither."""
        self._file.write(json.dumps(finite(line)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make the lines so far durable, before a checkpoint that relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def finite(value: Any) -> Any:
    """Plain values for JSON, with None for NaN and infinity, which it does not have."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[bytes]:
    with reading(f"{path}: cannot be read", "remove it"):
        return read_whole(path, _MOST_BYTES).splitlines(keepends=True)


def _bytes_up_to(path: Path, step: int) -> int:
    """Length of the file up to the end of its last whole line of a step up to `step`."""
    length = position = damaged = seen = 0
    for line in _lines(path) if step else ():
        position += len(line)
        if (found := _read_line(line)) is None:
            seen += 1
        elif found["step"] <= step and line.endswith(b"\n"):
            length, damaged = position, seen
    if damaged:
        print(f"warning: {path}: {counted(damaged, 'line')} damaged, and left as found", file=sys.stderr)
    return length


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file except damaged ones, such as a last line that a crash cut short."""
    return [line for line in map(_read_line, _lines(path)) if line is not None]


def _read_line(text: bytes) -> dict[str, Any] | None:
    """A line, or None if it is damaged: not JSON, or one of its numbers is not a finite number."""
    try:
        with reading("a line"):
            line = json.loads(text)
            numbers = [*map(line.get, _NUMBERS), *(line.get("fvu_per_layer") or ())]
            return line if all(n is None or math.isfinite(n) for n in [line["step"] + 0, *numbers]) else None
    except IncompatibleError:
        return None
