"""`residscope plan`: bytes, memory and hours of a run, before anything is downloaded, written or bought.

For GPUs it uses their data sheets (`residscope.commands.costs`); without GPUs it times a block of the model and some
training steps on this machine. It compares three ways: storing all vectors, then training; harvesting and training at
the same time with limited space on a disk (`harvest --rolling`, `train --follow`); and the same with space in memory.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from residscope.commands.costs import GPUS, TABLE, Cost, Model, Training, cost, share_latents, step_parts, token_parts
from residscope.commands.costs import gpu_memory as memory_of_gpu
from residscope.console import aligned, human_bytes, human_seconds, parse_bytes, run_command
from residscope.errors import UsageError
from residscope.options import parse_options

MOST_GPUS = 10_000

PYTHIA = {"14m": (6, 128), "31m": (6, 256), "70m": (6, 512), "160m": (12, 768), "410m": (24, 1024)}
PYTHIA |= {"1b": (16, 2048), "1.4b": (24, 2048), "2.8b": (32, 2560), "6.9b": (32, 4096), "12b": (36, 5120)}
"""Blocks and d_model by size, so that runs on the paper's models can be planned without a network."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Which run, on which hardware."""

    model: str
    """Model, as `harvest --model` takes it; only its configuration is read."""
    tokens: float = 1e6
    """Tokens to harvest, such as 1e9."""
    n_latents: int | None = None
    """Size of the dictionary; default --expansion-factor times d_model."""
    expansion_factor: float | None = None
    """Latents for each dimension of the residual stream; default 16."""
    k: int = 32
    """Active latents per vector."""
    batch_size: int | None = None
    """Vectors in a step; default that of `train` for a run of this length."""
    epochs: int = 1
    """Passes over the tokens, if all are stored."""
    context_length: int | None = None
    """Tokens in a sequence; default: 2048, or the model's maximum if that is less."""
    gpus: int = 0
    """Number of GPUs in one machine; 0: this machine, on which harvest and training are timed for some seconds."""
    gpu: Literal["a100", "h100", "h200", "b200", "l40s", "rtx4090"] = "h100"
    """Kind of GPU; its data sheet is used."""
    threads: int = 8
    """CPU threads for each GPU."""
    disk: str = "50GB"
    """Space on the disk, or in memory, for the ways that limit it."""
    disk_speed: str | None = None
    """Bytes that the disk writes in a second, such as 2GB; default 2GB with GPUs, else measured."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        numbers = ("tokens", "k", "epochs", "context_length", "threads", "n_latents", "expansion_factor", "batch_size")
        for name in numbers:
            value, least = getattr(self, name), 1e-3 if name == "expansion_factor" else 1
            if value is not None and not least <= value < 1e18:
                raise UsageError(f"--{name.replace('_', '-')} should be at least {least:g}, found {value:g}")
        if not 0 <= self.gpus <= MOST_GPUS:
            raise UsageError(f"--gpus should be 0 to {MOST_GPUS:,}, found {self.gpus:,}")
        for name in ("disk", "disk_speed"):
            text = getattr(self, name)
            if text is not None and not parse_bytes(text):
                raise UsageError(f"--{name.replace('_', '-')} should be bytes such as 50GB, found {text!r}")


def plan(config: PlanConfig) -> dict[str, Any]:
    """What each of the three ways costs, as plain JSON."""
    from harvest.settings import context_length
    from train.objective.recipes import best_batch

    transformer = model_config(config.model)
    model = shape_of(transformer, context_length(transformer, config.context_length, config.model))
    vectors = config.tokens * model.n_layers
    batch = config.batch_size or best_batch(int(vectors * config.epochs))
    n_latents = config.n_latents or round((config.expansion_factor or 16) * model.d_model)
    if config.k > n_latents:
        raise UsageError(f"--k {config.k}: there are only {n_latents} latents")
    run = Training(n_latents, config.k, batch, -(-int(vectors) // batch), model.d_model)
    measured = config.gpus == 0
    ways = on_this_machine(config, transformer, model, run) if measured else on_gpus(config, model, run)
    # It encodes each vector once and runs the model for about a minute; in the demo that takes as long as an epoch.
    analyze = ways["stored"].train / config.epochs + 60 if measured else None
    return {
        "model": {"name": config.model, **model._asdict(), "token_flops": model.token_flops},
        "tokens": int(config.tokens),
        "vectors": int(vectors),
        "stored_bytes": int(config.tokens) * model.token_bytes,
        "training": run._asdict(),
        "flops": {
            "harvest": config.tokens * model.token_flops,
            "train": 2.0 * vectors * config.epochs * n_latents * model.d_model,
        },
        "figures": "timed on this machine" if measured else f"data sheet of {config.gpu}, not measured",
        "ways": {name: way._asdict() for name, way in ways.items()},
        "analyze": analyze,
    }


def model_config(name: str) -> Any:
    """The model's transformers configuration; for a Pythia model, without asking the hub."""
    import transformers

    from harvest.model.load import load_config
    from harvest.model.names import resolve_model

    size = name.lower().removeprefix("eleutherai/").removeprefix("pythia-").removesuffix("-deduped")
    if "pythia" in name.lower() and size in PYTHIA:
        n_layers, d = PYTHIA[size]
        sizes: Any = {"hidden_size": d, "intermediate_size": 4 * d, "num_hidden_layers": n_layers}
        return transformers.GPTNeoXConfig(**sizes, num_attention_heads=4)
    return load_config(resolve_model(name))


