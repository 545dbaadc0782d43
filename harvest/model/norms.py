"""Finds the tokens that `harvest --mask-norm` masks: those whose norm at a stored layer is many times its median.

How: before the store is made, its sequences go through the model once, in the batches in which they will be stored,
and only their norms are used. So the mask is in the token table from the start, and the store is continued, repaired
and read like any other. Medians are taken over the batches with the first 2^20 kept tokens, or over all batches.
"""

import numpy as np
import torch

from harvest.fill import BatchRunner
from harvest.sequences import sequence_batches, token_ids
from residscope.console import progress
from store.arrays import TokenTable

MEDIAN_TOKENS = 2**20


def mask_by_norm(runner: BatchRunner, table: TokenTable, factor: float, size: int) -> tuple[np.ndarray, list[float]]:
    """The table's `keep` (bool [T]) without tokens whose norm at a stored layer exceeds `factor` times its median, and
    the medians. size: tokens of a batch."""
    keep, medians, waiting, n_waiting = table.keep.copy(), np.array([]), [], 0
    batches = sequence_batches(table.position, size)
    with progress("norms", "tok", len(keep)) as bar:
        for batch in batches:
            part = slice(batch.start, batch.stop)
            waiting.append((part, runner.norms(torch.from_numpy(token_ids(table.token_id, batch)))))
            n_waiting += int(keep[part].sum())
            if not medians.size and n_waiting and (n_waiting >= MEDIAN_TOKENS or batch is batches[-1]):
                medians = np.median(np.concatenate([norms[keep[at]] for at, norms in waiting]), axis=0)  # [L]
            if medians.size:
                for at, norms in waiting:
                    keep[at] &= ~(norms > factor * medians).any(axis=1)
                waiting = []
            bar.update(batch.stop - batch.start)
    return keep, medians.tolist()
