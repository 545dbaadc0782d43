"""Latents through EleutherAI's delphi and back: its own loader, explainer, scorers and result analysis on our export.

    python -m venv VENV; echo "$PWD/.venv/lib/python3.11/site-packages" > VENV/lib/python3.11/site-packages/ours.pth
    VENV/bin/pip install --no-deps eai-delphi==0.1.3 eai-sparsify jaxtyping wadler-lindig orjson blobfile asyncer \
        simple-parsing docstring-parser aiofiles faiss-cpu beartype sniffio httpx httpcore certifi idna h11 tiktoken \
        natsort einops schedulefree plotly narwhals scikit-learn scipy joblib threadpoolctl
    VENV/bin/python benchmarks/bench_delphi.py [--store acts.zarr --sae ckpt.pt]

How: a store of some thousand tokens of SmolLM2-135M and an autoencoder of a few steps are made, unless they are given.
delphi's `process_cache` reads the export, explains and scores some latents at a layer and at all layers; the language
model is a stand-in that answers as the format demands, by a hash of what it is asked, so that no GPU and no network
are needed (vllm, sentence-transformers and bitsandbytes, which delphi imports, are empty modules here). Held against
each other: activations and tokens that delphi's loader gives with those of the autoencoder on the store's vectors; our
accuracy and AUC of each latent and scorer with those of delphi's `result_analysis`; texts with what was read back.

Exit code 1 where they differ.
"""

import argparse
import asyncio
import importlib.machinery
import json
import math
import os
import subprocess
import sys
import tempfile
import types
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from analysis.delphi.scores import modules_of, read_explanations
from analysis.model.sequences import sequence_bounds
from analysis.model.transformer import spec_of_store
from harvest.model.load import load_tokenizer
from store.activations import ActivationStore
from train.formats.files import read_sae

ROOT = Path(__file__).parent.parent
N_LATENTS = 12


N_LATENTS = 12


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def without_what_needs_a_gpu() -> None:
    """Let what delphi imports for models on GPUs be empty."""
    names = ("vllm", "vllm.distributed", "vllm.distributed.parallel_state", "vllm.inputs", "sentence_transformers")
    for absent in (*names, "bitsandbytes"):
        sys.modules[absent] = _Empty(absent)
        sys.modules[absent].__spec__ = importlib.machinery.ModuleSpec(absent, None)


