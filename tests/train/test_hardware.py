"""The type of products, chosen by what the machine offers."""

import pytest
import torch
from llvmlite import binding

from residscope.errors import UsageError
from train.hardware import dense_dtype, has_byte_products, resolve_product_dtype


def test_auto_takes_the_product_that_the_hardware_is_fast_at(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for amx, vnni, expected in (
        (False, False, "float32"),
        (False, True, "int8"),
        (True, True, "bfloat16"),
        (True, False, "bfloat16"),
    ):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr("train.hardware.has_byte_products", lambda vnni=vnni: vnni)
        assert resolve_product_dtype("auto", cpu) == expected
        assert resolve_product_dtype("float32", cpu) == "float32"
    with pytest.raises(UsageError, match="AVX512-VNNI"):
        resolve_product_dtype("int8", cpu)
    with pytest.raises(UsageError, match="bfloat16"):
        resolve_product_dtype("int8", torch.device("cuda"))


@pytest.mark.parametrize("amx", [False, True])
def test_beside_the_screen_products_are_made_in_what_the_cpu_is_fast_at(
    amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert dense_dtype(torch.int8) == (torch.bfloat16 if amx else torch.float32)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert dense_dtype(dtype) == dtype


@pytest.mark.parametrize(
    ("asked", "found"), [(None, True), ("", False), ("+avx2,+avx512f", False), ("+avx512f,+avx512vnni", True)]
)
def test_the_screen_is_for_the_processor_that_numba_compiles_for(
    asked: str | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NUMBA_CPU_NAME=generic means no features: its instructions would end the process."""
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"avx512vnni": True})
    monkeypatch.setattr("numba.config.CPU_FEATURES", asked, raising=False)
    assert has_byte_products.__wrapped__() is found
