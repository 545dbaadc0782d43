"""The tensors of one autoencoder that take part in a step, as a tuple; gradients and moments use the same tuple.

Shapes: D d_model, M n_latents. Tested in test_step.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_DRAWN = 4096
"""Rows drawn at once: a multiple of the 16 numbers that torch draws together."""


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
    """[] one threshold for all latents of a BatchTopK autoencoder; measured in training, not trained: no gradient."""


TRAINED = ("W_enc", "W_dec", "b_pre", "b_enc", "log_threshold")
"""The fields of `Weights` that the optimiser moves, in its order."""

BY_LATENT = ("W_enc", "W_dec", "b_enc", "log_threshold")
"""Those of them that have a row, or a number, for each latent."""


def unit_rows(m: int, d: int, seed: int, own: slice) -> Iterator[tuple[int, Tensor]]:
    """Random rows of unit norm, float32 [M, D]: those in `own`, some at a time, each time after their start in `own`.

    All M are drawn, with the numbers of a single call of torch, but only a few are in memory at a time.
    """
    generator, starts = torch.Generator().manual_seed(seed), range(0, max(m - _DRAWN, 0) + 1, _DRAWN)
    for start in starts:
        rows = torch.randn((m if start == starts[-1] else start + _DRAWN) - start, d, generator=generator)
        rows = rows[max(own.start - start, 0) : max(own.stop - start, 0)]
        yield max(start - own.start, 0), rows.div_(rows.norm(dim=1, keepdim=True))