class StandIn:
    """A language model that answers by a hash of what it is asked."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.asked = 0

    async def generate(self, prompt: Any, **options: Any) -> Any:
        from delphi.clients.client import Response  # pyright: ignore[reportMissingImports]

        self.asked += 1
        text = json.dumps(prompt)
        draw = np.random.default_rng(zlib.crc32(text.encode()))
        if not options.get("logprobs"):
            return Response(text=f"[EXPLANATION]: text number {zlib.crc32(text.encode())}")
        if draw.random() < 0.1:
            return Response(text="I would rather not say")  # which delphi counts as no answer
        chance = draw.random(5)
        tokens = [types.SimpleNamespace(token=t, logprob=math.log(p)) for p in chance for t, p in _two(p)]
        pairs = [tokens[2 * i : 2 * i + 2] for i in range(len(chance))]
        said = [
            types.SimpleNamespace(token=str(int(p > 0.5)), top_logprobs=two)
            for p, two in zip(chance, pairs, strict=True)
        ]
        return Response(text=str([int(p > 0.5) for p in chance]), logprobs=said)


def _two(p: float) -> list[tuple[str, float]]:
    return [("1", round(p, 1) or 0.05), ("0", 1 - round(p, 1) or 0.05)]  # rounded: so that some are tied


def command(*words: object) -> str:
    """A command of residscope; what it printed."""
    asked = [sys.executable, "-m", "residscope", *map(str, words)]
    return subprocess.run(asked, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--sae", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        place, sae_path = arguments.store, arguments.sae
        if not place or not sae_path:
            place, sae_path = work / "acts.zarr", work / "ckpt.pt"
            size = ("--max-tokens", 16384, "--context-length", 128, "--layers", 3, 14, 29)
            command("harvest", "--model", "smollm2-135m", "--dataset", "pydoc", "--out", place, *size)
            command("train", "--store", place, "--out", sae_path, "--n-latents", 512, "--k", 8, "--steps", 40)
        return exchange(work, place, sae_path)


def exchange(work: Path, place: Path, sae_path: Path) -> int:
    """There and back; the exit code."""
    without_what_needs_a_gpu()
    os.environ["OPENROUTER_API_KEY"] = "none"
    import delphi.__main__ as delphi_main  # pyright: ignore[reportMissingImports]
    from delphi.config import (  # pyright: ignore[reportMissingImports]
        CacheConfig,
        ConstructorConfig,
        RunConfig,
        SamplerConfig,
    )
    from delphi.log.result_analysis import (  # pyright: ignore[reportMissingImports]
        compute_auc,
        compute_classification_metrics,
        compute_confusion,
        load_data,
    )

    store, (sae, _) = ActivationStore.open(place), read_sae(sae_path)
    asked = ("analyze", "--store", place, "--sae", sae_path, "--out", work / "out", "--no-examples", "--no-redundancy")
    made = json.loads(command(*asked, "--downstream-tokens", 0, "--export-delphi", work / "delphi", "--json"))[
        "exported"
    ]
    latents_path, tokenizer = work / "delphi/latents", load_tokenizer(spec_of_store(store, None, offline=True))
    tokenizer = next(value for value in vars(tokenizer).values() if hasattr(value, "batch_decode"))
    middle, names = store.meta.layers[len(store.meta.layers) // 2], modules_of(store.meta.layers)
    modules = {module: layer for module, layer in names.items() if layer in (middle, None)}
    checks: list[tuple[str, int, float]] = []
    chosen: dict[str, Any] = {}
    for module, layer in modules.items():
        n, worst, chosen[module] = loaded(store, sae, latents_path, module, layer, tokenizer)
        checks.append((f"activations and tokens of {module}", n, worst))

    delphi_main.OpenRouter = StandIn
    sizes = {"n_examples_train": 10, "n_examples_test": 20, "n_quantiles": 5}
    config = RunConfig(
        CacheConfig(),
        ConstructorConfig(min_examples=20, n_non_activating=20),
        SamplerConfig(**sizes),
        explainer_provider="openrouter",
        log_probs=True,
        verbose=False,
        pipeline_num_proc=1,
    )
    results = work / "delphi"
    for module, latents in chosen.items():
        folders = (latents_path, results / "explanations", results / "scores")
        one = delphi_main.process_cache(config, *folders, [module], tokenizer, latents)
        asyncio.run(one)
    print(command(*asked, "--no-report", "--delphi-scores", results))
    found = read_explanations(work / "out/explanations.parquet")
    theirs, _ = load_data(results / "scores", [*modules])
    differences: dict[str, list[float]] = {"balanced_accuracy": [], "auc": []}
    texts = 0
    for latent, rows in found.items():
        for row in rows:
            module = next(module for module, layer in modules.items() if layer == row["layer"])
            path = results / "explanations" / f"{module}_latent{latent}.txt"
            texts += json.loads(path.read_text(encoding="utf-8")) == row["explanation"]
            for score in row["scores"]:
                own = theirs[(theirs.module == module) & (theirs.latent_idx == latent)]
                own = own[own.score_type == score["scorer"]]
                accuracy = compute_classification_metrics(compute_confusion(own))["accuracy"]
                differences["balanced_accuracy"].append(abs(score["balanced_accuracy"] - accuracy))
                differences["auc"].append(abs(score["auc"] - compute_auc(own)))
    checks += [(name, len(values), max(values, default=math.inf)) for name, values in differences.items()]
    checks.append(("explanations", texts, float(texts != len(list(results.glob("explanations/*.txt"))))))
    print(f"{made['rows']} rows of {made['context_length']} tokens, {made['activations']:,} activations exported")
    print(f"{'what':<40}{'compared':>10}{'largest difference':>20}")
    for name, n, worst in checks:
        print(f"{name:<40}{n:>10,}{worst:>20.2g}")
    return int(any(n == 0 or not worst < 1e-5 for _, n, worst in checks))


def loaded(store: ActivationStore, sae: Any, raw: Path, module: str, layer: int | None, tokenizer: Any) -> Any:
    """What delphi's loader gives of a module against the autoencoder on the store's vectors: activations compared, the
    largest difference, and some latents that delphi would explain."""
    from delphi.config import ConstructorConfig, SamplerConfig  # pyright: ignore[reportMissingImports]
    from delphi.latents import LatentDataset  # pyright: ignore[reportMissingImports]

    dataset = LatentDataset(raw, SamplerConfig(), ConstructorConfig(min_examples=20), tokenizer, [module])
    config, tokens = json.loads((raw / module / "config.json").read_text(encoding="utf-8")), dataset.tokens
    starts, stops = sequence_bounds(store.tokens.position)
    context = config["ctx_len"]
    pieces = [(p, p + context) for a, b in zip(starts, stops, strict=True) for p in range(a, b - context + 1, context)]
    pieces = [(a, b) for a, b in pieces if store.tokens.keep[a:b].any()]
    assert np.array_equal(tokens, np.stack([store.tokens.token_id[a:b] for a, b in pieces]))
    layers = store.meta.layers
    which = range(len(layers)) if layer is None else [layers.index(layer)]
    expected = np.zeros((len(pieces), context, sae.config.n_latents), np.float32)
    with torch.no_grad():
        for row, (a, b) in enumerate(pieces):
            x, keep = store.read(slice(a, b)), store.tokens.keep[a:b]
            for i in which:
                values, indices = sae.encode(torch.from_numpy(np.ascontiguousarray(x[:, i])))
                dense = np.zeros((context, sae.config.n_latents), np.float32)
                np.put_along_axis(dense, indices.numpy(), values.numpy(), axis=1)
                expected[row] = np.maximum(expected[row], dense * keep[:, None])
    n, worst, enough = 0, 0.0, []
    for buffer in dataset.buffers:
        for data in buffer:
            where, latent = data.activation_data.locations.numpy(), data.latent.latent_index
            own = np.zeros(expected.shape[:2], np.float32)
            own[where[:, 0], where[:, 1]] = data.activation_data.activations.float().numpy()
            worst = max(worst, float(np.abs(own - expected[..., latent]).max()))
            n += len(where)
            windows = (own.reshape(-1, 32) > 0).any(axis=1).sum()
            if 30 <= windows <= len(tokens) * context // 32 - 30:
                enough.append(latent)
    return n, worst, torch.tensor(enough[:N_LATENTS])


if __name__ == "__main__":
    raise SystemExit(main())
