"""Times harvest and training on this machine for some seconds on made-up data. Tested in test_plan.py."""

import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from residscope.commands.costs import Model, Training

SECONDS, ROUNDS = 3.0, 20
"""Limits on repeating a pass. The fastest counts, since the first compiles and other processes may slow down others."""


def token_seconds(config: Any, model: Model) -> float:
    """Seconds of a token's pass through all blocks: times one block with random weights, at `harvest`'s batch size.

    config: the model's transformers configuration.
    """
    import copy

    import torch
    import transformers

    from harvest.settings import default_batch_size

    small = copy.deepcopy(config.get_text_config())
    small.num_hidden_layers, small.vocab_size = 1, 256
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    with torch.random.fork_rng(devices=[]):
        block = transformers.AutoModel.from_config(small, dtype=torch.float32).eval()
    batch = default_batch_size(model.context, model.token_bytes, "cpu")
    ids = torch.zeros(batch, model.context, dtype=torch.int64)
    with torch.inference_mode():
        return model.n_layers * _fastest(lambda: block(ids, use_cache=False)) / ids.numel()


def step_seconds(run: Training, layers: int) -> tuple[float, int]:
    """Seconds of a training step, and its bytes of memory."""
    from train.config import DataConfig, ModelConfig, TrainConfig

    model, data = ModelConfig(n_latents=run.n_latents, k=run.k), DataConfig(batch_size=run.batch)
    found = try_training(TrainConfig(store=Path(), model=model, data=data), range(layers), run.d_model)
    return found.seconds_per_step, found.memory_bytes + found.shuffle_bytes


def try_training(config: Any, layers: Sequence[int], d_model: int) -> Any:
    """The `DryRun` of a training by `config` (with its batch size set) on random vectors of these layers."""
    import numpy as np

    from residscope.options import with_values
    from store.activations import ActivationStore
    from train.run import try_run

    meta, table = made_up(max(7 * config.data.batch_size // len(layers), 64), layers, d_model)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="residscope-plan-") as name:
        path = Path(name, "acts.zarr")
        with ActivationStore.create(path, meta, table) as store:
            for number in range(meta.n_shards):
                start, stop = meta.shard_bounds(number)
                x = rng.standard_normal((stop - start, len(layers), d_model), dtype=np.float32)
                store.write_shard(number, x, table.keep[start:stop])
            store.finalize()
        alone = {"follow": False, "resume": False, "epochs": 1, "steps": None, "validation_fraction": 0.0}
        with contextlib.redirect_stderr(io.StringIO()):  # Hides messages about the made-up store.
            return try_run(with_values(config, store=path, **alone))


def made_up(tokens: int, layers: Sequence[int], d_model: int) -> tuple[Any, Any]:
    """`StoreMeta` and `TokenTable` of a made-up bfloat16 store: documents of 64 tokens, the first of each masked."""
    import numpy as np

    from store.arrays import TokenTable
    from store.meta import StoreMeta, chunk_and_shard_tokens

    chunk, shard = chunk_and_shard_tokens(tokens, len(layers), d_model, 2)
    meta = StoreMeta(
        n_tokens=tokens,
        layers=tuple(layers),
        n_model_layers=max(layers) + 1,
        d_model=d_model,
        stored_dtype="bfloat16",
        codec="none",
        chunk_tokens=chunk,
        shard_tokens=shard,
        context_length=64,
        lens=None,
        provenance={"model": "made up"},
        config_hash="0" * 16,
    )
    index = np.arange(tokens, dtype=np.int32)
    return meta, TokenTable(token_id=index % 999, document=index // 64, position=index % 64, keep=index % 64 != 0)


def disk_speed(folder: Path) -> float:
    """Bytes/s at which a file in `folder` is written to the disk."""
    import os

    block, began = os.urandom(2**24), time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(16):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return 16 * len(block) / (time.perf_counter() - began)


def _fastest(work: Any) -> float:
    began, seconds = time.perf_counter(), []
    while len(seconds) < 2 or (time.perf_counter() - began < SECONDS and len(seconds) < ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
