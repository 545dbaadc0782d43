"""One hash for every output of the commands, on a small real text and SmolLM2: what a move of code must not change.

    python benchmarks/golden.py --work FOLDER > after.txt        # a few minutes; FOLDER keeps all outputs
    diff before.txt after.txt

Hashes are of content, not of files: of arrays, tensors, table columns and JSON values; times, speeds, versions and
paths are left out. They are the same for every run on one machine with the same packages, and need not be on another:
compare two commits on one machine. Where a hash differs, FOLDER holds what to look at.

Not here: whether the numbers are right (the tests), how fast they come (bench_*.py).
"""

import argparse
import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNSTABLE = {
    *("seconds", "tokens_per_second", "vectors_per_second", "data_wait_fraction", "versions", "surroundings", "config"),
    *("created", "date", "path", "checkpoint", "store_path", "threads", "time", "generated", "residscope", "packages"),
}
"""Keys whose values tell when, where and how fast, not what."""

HARVEST = "--model smollm2-135m --dataset pydoc --max-tokens 3072 --context-length 128 --batch-size 8 --no-pack"
TRAIN = "--store acts.zarr --n-latents 1152 --k 16 --batch-size 1024 --lr 0.001 --validation-fraction 0.2"
SHORT = f"{TRAIN} --steps 24"

COMMANDS = (
    ("harvest", f"{HARVEST} --out acts.zarr"),
    ("residscope", "fit-lens --model smollm2-135m --store acts.zarr --out lens --kl-steps 2 --eval-tokens 128"),
    ("harvest", f"{HARVEST} --layers 0-29 --lens lens --store-dtype float32 --out lensed.zarr"),
    ("harvest", f"{HARVEST} --max-tokens 1024 --codec zstd --shuffle-documents 3 --layers 3-5,20 --out some.zarr"),
    ("train", f"{TRAIN} --out topk.pt"),
    ("train", f"{SHORT} --store lensed.zarr --out lensed.pt"),
    ("train", f"{SHORT} --activation batchtopk --out batchtopk.pt"),
    ("train", f"{SHORT} --activation matryoshka --k-start 64 --out matryoshka.pt"),
    ("train", f"{SHORT} --activation jumprelu --out jumprelu.pt"),
    ("train", f"{SHORT} --activation relu --standardize layer --out relu.pt"),
    ("train", f"{SHORT} --dead-tokens 20 --aux-coef 0.1 --dtype float32 --multi-topk --out dead.pt"),
    (
        "train",
        f"{SHORT} --encoder-bias --decoder-norm free --clip-norm 0.001 --ema-decay 0.9 --kernels torch --out a.pt",
    ),
    ("train", f"{SHORT} --loss-space raw --sweep k=8,16 n_latents=576,1152 --out sweep.pt"),
    ("train", f"{SHORT} --layers 0 10 20 --per-layer total --out layers"),
    ("train", "compare --store acts.zarr --sae topk.pt layers --tokens 256 --out comparison"),
    ("analyze", "--store acts.zarr --sae topk.pt --downstream-tokens 64"),
    ("analyze", "--store acts.zarr --sae topk.pt --prompt 'When Mary and John went' --ablate 3:5 --steer 3:5:20"),
    ("analyze", "--store lensed.zarr --sae lensed.pt --downstream-tokens 64 --save-latents"),
    ("analyze", "--store lensed.zarr --sae lensed.pt --no-report --out again"),
    ("analyze", "--store acts.zarr --sae batchtopk.pt --downstream-tokens 0 --split validation"),
    ("analyze", "--store acts.zarr --sae jumprelu.pt --downstream-tokens 0 --no-latent-logits --max-tokens 500"),
    ("analyze", "--compare topk.analysis lensed.analysis batchtopk.analysis --out analyses"),
    ("residscope", "convert topk.pt as-saelens --to saelens"),
    ("residscope", "convert topk.pt as-sparsify --to sparsify"),
    ("residscope", "convert topk.pt as-mlsae --to mlsae"),
    ("residscope", "verify acts.zarr"),
    ("residscope", "info some.zarr"),
)

BAD = (
    ("harvest", f"{HARVEST} --out topk.pt"),
    ("harvest", "--model smollm2-135m --dataset nowhere.txt --out new.zarr"),
    ("harvest", "--model smollm2-135m --dataset pydoc --layers 5-2 --out new.zarr"),
    ("harvest", f"{HARVEST} --max-tokens 2048 --out acts.zarr"),
    ("train", "--store nowhere.zarr"),
    ("train", "--store acts.zarr --n-latents 8 --k 16 --out new.pt"),
    ("train", "--store acts.zarr --out topk.pt"),
    ("train", f"{TRAIN} --k 8 --resume --out topk.pt"),
    ("train", "--store acts.zarr --lr zero"),
    ("analyze", "--store some.zarr --sae topk.pt"),
    ("analyze", "--store acts.zarr --sae acts.zarr"),
    ("analyze", "--compare topk.analysis nowhere"),
    ("residscope", "convert topk.pt as-mlsae --to mlsae"),
    ("residscope", "info topk.pt"),
)


