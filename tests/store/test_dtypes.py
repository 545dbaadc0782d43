import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.dtypes import from_float32, to_float32


def nearest_bfloat16(value: np.float32) -> int:
    """By comparing with both neighbours in exact arithmetic."""
    bits = int(np.array(value, np.float32).view(np.uint32))
    low = bits & 0xFFFF0000
    down, up = (float(np.array(b, np.uint32).view(np.float32)) for b in (low, low + 0x10000))
    below, above = abs(float(value) - down), abs(up - float(value))
    if below == above:
        return (low >> 16) + ((low >> 16) & 1)
    return (low >> 16) + (above < below)


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=50))
def test_bfloat16_rounds_to_nearest(values: list[float]) -> None:
    x = np.array(values, np.float32)
    assert from_float32(x, "bfloat16").tolist() == [nearest_bfloat16(v) for v in x]


def test_bfloat16_ties_go_to_even() -> None:
    # 1 + 2^-8 lies between 1 and 1 + 2^-7; 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6.
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)], np.float32)
    assert to_float32(from_float32(x, "bfloat16"), "bfloat16").tolist() == [1, 1 + 2**-6, -1]


@pytest.mark.parametrize("stored_dtype", ["bfloat16", "float16", "float32"])
def test_stored_numbers_come_back_unchanged(stored_dtype: str) -> None:
    raw = from_float32(np.random.default_rng(0).normal(size=(7, 70000)).astype(np.float32), stored_dtype)
    again = from_float32(to_float32(raw, stored_dtype), stored_dtype)
    assert raw.dtype == again.dtype
    assert np.array_equal(raw, again)


@pytest.mark.parametrize(
    ("stored_dtype", "largest", "too_large"),
    [("bfloat16", 3.396e38, 3.397e38), ("float16", 65519.0, 65520.0), ("float32", 3.4028235e38, np.inf)],
)
def test_what_would_become_infinite_is_refused(stored_dtype: str, largest: float, too_large: float) -> None:
    x = np.zeros((3, 4), np.float32)
    x[1, 2] = -largest
    assert np.isfinite(to_float32(from_float32(x, stored_dtype), stored_dtype)).all()
    for bad in (too_large, -too_large, np.inf, np.nan):
        x[1, 2] = bad
        with pytest.raises(ValueError):
            from_float32(x, stored_dtype)


def test_nan_whose_rounding_would_overflow_is_refused() -> None:
    # All bits set: adding the rounding half would carry into the sign and give -0.
    x = np.array([0x7FFFFFFF], np.uint32).view(np.float32)
    with pytest.raises(ValueError):
        from_float32(x, "bfloat16")
