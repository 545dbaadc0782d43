import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.checksums import CRC_BYTES
from store.dtypes import from_float32, to_float32
from store.pack import ShardPacker, compiled
from tests.support.stores import make_meta


def chunks_of(data: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """What the packer rounds [t, L, D] float32 to, read back from the bytes: uint16 [t, L, D]."""
    n_tokens, n_layers, d_model = data.shape
    meta = make_meta(n_tokens, n_layers, d_model, chunk_tokens=chunk_tokens, shard_tokens=4 * chunk_tokens)
    slots, _ = ShardPacker(meta).pack(data, np.ones(n_tokens, bool))
    slots = slots.reshape(-1, n_layers, chunk_tokens * d_model * 2 + CRC_BYTES)[:, :, :-CRC_BYTES]
    rows = np.ascontiguousarray(slots).view(np.uint16).reshape(-1, n_layers, chunk_tokens, d_model)
    return rows.transpose(0, 2, 1, 3).reshape(-1, n_layers, d_model)[:n_tokens]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=42, max_size=42))
@settings(max_examples=200, deadline=None)
def test_compiled_rounding_is_that_of_from_float32(bits: list[int]) -> None:
    x = np.array(bits, np.uint32).view(np.float32).reshape(7, 2, 3)
    try:
        expected = from_float32(x, "bfloat16")
    except ValueError:
        with pytest.raises(ValueError):
            chunks_of(x, 4)
    else:
        assert np.array_equal(chunks_of(x, 4), expected)


def test_rounding_of_ties_zeros_and_the_smallest_numbers() -> None:
    bits = [0x3F808000, 0x3F818000, 0x80000000, 1, 0x8000, 0x18000, 0x7F7F7FFF, 0xFF7F0001]
    x = np.array(bits, np.uint32).view(np.float32).reshape(8, 1, 1)
    assert chunks_of(x, 2).reshape(-1).tolist() == [0x3F80, 0x3F82, 0x8000, 0, 0, 2, 0x7F7F, 0xFF7F]


@pytest.mark.parametrize("d_model", [1, 2, 3, 5, 64, 129])
@pytest.mark.parametrize("stored_dtype", ["bfloat16", "float16", "float32"])
def test_sums_of_any_width(d_model: int, stored_dtype: str) -> None:
    rng = np.random.default_rng(d_model)
    x = rng.normal(3, 1, (20, 2, d_model)).astype(np.float32)
    keep = rng.random(20) < 0.7
    meta = make_meta(20, 2, d_model, chunk_tokens=8, shard_tokens=24, stored_dtype=stored_dtype)
    _, found = ShardPacker(meta).pack(x, keep)
    kept = to_float32(from_float32(x, stored_dtype), stored_dtype)[keep].astype(np.float64)
    assert found.count == keep.sum()
    np.testing.assert_allclose(found.mean, kept.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.m2, ((kept - kept.mean(0)) ** 2).sum(0), rtol=1e-12)
    np.testing.assert_allclose(found.norm_sums, np.sqrt((kept**2).sum(-1)).sum(0), rtol=1e-14)


def test_without_a_folder_for_the_cache_loops_compile_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where package and home are read-only."""
    njit = numba.njit

    def refuse_cache(*args: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(numba, "njit", refuse_cache)
    assert compiled()(lambda a, b: a + b)(1, 2) == 3