def shape_of(config: Any, context: int) -> Model:
    """What `costs` needs to know; parameters are counted on a meta-device model, which takes no memory."""
    import torch
    import transformers

    from harvest.model.blocks import d_model_of, find_blocks, n_layers_of

    text = config.get_text_config()
    with torch.device("meta"):
        made: Any = transformers.AutoModelForCausalLM.from_config(text)
    blocks = find_blocks(made.base_model, n_layers_of(config))
    parameters = sum(p.numel() for p in blocks.parameters())
    return Model(len(blocks), d_model_of(config), parameters, context)


def on_gpus(config: PlanConfig, model: Model, run: Training) -> dict[str, Cost]:
    """The costs according to data sheets."""
    gpu, speed = GPUS[config.gpu], float(parse_bytes(config.disk_speed or "2GB") or 0)

    def way(on_disk: bool, held: float, at_once: bool) -> Cost:
        disk = speed if on_disk else None

        def step(n: int) -> tuple[dict[str, float], int, float]:
            latents = share_latents(run, gpu, n)
            return step_parts(run, gpu, n, latents, disk=disk), latents, memory_of_gpu(run, n, latents)

        return cost(
            config.tokens,
            run._replace(steps=run.steps * (1 if at_once else config.epochs)),
            config.gpus,
            token=lambda n: token_parts(model, gpu, n, disk=disk, threads=config.threads),
            step=step,
            disk=held if on_disk else 0.0,
            host_memory=TABLE * config.tokens + 1e9 + (0 if on_disk else held),
            at_once=at_once,
        )

    return _ways(config, model, way)


def on_this_machine(config: PlanConfig, transformer: Any, model: Model, run: Training) -> dict[str, Cost]:
    """The costs according to timings made now."""
    from residscope.commands.calibrate import disk_speed, step_seconds, token_seconds

    forward = token_seconds(transformer, model)
    step, memory = step_seconds(run, model.n_layers)
    given = config.disk_speed and parse_bytes(config.disk_speed)
    writing = model.token_bytes / (given or disk_speed(Path.cwd()))

    def way(on_disk: bool, held: float, at_once: bool) -> Cost:
        parts = {"the model's forward pass": forward} | ({"writing to the disk": writing} if on_disk else {})
        return cost(
            config.tokens,
            run._replace(steps=run.steps * (1 if at_once else config.epochs)),
            1,
            token=lambda _: parts,
            step=lambda _: ({"the training step": step}, 1, 0.0),
            disk=held if on_disk else 0.0,
            host_memory=memory + TABLE * config.tokens + (0 if on_disk else held),
            at_once=at_once,
        )

    return _ways(config, model, way)


def _ways(config: PlanConfig, model: Model, way: Any) -> dict[str, Cost]:
    bounded = float(parse_bytes(config.disk) or 0)
    return {
        "stored": way(True, config.tokens * model.token_bytes, False),
        "rolling": way(True, bounded, True),
        "in_memory": way(False, bounded, True),
    }


def words(found: dict[str, Any]) -> str:
    model, run, flops = found["model"], found["training"], found["flops"]
    lines = [
        f"{model['name']}: {model['n_layers']} layers, d_model {model['d_model']:,}, {model['token_flops']:.3g} FLOPs "
        f"a token; {found['tokens']:,} tokens are {found['vectors']:,} vectors, {human_bytes(found['stored_bytes'])}",
        f"training: {run['n_latents']:,} latents, k {run['k']}, {run['steps']:,} steps of {run['batch']:,} vectors an "
        f"epoch; FLOPs: {flops['harvest']:.3g} to harvest, {flops['train']:.3g} for the encoder's products",
        "",
    ]
    table = [["", "on the disk", "memory", "of a GPU", "harvest", "train", "together", "longest part of the longer"]]
    for name, way in found["ways"].items():
        (harvesters, trainers), shared = way["cards"], way["shard_latents"]
        on = f" (on {harvesters} and {trainers} GPUs)" if harvesters != trainers else ""
        on += f" (--shard-latents {shared})" if shared > 1 else ""
        held = [human_bytes(way[key]) if way[key] else "-" for key in ("disk", "host_memory", "card_memory")]
        times = [human_seconds(way[key]) for key in ("harvest", "train", "together")]
        table.append([name.replace("_", " "), *held, *times, way["bound"] + on])
    lines += aligned(table)
    if found["analyze"] is not None:
        lines += ["", f"analyze, on all stored vectors: about {human_seconds(found['analyze'])}"]
    shares = "forward passes at 40 %, products at 60 %, memory at 80 % of it" if "sheet" in found["figures"] else ""
    return "\n".join([*lines, "", f"figures: {found['figures']}{'; ' + shares if shares else ''}; AuxK not counted"])


def main(argv: Sequence[str] | None = None) -> int:
    name, text = "residscope plan", "Estimate bytes, memory and hours of a run, stored, rolling or in memory."

    def run() -> None:
        config = parse_options(PlanConfig, argv, prog=name, description=text)
        found = plan(config)
        print(json.dumps(found) if config.json else words(found))

    return run_command(name, run)