def main() -> None:
    """Run every command in the folder, then print a line for each output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the outputs, made anew")
    work = parser.parse_args().work
    work.mkdir(parents=True)
    for number, (name, words) in enumerate(COMMANDS):
        done = run(name, words, work)
        (work / f"{number:02}.stderr").write_text(done.stderr, encoding="utf-8")
        print(f"exit {done.returncode}  {name} {words}", flush=True)
        if done.stdout.strip():
            print(f"  stdout {digest(steady(done.stdout, work))}", flush=True)
    print("\n".join(hashes(work)))
    for name, words in BAD:
        done = run(name, words, work)
        last = done.stderr.splitlines()[-1] if done.stderr else ""
        print(f"exit {done.returncode}  {name} {words}\n  {last}", flush=True)


def hashes(work: Path) -> list[str]:
    """A line for each output in the folder."""
    return [f"{value}  {what}" for path in sorted(work.rglob("*")) for what, value in contents(path, work)]


def run(name: str, words: str, work: Path) -> subprocess.CompletedProcess[str]:
    """One command, in the folder."""
    flags = ["-m", "residscope", *([] if name == "residscope" else [name]), *shlex.split(words)]
    return subprocess.run([sys.executable, *flags], cwd=work, capture_output=True, text=True, check=False)


def contents(path: Path, work: Path) -> Iterator[tuple[str, str]]:
    """What a file holds: its names and their hashes; nothing for files that only tell of a run."""
    name = path.relative_to(work).as_posix()
    if ".zarr/" in name or path.is_dir():
        if path.suffix == ".zarr":
            yield from store_contents(path, name)
        return
    if path.suffix in (".pt", ".safetensors"):
        for key, tensor in tensors(path):
            yield f"{name} {key}", digest(tensor)
    elif path.suffix == ".parquet":
        import pandas as pd

        table = pd.read_parquet(path)
        for column in table.columns:
            if column not in UNSTABLE:
                yield f"{name} {column}", digest(table[column].to_json(double_precision=15))
    elif path.suffix == ".json":
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, value in found.items() if isinstance(found, dict) else [("", found)]:
            if key not in UNSTABLE:
                yield f"{name} {key}", digest(stable(value))
    elif path.suffix == ".jsonl":
        yield name, digest([stable(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()])
    elif path.suffix in (".html", ".md", ".toml"):
        yield name, digest(steady(path.read_text(encoding="utf-8"), work))
    elif path.suffix == ".png":
        yield name, digest(path.read_bytes())


def store_contents(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """Everything in a store, by zarr itself, and the bytes of its shards."""
    import zarr

    group = zarr.open_group(path, mode="r")
    for key, array in sorted(group.arrays()):
        yield f"{name}/{key}", digest(array[...])
    yield f"{name} attributes", digest(stable(dict(group.attrs)))
    shards = sorted(file for file in path.rglob("*") if file.is_file() and "c." in file.name)
    yield f"{name} shards", digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in shards])


def tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Tensors of a checkpoint, a lens or a safetensors file, by name; of records, their JSON."""
    import torch
    from safetensors.torch import load_file

    found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    yield from flat(found, "")


def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in UNSTABLE - {"config"}:
                yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def stable(value: Any) -> Any:
    """JSON without what tells of the run rather than of its result."""
    if isinstance(value, dict):
        return {key: stable(inner) for key, inner in value.items() if key not in UNSTABLE}
    return [stable(inner) for inner in value] if isinstance(value, list) else value


def steady(text: str, work: Path) -> str:
    """A text without times, speeds, the folder's path, and (of a page) the scripts' own code."""
    text = re.sub(r"<script>.*?</script>|script-src '[^']*'", "", text, flags=re.DOTALL).replace(
        str(work.resolve()), ""
    )
    text = re.sub(r'"[a-z_]*seconds[a-z_]*": [\d.e+-]+', "", text)
    return re.sub(r"\d[\d.,]* ?(s|ms|min|h|[kMG]?B/s|tokens/s|vectors/s|/s)\b", "", text)


def digest(value: Any) -> str:
    """Ten hexadecimal digits of a tensor, an array, bytes, or JSON."""
    hasher = hashlib.sha256()
    if hasattr(value, "detach"):
        value = value.detach().cpu().contiguous()
        hasher.update(f"{value.dtype} {list(value.shape)}".encode())
        value = value.flatten().view(-1).numpy().tobytes() if value.dtype.is_floating_point else value.numpy().tobytes()
    elif hasattr(value, "tobytes"):
        hasher.update(f"{value.dtype} {list(value.shape)}".encode())
        value = value.tobytes()
    hasher.update(value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=str).encode())
    return hasher.hexdigest()[:10]


if __name__ == "__main__":
    main()
