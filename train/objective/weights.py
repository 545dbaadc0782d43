"""The tensors of one autoencoder that take part in a step, as a tuple; gradients and moments come in the same tuple.

Shapes: D d_model, M n_latents.
"""

from typing import NamedTuple

from torch import Tensor


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
