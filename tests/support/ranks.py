"""Several processes connected by gloo, each of which runs a function of this module."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, distributed

from residscope import tensors
from residscope.errors import Interrupted
from residscope.options import with_values
from tests.support.training import StopAt
from train import run as loop
from train.config import TrainConfig
from train.kernels.encode import ReadyEncoder
from train.kernels.interface import SparseCodes
from train.kernels.plain import TORCH
from train.model_config import Activation
from train.parallel.ranks import Lost, Ranks
from train.parallel.selection import batch_codes, keep_largest, row_codes
from train.run import train_all

ROOT = Path(__file__).parents[2]

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"activation": name} for name in get_args(Activation)},
    "all": {"multi_topk": True, "clip_norm": 0.01, "decoder_norm": "free", "encoder_bias": True, "ema_decay": 0.9},
    "tiny": {"batch_size": 2, "steps": 12, "dead_tokens": 1},
}
"""Flags of the runs that are compared; in the last, some ranks have no row of a batch."""


def in_ranks(size: int, work: str, folder: Path, *arguments: Any) -> list[Any]:
    """What the function `work` gives in each of `size` processes, of its ranks and `arguments`."""
    folder.mkdir(exist_ok=True)
    (folder / "arguments").write_bytes(pickle.dumps(arguments))
    words = [sys.executable, "-c", "from tests.support.ranks import main; main()", work, str(folder), str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([*words, str(rank)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(size)
    ]
    said = [process.communicate(timeout=240)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * size, said
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(size)]


def main() -> None:
    """One process."""
    work, folder, size, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    arguments = pickle.loads((folder / "arguments").read_bytes())
    torch.set_num_threads(1)
    store: Any = distributed.FileStore(str(folder / "rendezvous"), size)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    found = globals()[work](Ranks(rank, size, local=size, store=store), *arguments)
    (folder / str(rank)).write_bytes(pickle.dumps(found))
    if distributed.is_initialized():
        distributed.destroy_process_group()
    # A thread of gloo that lets go of a failed sum only now would abort an interpreter that is ending.
    sys.stderr.flush()
    os._exit(0)


def everything(ranks: Ranks, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """All that is looked at, in one start of the processes, which takes longer than the rest."""
    torch.manual_seed(0)
    found: dict[str, Any] = {"told": _told(ranks), "selected": _selected(ranks)}
    loop.write_outputs = lambda result, anew: None  # a figure takes longer than the training
    for name, flags in VARIANTS.items():
        train_all(with_values(config, out=folder / f"{name}.pt", **flags), ranks)
    train_all(with_values(config, out=folder / "layers", per_layer="total"), ranks)
    stopped = with_values(config, out=folder / "stopped.pt")
    before = loop.stop_on_signals
    loop.stop_on_signals = lambda: StopAt(8 if ranks.rank == 1 else 99)  # type: ignore[assignment]
    try:
        train_all(stopped, ranks)
    except Interrupted as error:
        found["stopped"] = str(error)
    loop.stop_on_signals = before
    if ranks.first:
        (folder / "one.pt").write_bytes(stopped.out.read_bytes())
    train_all(with_values(stopped, resume=True), ranks)
    train_all(with_values(config, out=folder / "to-two.pt", resume=True), ranks)
    ranks.split(ranks.size, "cpu")
    train_all(with_values(config, out=folder / "sharded.pt", n_latents=40, decoder_norm="free"), ranks)
    found["shared"] = _shared(ranks)
    if ranks.first:
        try:
            ranks.any(False)
        except Lost as error:
            found["lost"] = str(error), error.exit_code
    else:
        ranks.tell("the store is damaged", 3)
        distributed.destroy_process_group()
    return found


def _told(ranks: Ranks) -> dict[str, Any]:
    """Sums and the like of small tensors."""
    own, mask, rows = torch.full((2,), 1.0 + ranks.rank), torch.arange(3) == ranks.rank, torch.arange(5.0)
    ranks.sum_(own)
    ranks.any_(mask)
    part = ranks.sum_rows_(rows.clone()).clone()
    mine = torch.zeros(5)
    mine[ranks.own(5)] = 1.0 + ranks.rank
    ranks.share_rows_(mine)
    return {
        "sum": own.tolist(),
        "mask": mask.tolist(),
        "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        "own": part.tolist(),
        "shared": mine.tolist(),
        "gathered": _gathered(ranks, part),
    }


def _gathered(ranks: Ranks, part: Tensor) -> list[Any]:
    """What the first rank is given of a tensor [5] to write, one number at a time."""
    pieces = ranks.pieces(part, 5, moved=True)
    assert isinstance(pieces, tensors.Pieces)
    before, tensors.PIECE = tensors.PIECE, part.itemsize
    found = [part.tolist() for part in pieces.parts()]
    tensors.PIECE = before
    return [pieces.shape, found]


def batch() -> tuple[Tensor, Tensor]:
    """Inputs [20, 6] and an encoder [30, 6] whose products are small whole numbers, most of them equal to others."""
    generator = torch.Generator().manual_seed(3)
    inputs, W_enc = (torch.randint(-2, 3, (n, 6), generator=generator).float() for n in (20, 30))
    return inputs, W_enc


def _selected(ranks: Ranks) -> dict[str, Any]:
    """BatchTopK's codes, where the rows are divided."""
    inputs, W_enc = batch()
    part = inputs[:3] if ranks.rank == 0 else inputs[3:]  # unequal shares
    encoder = ReadyEncoder(TORCH, W_enc)
    found: dict[Any, Any] = {}
    for count in (1, 50, 299, 600):
        codes, smallest = batch_codes(encoder, part, count, ranks)
        found[count] = codes.values.sort(dim=1).values, smallest
    found["nothing"] = batch_codes(encoder, torch.zeros_like(part), 5, ranks).smallest
    return found


def _shared(ranks: Ranks) -> tuple[Tensor, Tensor]:
    """TopK's codes, and AuxK's, where the latents are divided: z [20, 30] with 29 latents on the last rank."""
    inputs, W_enc = batch()
    z = inputs @ W_enc.t()
    own = z[:, :10] if ranks.rank == 0 else z[:, 10:]
    values, indices = TORCH.topk_relu(own, 4)
    kept = row_codes(SparseCodes(values, indices), ranks.latents).values
    few = z[:, :1] if ranks.rank == 0 else z[:, 1:]
    return kept, keep_largest(few.clone(), 7, TORCH, ranks.latents)
