"""Several processes (ranks) that train the same autoencoders on shares of each batch: what they tell each other.

Every sum over the rows of a batch is a sum of the ranks' own sums. Of the weights' gradients each rank gets the sums
for its share of the latents, moves these by the optimiser, whose state it holds for them alone, and gives their new
weights to the others. Sums are made in one order, so that a run is a function of its seed and the number of ranks.
Where one process trains alone, nothing is done.

All ranks have to call the same methods in the same order. Where one ends early, the others' next call raises `Lost`.

Shapes: M n_latents, R ranks.
"""

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from residscope.errors import ResidscopeError

_ERROR = "error"


class Lost(ResidscopeError):
    """Another rank has ended; its reason, where it gave one."""


@final
class Ranks:
    """The processes that train together, and which of them this is."""

    def __init__(self, rank: int = 0, size: int = 1, *, local: int = 1, store: Any = None) -> None:
        """local: how many of them this machine has; store: torch.distributed's, through which a rank that fails tells
        the first one why."""
        self.rank, self.size, self._local, self._store = rank, size, local, store

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def share_of_cores(self) -> int | None:
        """Threads for this process; None of one alone: as many as torch chooses."""
        return None if self.size == 1 else max(1, len(os.sched_getaffinity(0)) // self._local)

    def sum_(self, *tensors: Tensor) -> None:
        """Make each of `tensors` its sum over ranks."""
        for tensor in tensors if self.size > 1 else ():
            self._do("all_reduce", tensor)

    def any_(self, mask: Tensor) -> None:
        """Make `mask` (bool) true wherever it is on any rank."""
        if self.size > 1:
            from torch.distributed import ReduceOp

            self._do("all_reduce", mask.view(torch.uint8), op=ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank. Nobody goes on before all have asked."""
        mask = torch.tensor([flag])
        self.any_(mask)
        return bool(mask)

    def before(self, n: Tensor) -> Tensor:
        """The sum of `n` (any shape) over the ranks before this one."""
        parts = [torch.zeros_like(n) for _ in range(self.size)]
        if self.size > 1:
            self._do("all_gather", parts, n)
        return sum(parts[: self.rank], torch.zeros_like(n))

    def same_(self, *tensors: Tensor) -> None:
        """Make each of `tensors` the first rank's."""
        for tensor in tensors if self.size > 1 else ():
            self._do("broadcast", tensor, src=0)

    def own(self, m: int) -> slice:
        """This rank's share of M latents; the last one has what remains."""
        share = m // self.size
        return slice(self.rank * share, m if self.rank == self.size - 1 else (self.rank + 1) * share)

    def sum_rows_(self, tensor: Tensor) -> Tensor:
        """This rank's rows of `tensor` [M, ...], summed over ranks, in its memory; the others are left undefined."""
        own, even = tensor[self.own(len(tensor))], len(tensor) // self.size * self.size
        if self.size > 1:
            self._do("reduce_scatter_single", own[: even // self.size], tensor[:even])
            self.sum_(tensor[even:])
        return own

    def share_rows_(self, *tensors: Tensor) -> None:
        """Give all rows of each of `tensors` [M, ...] what the rank has to which they belong."""
        for tensor in tensors if self.size > 1 else ():
            even = len(tensor) // self.size * self.size
            self._do("all_gather_single", tensor[:even], tensor[self.own(len(tensor))][: even // self.size])
            self._do("broadcast", tensor[even:], src=self.size - 1)

    def gathered(self, own: Tensor, m: int) -> Tensor:
        """[M, ...] on the CPU, put together from the ranks' own rows; on the first rank alone, else `own`."""
        if self.size == 1:
            return own.cpu()
        share = m // self.size
        whole = own.new_empty(m, *own.shape[1:]) if self.first else own
        parts = list(whole[: share * self.size].split(share)) if self.first else None
        self._do("gather", own[:share].contiguous(), parts)
        rest = own[share:].contiguous() if self.rank == self.size - 1 else own.new_empty(m % self.size, *own.shape[1:])
        self._do("broadcast", rest, src=self.size - 1)
        if self.first:
            whole[share * self.size :] = rest
        return whole.cpu()

    def _do(self, name: str, *arguments: Any, **options: Any) -> None:
        from torch import distributed

        older = {"reduce_scatter_single": "reduce_scatter_tensor", "all_gather_single": "all_gather_into_tensor"}
        collective: Callable[..., Any] = getattr(distributed, name, None) or getattr(distributed, older[name])
        try:
            collective(*arguments, **options)
        except RuntimeError as error:  # what gloo and nccl raise where a connection ends
            raise self._lost() from error

    def tell(self, words: str, exit_code: int) -> None:
        """Tell the first rank why this one ends."""
        if not self.first:
            with contextlib.suppress(RuntimeError):  # which may have ended before
                self._store.set(_ERROR, json.dumps([words, exit_code]))

    def _lost(self) -> Lost:
        error = Lost("another process of this training has ended (killed?): --resume goes on from the last checkpoint")
        if self.first and self._store.check([_ERROR]):
            words, exit_code = json.loads(self._store.get(_ERROR))
            error = Lost(words)
            error.exit_code = exit_code
        return error


ALONE = Ranks()
"""One process."""
