"""The tensors of one autoencoder that take part in a step, as a tuple; gradients and moments come in the same tuple.

Shapes: D d_model, M n_latents. Tested in test_step.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_DRAWN = 4096
"""Rows that are drawn at once: a multiple of the 16 numbers that torch draws together."""


class Weights(NamedTuple):
    """An autoencoder's tensors, or one gradient for each that is trained; None for what a variant does not have."""

    W_enc: Tensor
    """[M, D]"""
    W_dec: Tensor
    """[M, D], rows of unit norm."""
    b_pre: Tensor
    """[D]"""
    b_enc: Tensor | None = None
    """[M] added to the pre-activations."""
    log_threshold: Tensor | None = None
    """[M] natural logarithm of the activation below which a latent of a JumpReLU autoencoder is silent."""
    threshold: Tensor | None = None
    """[] the same for all latents of a BatchTopK autoencoder; measured in training, not trained: no gradient."""


TRAINED = ("W_enc", "W_dec", "b_pre", "b_enc", "log_threshold")
"""The fields of `Weights` that an optimiser moves, in the order in which it does."""

BY_LATENT = ("W_enc", "W_dec", "b_enc", "log_threshold")
"""Those of them that have a row, or a number, for each latent."""


def unit_rows(m: int, d: int, seed: int, own: slice) -> Iterator[tuple[int, Tensor]]:
    """Random rows of unit norm, float32 [M, D]: those of `own`, some at a time, and where in `own` they begin.

    All M are drawn, as one call of torch would draw them; few are in memory.
    """
    generator, starts = torch.Generator().manual_seed(seed), range(0, max(m - _DRAWN, 0) + 1, _DRAWN)
    for start in starts:
        rows = torch.randn((m if start == starts[-1] else start + _DRAWN) - start, d, generator=generator)
        rows = rows[max(own.start - start, 0) : max(own.stop - start, 0)]
        yield max(start - own.start, 0), rows.div_(rows.norm(dim=1, keepdim=True))
