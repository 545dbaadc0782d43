"""The sparse kernels that a training step and an encoder need: one interface, and the tuples that it uses.

It has three implementations: plain torch (`train.kernels.plain`), compiled for CPUs (`train.kernels.cpu`) and
for CUDA (`train.kernels.cuda`); `train.kernels.choose` picks one. Callers never ask which one they have.
All keep these promises:

- The k largest are exact; of equal entries the compiled kernels take the lowest latent, `torch.topk` any.
- NaN is not hidden: it counts as the largest number, and every other operation passes it on.
- The same inputs give the same bits on the same machine, whatever the number of threads: no sum uses atomics.

Tested in tests/train/kernels/test_plain.py and the tests of the compiled kernels.

Shapes: N rows of a batch, D d_model, M n_latents, k active latents per row.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class SparseCodes(NamedTuple):
    """The active latents of each row; for TopK, the k largest pre-activations after ReLU."""

    values: Tensor
    """[N, k], >= 0; zero in places that hold no active latent."""
    indices: Tensor
    """int64 [N, k], the latents; distinct within a row."""


class Reconstruction(NamedTuple):
    """A batch's result from the decoder and the main loss."""

    error: Tensor
    """[N, D] target - decoded."""
    grad_out: Tensor
    """[N, D] d loss / d decoded = -2 * weight * error."""
    squared: Tensor
    """[N] |error|^2."""
    value_grads: Tensor
    """[N, k] d loss / d z of the active pairs: <grad_out, decoder row>, zero where the value is not positive."""


class WeightGradients(NamedTuple):
    """The result of one pass over the active (row, latent) pairs, sorted by latent."""

    W_enc: Tensor
    """[M, D]: sum over a latent's pairs of d loss / d z times the centred input."""
    W_dec: Tensor
    """[M, D]: sum over a latent's pairs of the activation times d loss / d x_hat."""
    latent_sums: Tensor
    """[M]: sum over a latent's pairs of d loss / d z; `-latent_sums @ W_enc` is the centring's gradient of b_pre."""

    @classmethod
    def zeros_like(cls, weight: Tensor) -> "WeightGradients":
        """Zeros for weights like `weight` [M, D]."""
        return cls(torch.zeros_like(weight), torch.zeros_like(weight), weight.new_zeros(len(weight)))


class AdamStep(NamedTuple):
    """How `Kernels.adam_rows` moves a weight."""

    EPSILON = 6.25e-10  # Gao et al. 2024, appendix A.1; small, because the gradients of single latents are small

    lr: float
    step: int
    """Counts from 1."""
    unit_rows: bool
    """Whether the component of each row's gradient along the row is removed before the step and the row is brought back
    to unit norm after it (Gao et al. 2024, appendix A.3), so that saved rows always have unit norm."""
    grad_scale: float = 1.0
    """Factor that multiplies the gradient first, for clipping by norm."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    columns: Tensor | None = None
    """[D] roots of the mean squares that a row's gradient is assumed to have by column, up to a factor; None if each
    weight has its own running mean."""

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.betas[0] ** self.step)

    @property
    def correction(self) -> float:
        """The divisor of the second moment's root."""
        return math.sqrt(1 - self.betas[1] ** self.step)


TopK = Callable[[Tensor, int], SparseCodes]
"""From encoder inputs [N, D] and k directly to codes."""


class Kernels(ABC):
    """The sparse pieces of a training step."""

    name: str
    """The package that computes: torch, numba or triton. For records only, because two may round differently."""
    pair_bytes: float = 0
    """Temporary memory of `weight_gradients`, in bytes for float32, divided by N * k * D."""

    @abstractmethod
    def topk_relu(self, z: Tensor, k: int) -> SparseCodes:
        """The k largest entries of each row of `z` [N, M], largest first, then ReLU (Gao et al. 2024, 2.3).

        `z` is bfloat16, float32 or float64; the compiled kernels give values of at least float32.
        """

    @abstractmethod
    def keep_largest(self, z: Tensor, k: int) -> Tensor:
        """ReLU of `z` [N, M] with all but the k largest entries of each row set to zero; may overwrite `z`.

        For k a large share of M, when sorted codes cost more than they save.
        """

    def screen(self, W_enc: Tensor, k: int) -> TopK | None:
        """A function that finds the k largest of the float32 products with W_enc [M, D] without computing them all.

        None if there is none, or none that is faster. The weights must not change while it is used.
        """
        return None

    @abstractmethod
    def decode(self, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        """sum_k values[n, k] * W_dec[indices[n, k]]: [N, k], [N, k], [M, D] -> [N, D]."""

    @abstractmethod
    def activation_gradient(self, grad_out: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        """<grad_out[n], W_dec[indices[n, k]]>: [N, D], [N, k], [M, D] -> [N, k]."""

    @abstractmethod
    def reconstruct(self, codes: SparseCodes, W_dec: Tensor, target: Tensor, weight: Tensor) -> Reconstruction:
        """Decode, and differentiate the loss sum_n weight[n] |target[n] - decoded[n]|^2 by the pre-activations.

        target [N, D], without b_pre; weight [N].
        """

    @abstractmethod
    def weight_gradients(
        self, codes: SparseCodes, value_grads: Tensor, grad_out: Tensor, centred: Tensor, out: WeightGradients
    ) -> WeightGradients:
        """Both weight gradients from one sort of the pairs.

        value_grads [N, k] d loss / d z of the active pairs (zero where ReLU cut); grad_out [N, D] d loss / d x_hat;
        centred [N, D] the encoder's input x_std - b_pre. `out` is memory that may be overwritten and returned: with
        large dictionaries, fresh memory at every step costs as much as the sums.
        """

    @abstractmethod
    def adam_rows(self, weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, how: AdamStep) -> None:
        """One Adam step (Kingma & Ba 2015) on `weight` [M, D], in place; `grad` may be overwritten.

        exp_avg_sq: [M, D], or with `how.columns` [M, 1] for a row's mean of (gradient / columns)^2: the mean square of
        column i is taken to be columns_i^2 times that.
        """
