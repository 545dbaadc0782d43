"""Sparse codes as dense matrices, for tests that compare with a dense formula."""

from torch import Tensor


def dense(values: Tensor, indices: Tensor, m: int) -> Tensor:
    """Codes [N, k] of m latents as [N, M]; a latent that is named twice in a row counts twice."""
    return values.new_zeros(len(values), m).scatter_add(1, indices, values)
