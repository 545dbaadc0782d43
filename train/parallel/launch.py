"""How the processes of a training run start, find each other and end together.

`torchrun` starts them, or `train --n-procs N` does: this process is the first, and starts the others with the
same arguments. They meet at a store of torch.distributed whose address is in the environment, as under torchrun. gloo
connects them on CPUs, nccl between GPUs.

Only the first one prints. An error in another process reaches it through the store, so that it is printed once. If a
process is killed, its connections close, and all others fail at their next sum and end.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residscope.errors import ResidscopeError, UsageError, said
from residscope.options import require_workers

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.parallel.ranks import Ranks

_GRACE = 20.0
"""Seconds that the other processes have to end by themselves after the first one, before they are killed."""


def _started(name: str) -> int:
    """A number that torchrun or the first process set in the environment; 0 if unset."""
    found = os.environ.get(name) or "0"
    if not found.isdecimal():
        raise UsageError(f"{name} is {found!r} in the environment: should be a number, as torchrun sets it; unset it")
    return int(found)


@contextlib.contextmanager
def joined(config: "TrainConfig", words: Sequence[str]) -> Iterator["Ranks"]:
    """The processes that train together; words: the command line, for those that are started here."""
    from train.parallel.ranks import ALONE, Lost, Ranks

    size, n_procs, device = _started("WORLD_SIZE"), config.n_procs, config.hardware.device
    if size <= 1 and n_procs == 1:
        ALONE.split(config.shard_latents, "cpu")
        yield ALONE
        return
    if size > 1 and n_procs not in (1, size):
        raise UsageError(f"--n-procs {n_procs}: torchrun has started {size} processes: leave it out")
    require_workers(n_procs=n_procs if size <= 1 else None)
    import torch
    from torch.distributed.rendezvous import rendezvous

    distributed: Any = torch.distributed  # its stores have no type stubs
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    local = _started("LOCAL_WORLD_SIZE") or (_started("LOCAL_RANK") + 1 if size > 1 else n_procs)  # or more
    gpus = torch.cuda.device_count()
    if on_gpu and (":" in device or local > gpus):  # refuse before any process waits for another
        found = f"this machine's {local} processes each take a GPU of their own, and there are {gpus}"
        raise UsageError(f"--device {device}: {found}: start fewer, with --device cuda, or use --device cpu")
    children: list[subprocess.Popen[bytes]] = []
    try:
        if size > 1:
            if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
                way_out = "start with torchrun or --n-procs, or unset WORLD_SIZE"
                raise UsageError(f"WORLD_SIZE is {size} in the environment, without {' and '.join(missing)}: {way_out}")
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            print(f"train: one of {size} processes, as WORLD_SIZE says; they meet at {address}", file=sys.stderr)
            store, rank, size = next(rendezvous("env://"))
            store.add("here", 1)
        else:
            store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            rank, size = 0, n_procs
            children += _start(n_procs, store.port, words)
            while store.add("here", 0) < size - 1:
                if any(child.poll() is not None for child in children):
                    raise ResidscopeError("--n-procs: a process ended at its start, perhaps for lack of memory")
                time.sleep(0.05)
        if on_gpu:
            torch.cuda.set_device(_started("LOCAL_RANK"))
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        group = distributed.PrefixStore("group", store)
        distributed.init_process_group(backend, store=group, rank=rank, world_size=size)
        ranks = Ranks(rank, size, local=_started("LOCAL_WORLD_SIZE") or size, store=store)
        try:
            ranks.split(config.shard_latents, "cuda" if on_gpu else "cpu")
            yield ranks
        except BaseException as error:
            if not isinstance(error, Lost):
                ranks.tell(said(error) or type(error).__name__, getattr(error, "exit_code", 1))
            raise
        finally:
            distributed.destroy_process_group()
    finally:
        _end(children)


def _start(n: int, port: int, words: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    root = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared = {**os.environ, **shared, "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "PYTHONPATH": root}
    command = [sys.executable, "-m", "residscope", "train", *words]
    environments = [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(1, n)]
    return [subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) for environment in environments]


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + _GRACE
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.1, until - time.monotonic()))
        child.kill()
        child.wait()
