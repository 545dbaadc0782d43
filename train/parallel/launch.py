"""How the processes of a training run start, find each other and end together.

`torchrun` starts them, or `train --n-procs N` does: this process is the first, and starts the others with the
same arguments. They meet at a store of torch.distributed whose address is in the environment, as under torchrun. gloo
connects them on CPUs, nccl between GPUs.

Only the first one prints. An error in another process reaches it through the store, so that it is printed once. If a
process is killed, its connections close, and all others fail at their next sum and end.
"""

import contextlib
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residscope.errors import Interrupted, ResidscopeError, UsageError, said
from residscope.options import require_workers

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.parallel.ranks import Ranks

_GRACE = 20.0
"""Seconds that the other processes have to end by themselves after the first one, before they are killed."""

_SERVED, _BEGUN = 20.0, 1800.0
"""Seconds to wait for an address that should be served already, and for one that the first process will serve."""


def _started(name: str, most: float = math.inf) -> int:
    """A number that torchrun or the first process set in the environment; 0 if unset."""
    found = os.environ.get(name) or "0"
    if not found.isdecimal() or int(found) > most:
        wanted = f"a number{f' of at most {most}' if most < math.inf else ''}, as torchrun sets it"
        raise UsageError(f"{name} is {found!r} in the environment: should be {wanted}; unset it")
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

    distributed: Any = torch.distributed  # its stores have no type stubs
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    alone = size <= 1  # then torchrun's variables in the environment are leftovers
    place = 0 if alone else _started("LOCAL_RANK")
    local = n_procs if alone else _started("LOCAL_WORLD_SIZE") or place + 1  # or more
    gpus = torch.cuda.device_count()
    if on_gpu and (":" in device or local > gpus):  # refuse before any process waits for another
        found = f"this machine's {local} processes each take a GPU of their own, and there are {gpus}"
        raise UsageError(f"--device {device}: {found}: start fewer, with --device cuda, or use --device cpu")
    children: list[subprocess.Popen[bytes]] = []
    met = False
    try:
        if size > 1:
            if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
                way_out = "start with torchrun or --n-procs, or unset WORLD_SIZE"
                raise UsageError(f"WORLD_SIZE is {size} in the environment, without {' and '.join(missing)}: {way_out}")
            rank, host, port = _started("RANK", size - 1), os.environ["MASTER_ADDR"], _started("MASTER_PORT", 65_535)
            print(f"train: one of {size} processes, as WORLD_SIZE says; they meet at {host}:{port}", file=sys.stderr)
            store = _met(rank, size, host, port)
        else:
            store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            rank, size = 0, n_procs
            children += _start(n_procs, store.port, words)
            while store.add("here", 0) < size - 1:
                ended = [code for child in children if (code := child.poll()) is not None]
                if Interrupted.exit_code in ended:
                    raise KeyboardInterrupt
                if ended:
                    raise ResidscopeError("--n-procs: a process ended at its start, perhaps for lack of memory")
                time.sleep(0.05)
        met = True
        if on_gpu:
            torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        group = distributed.PrefixStore("group", store)
        try:
            distributed.init_process_group(backend, store=group, rank=rank, world_size=size)
        except RuntimeError as error:
            raise ResidscopeError(f"the {size} processes could not be connected: {said(error)}") from error
        ranks = Ranks(rank, size, local=n_procs if alone else _started("LOCAL_WORLD_SIZE") or size, store=store)
        try:
            ranks.split(config.shard_latents, "cuda" if on_gpu else "cpu")
            yield ranks
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                ranks.tell("interrupted; run the same command again", Interrupted.exit_code)
            elif not isinstance(error, Lost):
                ranks.tell(said(error), getattr(error, "exit_code", 1))
            raise
        finally:
            distributed.destroy_process_group()
    finally:
        _end(children, _GRACE if met else 0)


def _met(rank: int, size: int, host: str, port: int) -> Any:
    """The store at this address, which the first process serves unless torchrun does. Waits here, so that a signal ends
    the wait: torch waits for up to half an hour and ignores signals, even if no process is left."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # it served before this process was started
    serves, until = rank == 0 and not agent, time.monotonic() + (_SERVED if agent else _BEGUN)
    while not serves:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:  # a host's name too may be known only some time after its start
            if time.monotonic() > until:
                raise ResidscopeError(f"no process answers at {host}:{port}: {said(error)}") from None
        time.sleep(0.2)
    try:
        store = TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timedelta(seconds=_BEGUN))
        store.add("here", 1)
        while serves and store.add("here", 0) < size:
            time.sleep(0.05)
    except (RuntimeError, ValueError) as error:  # another program has the port, or the first process has ended
        raise ResidscopeError(f"the processes cannot meet at {host}:{port}: {said(error)}") from error
    return store


def _start(n: int, port: int, words: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    root = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared = {**os.environ, **shared, "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "PYTHONPATH": root}
    command = [sys.executable, "-m", "residscope", "train", *words]
    environments = [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(1, n)]
    return [subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) for environment in environments]


def _end(children: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    until = time.monotonic() + grace
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.1, until - time.monotonic()))
        child.kill()
        child.wait()
