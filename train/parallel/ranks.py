"""Communication between processes (ranks) that train the same autoencoders on shares of each batch.

Every sum over the rows of a batch is a sum of the ranks' own sums. Each rank gets the summed gradients of its share of
the latents, updates their weights (it holds the optimiser's state for these only), and sends the new weights to the
others. Sums are made in one order, so that a run is a function of its seed and the number of ranks.
For dictionaries that are too large for one, ranks are a grid (`split`): those of a column share batches as above, those
of a row see the same rows, and each has a share of the latents for good; the k largest and reconstructions are joined.

A single process communicates nothing. All must call the same methods in the same order; if one ends early, the others'
next call raises `Lost`.

Shapes: M n_latents, R ranks.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any, final

import torch
from torch import Tensor

from residscope.cluster import n_cores
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from residscope.tensors import Pieces, in_pieces

_ERROR = "error"


class Lost(ResidscopeError):
    """Another rank has ended; the message is its reason if it gave one."""


@final
class Ranks:
    """The processes that train together, and which of them this is."""

    def __init__(self, rank: int = 0, size: int = 1, *, local: int = 1, store: Any = None, group: Any = None) -> None:
        """local: how many of them run on this machine; store: of torch.distributed, through which a rank that fails
        tells the first one why; group: of torch.distributed, if these are only some of all ranks."""
        self.rank, self.size, self.local, self._store, self._group = rank, size, local, store, group
        self.rows: Ranks = self
        """The ranks that share each batch with this one and have the same latents."""
        self.latents: Ranks = ALONE if size > 1 else self
        """The ranks that see the same rows as this one and have other latents."""

    def split(self, latents: int, device: str) -> None:
        """Arrange the ranks in a grid in which `latents` of them share the latents; `UsageError` if they do not fit."""
        if latents == 1:
            return
        if self.size % latents:
            raise UsageError(
                f"--shard-latents {latents} does not divide the number of processes, {self.size}: start a multiple"
            )
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device, (self.size // latents, latents), mesh_dim_names=("rows", "latents"))
        self.rows, self.latents = (
            Ranks(mesh.get_local_rank(i), mesh.size(i), store=self._store, group=mesh.get_group(i)) for i in range(2)
        )

    def __str__(self) -> str:
        return f"{self.size}" if self.latents.size == 1 else f"{self.size}, latents over {self.latents.size}"

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def share_of_cores(self) -> int | None:
        """Threads for this process; None for a single process: torch chooses."""
        return None if self.size == 1 else max(1, n_cores() // self.local)

    def sum_(self, *tensors: Tensor) -> None:
        """Make each of `tensors` its sum over ranks."""
        for tensor in tensors if self.size > 1 else ():
            self._do("all_reduce", tensor)

    def any_(self, mask: Tensor) -> None:
        """Make `mask` (bool) true wherever it is true on any rank."""
        if self.size > 1:
            from torch.distributed import ReduceOp

            self._do("all_reduce", mask.view(torch.uint8), op=ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank. Also a barrier: returns only once all ranks have called it."""
        mask = torch.tensor([flag])
        self.any_(mask)
        return bool(mask)

    def all_of(self, tensor: Tensor) -> Tensor:
        """[R, ...] every rank's `tensor`."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._do("all_gather", parts, tensor.contiguous())
        return torch.stack(parts)

    def require_same(self, **values: object) -> None:
        """Raise `IncompatibleError` on every rank unless all have the same `values` (plain ones, by name): ranks on
        several machines may see different files at the same path, or have been given different flags."""
        if self.size == 1:
            return
        digests = [hashlib.blake2b(repr(value).encode(), digest_size=7).digest() for value in values.values()]
        found = self.all_of(torch.tensor([int.from_bytes(digest) for digest in digests]))
        for name, of_rank in zip(values, found.t().tolist(), strict=True):
            if other := next((rank for rank, value in enumerate(of_rank) if value != of_rank[0]), None):
                what = f"process {other} of {self.size} has another {name} than the first (0)"
                raise IncompatibleError(f"{what}: give all the same flags, and the same files at the same paths")

    def same_(self, *tensors: Tensor) -> None:
        """Make each of `tensors` the first rank's."""
        for tensor in tensors if self.size > 1 else ():
            self._do("broadcast", tensor, group_src=0)

    def own(self, m: int, rank: int | None = None) -> slice:
        """This rank's share of M latents, or another's; the last rank's includes the remainder."""
        share, rank = m // self.size, self.rank if rank is None else rank
        return slice(rank * share, m if rank == self.size - 1 else (rank + 1) * share)

    def sum_rows_(self, tensor: Tensor) -> Tensor:
        """This rank's rows of `tensor` [M, ...], summed over ranks in place; the other rows are left as they are."""
        rows = [tensor[self.own(len(tensor), rank)] for rank in range(self.size)]
        parts = [torch.empty_like(rows[self.rank]) for _ in range(self.size - 1)]
        self._exchange(rows, parts)
        for part in parts:
            rows[self.rank].add_(part)
        return rows[self.rank]

    def share_rows_(self, *tensors: Tensor) -> None:
        """Fill the rows of each of `tensors` [M, ...] with those of the rank that owns them."""
        for tensor in tensors:
            rows = [tensor[self.own(len(tensor), rank)] for rank in range(self.size)]
            self._exchange([rows[self.rank]] * self.size, rows[: self.rank] + rows[self.rank + 1 :])

    def _exchange(self, given: list[Tensor], received: list[Tensor]) -> None:
        """Send each other rank its entry of `given` [R], and fill `received` [R - 1] with what they send. All pairs at
        once: gloo's reduce_scatter would send twice the bytes."""
        if self.size == 1:
            return
        from torch.distributed import P2POp, batch_isend_irecv, irecv, isend

        others = [rank for rank in range(self.size) if rank != self.rank]
        ops = [P2POp(isend, given[rank], group=self._group, group_peer=rank) for rank in others]
        ops += [P2POp(irecv, t, group=self._group, group_peer=r) for r, t in zip(others, received, strict=True)]
        with self._heard():
            for work in batch_isend_irecv(ops):
                work.wait()

    def pieces(self, own: Tensor, m: int, *, moved: bool = False) -> Tensor | Pieces:
        """A tensor [M, ...] for the first rank to write, of which each rank has its share of the latents, or with
        `moved` the part of that share that it updates. All ranks must call this; the others send theirs."""
        if self.size == 1:
            return own
        return Pieces((m, *own.shape[1:]), own.dtype, partial(self._parts, own, m, moved))

    def _parts(self, own: Tensor, m: int, moved: bool) -> Iterator[Tensor]:
        if not self.first:
            for part in in_pieces(own) if moved or self.rows.first else ():
                self._do("send", part, group_dst=0)
            return
        for place, row in product(range(self.latents.size), range(self.rows.size if moved else 1)):
            if place == row == 0:
                yield from in_pieces(own)
                continue
            rows = self.rows.own(m // self.latents.size, row) if moved else self.latents.own(m, place)
            shape, rank = (rows.stop - rows.start, *own.shape[1:]), row * self.latents.size + place
            for part in in_pieces(torch.empty(shape, dtype=own.dtype, device="meta")):
                received = torch.empty(part.shape, dtype=own.dtype)
                self._do("recv", received, group_src=rank)
                yield received

    def _do(self, name: str, *arguments: Any, **options: Any) -> None:
        from torch import distributed

        with self._heard():
            getattr(distributed, name)(*arguments, group=self._group, **options)

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what gloo and nccl raise when a connection ends
            raise self._lost() from error

    def tell(self, words: str, exit_code: int) -> None:
        """Tell the first rank why this one ends."""
        if not self.first:
            with contextlib.suppress(RuntimeError):  # the first rank may have ended already
                self._store.set(_ERROR, json.dumps([words, exit_code]))

    def _lost(self) -> Lost:
        error = Lost("another process of this run has ended (killed?): --resume continues from the last checkpoint")
        if self.first and self._store.check([_ERROR]):
            words, exit_code = json.loads(self._store.get(_ERROR))
            error = Lost(words)
            error.exit_code = exit_code
        return error


ALONE = Ranks()
"""One process."""
