"""Values that are not finite are seen, whatever the number format."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from harvest.stored_values import all_finite


@given(
    place=st.integers(0, 999),
    value=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_single_value_that_is_not_finite_is_seen(place: int, value: float, dtype: torch.dtype) -> None:
    values = torch.arange(1000).to(dtype).view(20, 50)
    assert all_finite(values)
    values.view(-1)[place] = value
    assert not all_finite(values)
