"""AuxK in 16-bit integers on CPUs with AVX512-VNNI: `train.objective.losses.auxk` by tiles of rows that stay in a
core's cache.

Shapes: N rows, D d_model, A dead latents.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.kernels.cpu import auxk_loops as loops
from train.kernels.cpu.compiling import run_chunks
from train.kernels.cpu.int16 import PANEL, ROWS, Packed
from train.kernels.cpu.tile_loops import PAIRS, TILE


class TiledAuxK(NamedTuple):
    """What `train.objective.losses.auxk` asks of the rows; all gradients without the factor 1 / variance."""

    variance: Tensor
    """float64 scalar: sum_n w_n |s_n - mean of s|^2 over the scaled errors s."""

    second_moment: Tensor
    """float64 scalar: sum_n w_n |s_n|^2."""

    squared: Tensor
    """[N] |error - e_hat|^2, standardised."""

    W_enc: Tensor
    """[A, D]"""

    W_dec: Tensor
    """[A, D]"""

    latent_sums: Tensor
    """[A]"""


def tiled_auxk(
    inputs: Tensor,
    error: Tensor,
    weight: Tensor,
    scale: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    *,
    b_enc: Tensor | None,
    k: int,
    tile_bytes: int,
) -> TiledAuxK:
    """inputs, error [N, D]; weight, scale [N] as `RowWeights.share` and `.scale`; W_enc, W_dec [A, D]; b_enc [A].

    Rows are taken together for the last two products until an operand has `tile_bytes`.
    """
    (n_rows, d), n_dead = inputs.shape, len(W_enc)
    wide_d, wide_a = (-(-size // PANEL) * PANEL for size in (d, n_dead))
    encoder, decoder, back = (Packed.of(w, PANEL) for w in (W_enc, W_dec.t(), W_dec))
    bias = np.zeros(wide_a, np.float32)
    if b_enc is not None:
        bias[:n_dead] = b_enc.numpy()
    n_tiles = -(-n_rows // TILE)
    together = max(1, min(n_tiles, tile_bytes // (2 * TILE * max(n_dead, d))))
    packed_inputs, packed_grads = (_panels(together, d, PANEL) for _ in range(2))
    packed_active, packed_grad_z = (_panels(together, n_dead, ROWS) for _ in range(2))
    squared = torch.empty(n_rows)
    latent_sums, means = (np.zeros((n_tiles, wide), np.float32) for wide in (wide_a, wide_d))
    moments = np.empty((n_tiles, 2))
    W_enc_grad, W_dec_grad = torch.empty(n_dead, d), torch.empty(n_dead, d)
    for first in range(0, n_tiles, together):
        tiles = slice(first, first + together)
        rows = slice(first * TILE, (first + together) * TILE)
        count = len(means[tiles])
        run_chunks(
            loops.tiles_of_rows,
            range(count + 1),
            *(part[rows].numpy() for part in (inputs, error, weight, scale)),
            *(bias, k, *encoder, *decoder, *back),
            *(squared[rows].numpy(), latent_sums[tiles], moments[tiles], means[tiles]),
            *(*packed_inputs, *packed_grads, *packed_active, *packed_grad_z),
        )
        units = -(-len(packed_active[0][0]) // loops.UNIT_BLOCKS) * -(-len(packed_inputs[0][0]) // loops.UNIT_PANELS)
        for out, left, right in (
            (W_enc_grad, packed_grad_z, packed_inputs),
            (W_dec_grad, packed_active, packed_grads),
        ):
            operands = (memory[:count] for memory in (*left, *right))
            run_chunks(loops.add_gradients, range(units + 1), *operands, out.numpy(), first == 0)
    sums = torch.from_numpy(latent_sums[:, :n_dead]).sum(dim=0)
    return TiledAuxK(*_merged(moments, means), squared, W_enc_grad, W_dec_grad, sums)


def _panels(n_tiles: int, columns: int, width: int) -> tuple[Any, Any]:
    """Memory of the tiles' packed operand [T, blocks, 70, width], and of what undoes its scales."""
    blocks = -(-columns // width)
    pairs = torch.empty(n_tiles, blocks, PAIRS, width, dtype=torch.int32).numpy()
    return pairs, np.empty((n_tiles, blocks * width), np.float32)


def _merged(moments: np.ndarray, means: np.ndarray) -> tuple[Tensor, Tensor]:
    """Variance and second moment of all rows, from those of the tiles (Chan et al.'s merge, which does not cancel)."""
    weight, deviation = torch.from_numpy(moments).unbind(dim=1)
    centres = torch.from_numpy(means).double()
    mean = weight @ centres / weight.sum()
    variance = deviation.sum() + weight @ (centres - mean).square().sum(dim=1)
    return variance, variance + weight.sum() * mean.square().sum()
