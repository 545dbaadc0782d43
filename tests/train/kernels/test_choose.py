"""Kernels are chosen by device, type and what is installed."""

import pytest
import torch

from residscope.errors import ResidscopeError, UsageError
from train.kernels import choose
from train.kernels.choose import choose_kernels


def test_kernels_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernels(torch.empty(0)).name == "numba"
    assert choose_kernels(torch.empty(0, dtype=torch.bfloat16)).name == "torch"
    with pytest.raises(UsageError, match=r"triton kernels run on CUDA, .*; found cpu"):
        choose_kernels(torch.empty(0), "triton")
    monkeypatch.setattr(choose, "_installed", lambda package: False)
    assert choose_kernels(torch.empty(0)).name == "torch"
    with pytest.raises(ResidscopeError, match=r"pip install numba.*leave out --kernels numba") as refused:
        choose_kernels(torch.empty(0), "numba")
    assert refused.value.exit_code == 1
