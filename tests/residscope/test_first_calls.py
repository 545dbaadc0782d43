"""The first calls of torch's functions are made with one number, before anything else is computed."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import torch

from residscope.first_calls import FUNCTIONS, settle_first_calls


def test_every_function_is_called_with_one_number_of_each_type() -> None:
    calls: list[tuple[str, int, torch.dtype]] = []

    def spy(name: str) -> Any:
        def call(number: torch.Tensor) -> torch.Tensor:
            calls.append((name, number.numel(), number.dtype))
            return getattr(torch, name)(number)

        return call

    fake = SimpleNamespace(float32=torch.float32, float64=torch.float64, full=torch.full)
    settle_first_calls(SimpleNamespace(**vars(fake), **{name: spy(name) for name in FUNCTIONS}))
    assert {"sqrt", "exp", "log", "tanh", "erf"} <= set(FUNCTIONS)
    assert calls == [(name, 1, dtype) for dtype in (torch.float32, torch.float64) for name in FUNCTIONS]


def test_modules_that_compute_with_torch_settle_them_when_they_load() -> None:
    code = (
        "import residscope.first_calls as f; seen = []; f.settle_first_calls = seen.append\n"
        "import train.model; print(len(seen)); import harvest.model.load; print(len(seen)); "
        "print({m.__name__ for m in seen})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["1", "2", "{'torch'}"]
