"""`analyze --prompt`: prompts added to an analysis, from options to files.

How: an analysis of the same store and autoencoder that is in the output folder is used as it is; without one it is made
first. Then the model looks at the prompts; prompt.parquet and prompt.json are written, and report.html is written anew
with them. Each file is replaced whole. Not here: what is looked at (`analysis.prompt.prompt`), how it is shown
(`analysis.report.prompt`).
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from analysis.config import AnalyzeConfig
from analysis.encoder import layers_of_store, weights_hash
from analysis.model.parts import locate
from analysis.model.token_text import TokenBytes
from analysis.model.transformer import load_of_store
from analysis.prompt.intervene import Subject, TokenChange, parse_ablate, parse_steer
from analysis.prompt.prompt import PromptView, check_interventions, read_prompt, view_prompt
from analysis.prompt.words import prompt_words
from analysis.run import SUMMARY, analyze
from analysis.summary import SCHEMA_VERSION
from harvest.model.checks import check_logits, check_model
from store.activations import ActivationStore
from store.files import atomic_write
from train.checkpoint import Checkpoint
from train.formats.files import read_sae

PROMPT_JSON, PROMPT_TABLE = "prompt.json", "prompt.parquet"

MOST_LATENTS = 256
"""Latents of a prompt that prompt.json lists, by falling mass; prompt.parquet has all."""

COLUMNS = pa.schema(
    [
        ("prompt", pa.int64()),
        ("position", pa.int64()),
        ("token_id", pa.int64()),
        ("token", pa.string()),
        ("layer", pa.int64()),
        ("latent", pa.int64()),
        ("activation", pa.float32()),
    ]
)
"""prompt.parquet: one row for each activation above zero."""


def analyze_prompts(config: AnalyzeConfig) -> dict[str, Any]:
    """Look at `config.prompt`, write, print, and return prompt.json's content. Raises as `analyze` does, before any
    work where the model is not to be had or an option makes no sense."""
    interventions = [*map(parse_ablate, config.ablate), *map(parse_steer, config.steer)]
    store = ActivationStore.open(config.store)
    sae, origin = read_sae(config.sae)
    checkpoint = Checkpoint(config=sae.config, sae=sae, store=origin.store, trainer=origin.trainer)
    layers = [store.meta.layers[i] for i in layers_of_store(checkpoint, store, config.sae)]
    check_interventions(interventions, sae.config.n_latents, layers)
    found = locate(store, config.model, config.lens, offline=False)
    assert found.spec is not None
    say = partial(print, file=sys.stderr) if config.json else print
    if not has_analysis(config.out_dir, store, weights_hash(sae)):
        with contextlib.redirect_stdout(sys.stderr) if config.json else contextlib.nullcontext():
            analyze(replace(config, json=False))
    model = load_of_store(store, found.spec, device="cuda" if torch.cuda.is_available() else "cpu")
    check_model(store, model, found.lens)
    tokens = [read_prompt(store, model.tokenizer, model.causal_lm.config, text) for text in config.prompt]
    check_logits(model, torch.from_numpy(tokens[0].ids)[None])
    subject = Subject(model, sae.to(model.device), found.lens, store.meta.stored_dtype)
    views = [
        view_prompt(subject, text, read, layers, interventions)
        for text, read in zip(config.prompt, tokens, strict=True)
    ]
    content = {
        "schema_version": SCHEMA_VERSION,
        "layers": layers,
        "prompts": [_plain(view, TokenBytes(model.tokenizer)) for view in views],
    }
    _write(config, views, content)
    say(prompt_words(content))
    names = f"{PROMPT_JSON}, {PROMPT_TABLE}" + (", report.html" if config.report else "")
    say(f"Written to {config.out_dir}: {names}.")
    if config.json:
        print(json.dumps(content, allow_nan=False))
    return content


def has_analysis(out: Path, store: ActivationStore, sae_hash: str) -> bool:
    """Whether `out` holds a whole analysis of this store and autoencoder, of this version."""
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        provenance = summary["provenance"]
        found = (summary["schema_version"], provenance["store"]["content_hash"], provenance["sae"]["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return found == (SCHEMA_VERSION, store.content_hash, sae_hash)


def _write(config: AnalyzeConfig, views: Sequence[PromptView], content: dict[str, Any]) -> None:
    out = config.out_dir
    sink = pa.BufferOutputStream()
    pq.write_table(_table(views), sink, compression="zstd")
    atomic_write(out / PROMPT_TABLE, [memoryview(sink.getvalue())])
    atomic_write(out / PROMPT_JSON, [json.dumps(content, indent=2, allow_nan=False).encode()])
    if config.report:
        from analysis.report.data import load_results
        from analysis.report.page import render_report

        atomic_write(out / "report.html", [render_report(load_results(out)).encode()])


def _table(views: Sequence[PromptView]) -> pa.Table:
    parts = []
    for i, view in enumerate(views):
        found, tokens = view.activations, view.tokens
        texts = np.array(tokens.texts, object)[found.position]
        columns = (np.full(len(found.position), i), found.position, tokens.ids[found.position], texts.tolist())
        rest = (found.layer, found.latent, found.activation)
        parts.append(pa.table(dict(zip(COLUMNS.names, (*columns, *rest), strict=True)), schema=COLUMNS))
    return pa.concat_tables(parts)


def _plain(view: PromptView, token_bytes: TokenBytes) -> dict[str, Any]:
    """A prompt's part of prompt.json."""

    def text(token: int) -> str:
        return token_bytes.get([token])[0].decode(errors="replace")

    def changes(found: list[TokenChange]) -> list[dict[str, Any]]:
        return [{"token": text(change.token_id), **change._asdict()} for change in found]

    tokens, latents = view.tokens, view.latents
    return {
        "text": view.text,
        "tokens": [
            {"token": token, "token_id": int(i), "kept": bool(kept)}
            for token, i, kept in zip(tokens.texts, tokens.ids, tokens.kept, strict=True)
        ],
        "next": [{"token": text(i), "token_id": i, "p_true": p} for i, p in view.next_tokens],
        "n_active_latents": len(latents.latent),
        "latents": [
            {name: values[i].item() for name, values in latents._asdict().items()}
            for i in range(min(MOST_LATENTS, len(latents.latent)))
        ],
        "interventions": [
            {
                "kind": result.intervention.kind,
                "latent": result.intervention.latent,
                "layer": result.layer,
                "coefficient": result.intervention.coefficient,
                "kl_last": result.effect.kl_last,
                "kl_mean": result.effect.kl_mean,
                "increased": changes(result.effect.increased),
                "decreased": changes(result.effect.decreased),
            }
            for result in view.results
        ],
        "silent": view.silent,
    }
