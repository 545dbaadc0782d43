"""Which tokens of a store are analysed, and the document groups that intervals leave out in turn.

Every worker computes the same arrays itself, so no task carries them.

Shapes: T tokens of the store.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.config import TokenOptions
from residscope.errors import IncompatibleError
from store.arrays import TokenTable
from store.shuffle import validation_documents

MAX_GROUPS = 100
"""Document groups at most: enough for 95 % intervals, few enough for small sums and for one byte per token."""

GROUP_BYTES = 512 * 2**20
"""Memory that the sums of all document groups may take; many latents mean fewer groups, at least `MIN_GROUPS`."""

MIN_GROUPS = 16

_PIECE = 1 << 22  # Tokens processed at once.


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Masks over the tokens of a store; none includes tokens that the store's `keep` leaves out."""

    analysed: NDArray[np.bool_]
    """[T] tokens that the distribution over layers and the reconstruction are about."""
    validation: NDArray[np.bool_]
    """[T] tokens of held-out documents, if any, for the validation FVU of the autoencoder and of the PCA baseline."""
    fit: NDArray[np.bool_]
    """[T] tokens that the PCA baseline is fitted on: those not held out; none if nothing is held out."""
    group: NDArray[np.int8]
    """[T] document group of each analysed token, 0 .. n_groups - 1, never descending; -1 elsewhere."""
    held_out: NDArray[np.bool_]
    """[documents of the store] True if held out of the autoencoder's training."""
    n_documents: int
    """Documents with an analysed token."""
    n_groups: int
    """Document groups: runs of whole documents with about as many analysed tokens each."""

    @property
    def n_analysed(self) -> int:
        return int(self.analysed.sum())

    def needed(self, pca: bool) -> NDArray[np.bool_]:
        """[T] tokens that must be read; pca: also those that the PCA baseline is fitted on."""
        return self.analysed | self.validation | self.fit if pca else self.analysed | self.validation


def select(tokens: TokenTable, held_out: NDArray[np.bool_], options: TokenOptions, n_latents: int) -> Selection:
    """Masks for a split of documents; each mask keeps its first `max_tokens` tokens in store order.

    held_out: bool [n_documents] from `held_out_documents`. Raises `IncompatibleError` if the split is empty.
    """
    is_held_out = held_out[tokens.document]
    of_split = {"all": tokens.keep, "train": tokens.keep & ~is_held_out, "validation": tokens.keep & is_held_out}
    analysed = _first(of_split[options.split], options.max_tokens)
    if not analysed.any():
        raise IncompatibleError(f"no tokens to analyse: {_EMPTY[options.split]}")
    if not of_split["validation"].any():
        of_split["train"] = of_split["validation"]  # nothing is held out, so PCA is not fitted either
    group, n_documents, n_groups = _document_groups(tokens.document, analysed, len(held_out), n_latents)
    return Selection(
        analysed=analysed,
        validation=_first(of_split["validation"], options.max_tokens),
        fit=_first(of_split["train"], options.max_tokens),
        group=group,
        held_out=held_out,
        n_documents=n_documents,
        n_groups=n_groups,
    )


_EMPTY = {
    "all": "all tokens of this store are masked: harvest more text",
    "train": "the train split is empty, because every document is held out: use --split validation or all",
    "validation": "the validation split is empty, because no document is held out: use --split all, or train with "
    "--validation-fraction above 0",
}


def held_out_documents(tokens: TokenTable, validation: Mapping | None, *, same_store: bool) -> NDArray[np.bool_]:
    """bool [n_documents] drawn from the checkpoint's own {fraction, seed}; all False without them, and for another
    store with a different number of documents, where the draw means nothing. Document ids are 0 .. n_documents - 1.

    Raises `IncompatibleError` if the checkpoint was trained on this very store but records another number of documents.
    """
    n_documents = int(tokens.document.max()) + 1
    expected = (validation or {}).get("n_documents", n_documents)
    if not validation or (expected != n_documents and not same_store):
        return np.zeros(n_documents, bool)
    if expected != n_documents:
        raise IncompatibleError(
            f"the checkpoint says that its store has {expected} documents, found {n_documents}, so it is unknown which "
            "of them were held out: the checkpoint's record is damaged; use another checkpoint"
        )
    return validation_documents(n_documents, float(validation["fraction"]), int(validation["seed"]))


def _first(mask: NDArray[np.bool_], limit: int | None) -> NDArray[np.bool_]:
    """`mask` with only its first `limit` True entries."""
    left = len(mask) if limit is None else limit
    for start in range(0, len(mask), _PIECE):
        positions = np.flatnonzero(mask[start : start + _PIECE])
        if len(positions) > left:
            end = start + int(positions[left])
            return np.concatenate([mask[:end], np.zeros(len(mask) - end, bool)])
        left -= len(positions)
    return mask


def _document_groups(
    document: NDArray[np.integer], analysed: NDArray[np.bool_], n_documents: int, n_latents: int
) -> tuple[NDArray[np.int8], int, int]:
    """Group of each token (-1 where not analysed), number of documents with an analysed token, and number of groups.

    The analysed tokens are cut into equal parts; a document goes to the part that the middle of its tokens falls in.
    """
    size = np.zeros(n_documents, np.int64)
    for start in range(0, len(document), _PIECE):
        piece = slice(start, start + _PIECE)
        size += np.bincount(document[piece][analysed[piece]], minlength=n_documents)
    present = np.flatnonzero(size)
    middle = np.cumsum(size[present]) - size[present] / 2
    limit = int(np.clip(GROUP_BYTES // (8 * 8 * n_latents), MIN_GROUPS, MAX_GROUPS))
    part = (middle * min(limit, len(present)) / size.sum()).astype(np.int64)
    groups, group_of_present = np.unique(part, return_inverse=True)
    group_of_document = np.full(n_documents, -1, np.int8)
    group_of_document[present] = group_of_present
    group = group_of_document[document]
    np.putmask(group, ~analysed, -1)
    return group, len(present), len(groups)
