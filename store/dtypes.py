"""Conversion between float32 and the stored number formats: bfloat16 (as uint16), float16, float32.

How: values are rounded to nearest, ties to even, by integer arithmetic on the bits. A value that is not finite, or that
would overflow to infinity, is never stored: conversion refuses it. pack.py rounds whole shards to bfloat16 faster, to
the same bits.
"""

import numpy as np

STORAGE_DTYPE = {"bfloat16": np.dtype("<u2"), "float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
"""numpy's type of the numbers on the disk, by stored dtype."""

OVERFLOW_BITS = {"bfloat16": 0x7F7F8000, "float16": 0x477FF000, "float32": 0x7F800000}
"""The smallest magnitude, as float32 bits, that rounds to infinity; the bits of infinities and NaN are no smaller."""


def to_float32(raw: np.ndarray, stored_dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """Stored numbers as float32, exactly; same shape. If `out` is given, it is filled and returned."""
    if out is None:
        out = np.empty(raw.shape, np.float32)
    if stored_dtype == "bfloat16":
        np.left_shift(raw, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        out[...] = raw
    return out


def from_float32(values: np.ndarray, stored_dtype: str) -> np.ndarray:
    """float32 values rounded to the stored format (to nearest, ties to even); same shape.

    Raises `ValueError` when a value is not finite or would overflow.
    """
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    if (bits & 0x7FFFFFFF).max(initial=0) >= OVERFLOW_BITS[stored_dtype]:
        raise ValueError(f"a value is not finite or too large for {stored_dtype}")
    if stored_dtype == "bfloat16":
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(STORAGE_DTYPE["bfloat16"])
    return values.astype(STORAGE_DTYPE[stored_dtype])
