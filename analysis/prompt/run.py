"""`analyze --prompt`: adds prompts to the analysis in the output folder, which is made first if there is none.

Runs the model on the prompts, writes prompt.parquet and prompt.json, and report.html again. Tested in test_view.py.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from analysis.config import AnalyzeConfig
from analysis.inputs import open_inputs
from analysis.model.findings import locate
from analysis.model.transformer import load_of_store
from analysis.prompt.intervene import Effect, PromptedModel, TokenChange, parse_ablate, parse_steer
from analysis.prompt.view import PromptView, Usual, check_interventions, check_positions, read_prompt, view_prompt
from analysis.prompt.words import prompt_words
from analysis.results.added import make_unless_there, require_there, write_report_again
from analysis.results.folder import LATENTS, PROMPT_JSON, PROMPT_TABLE, SUMMARY
from analysis.results.summary import read_summary
from analysis.results.tables import read_table, write_table
from harvest.model.checks import check_logits, check_model
from harvest.model.tokenizer import Tokenizer
from residscope.destinations import partial_folder
from residscope.reading import reading
from store.files import atomic_write

VERSION = 2
"""Version of prompt.json. In version 1, `latents` were those with the most mass, not the most specific ones."""

MOST_LATENTS = 256
"""Most latents of a prompt in prompt.json, by falling specificity; prompt.parquet has all."""

COLUMNS = pa.schema(
    [
        *((name, pa.int64()) for name in ("prompt", "position", "token_id")),
        ("token", pa.string()),
        *(("layer", pa.int64()), ("latent", pa.int64()), ("activation", pa.float32())),
    ]
)
"""prompt.parquet: one row for each activation above zero."""


def analyze_prompts(config: AnalyzeConfig) -> dict[str, Any]:
    """Run the prompts, write and print the results, and return prompt.json's content. Raises like `analyze`, and before
    any work if the model cannot be found or an option makes no sense."""
    prompts = config.prompts
    interventions = [*map(parse_ablate, prompts.ablate), *map(parse_steer, prompts.steer)]
    inputs = open_inputs(config.store, config.sae)
    store, sae, layers = inputs.store, inputs.sae, inputs.layer_numbers
    check_interventions(interventions, sae.config.n_latents, layers)
    found = locate(store, config.transformer.model, config.transformer.lens, offline=False)
    assert found.spec is not None
    say = partial(print, file=sys.stderr) if config.output.json else print
    make_unless_there(config, inputs)
    model = load_of_store(store, found.spec)
    check_model(store, model, found.lens)
    tokens = [read_prompt(store, model.tokenizer, model.causal_lm.config, text) for text in prompts.prompt]
    for text, ids in zip(prompts.prompt, tokens, strict=True):
        check_positions(interventions, text, ids)
    check_logits(model, torch.from_numpy(tokens[0].ids)[None])
    prompted = PromptedModel(model, sae.to(model.device), found.lens, store.meta.stored_dtype)
    read = zip(prompts.prompt, tokens, strict=True)
    usual = usual_of(config.out_dir)
    views = [view_prompt(prompted, text, ids, layers, interventions or None, usual) for text, ids in read]
    plain = [plain_prompt(view, model.tokenizer) for view in views]
    content = {"schema_version": VERSION, "layers": layers, "prompts": plain}
    require_there(config, inputs)
    with partial_folder(config.out_dir):
        _write(config, views, content)
    say(prompt_words(content))
    names = f"{PROMPT_JSON}, {PROMPT_TABLE}" + (", report.html" if config.output.report else "")
    say(f"Written to {config.out_dir}: {names}.")
    if config.output.json:
        print(json.dumps(content, allow_nan=False))
    return content


def usual_of(folder: Path) -> Usual:
    """How active each latent is in the analysis in `folder`."""
    with reading(f"{folder}: the analysis there is damaged", "run `analyze` again"):
        total = np.asarray(read_table(folder / LATENTS, columns=["total"])["total"].to_numpy())
        return Usual(total, int(read_summary(folder / SUMMARY)["n_tokens"]))


def _write(config: AnalyzeConfig, views: Sequence[PromptView], content: dict[str, Any]) -> None:
    out = config.out_dir
    (out / PROMPT_JSON).unlink(missing_ok=True)  # so that it is never read with another run's table
    sink = pa.BufferOutputStream()
    write_table(_table(views), sink)
    atomic_write(out / PROMPT_TABLE, [memoryview(sink.getvalue())])
    atomic_write(out / PROMPT_JSON, [json.dumps(content, indent=2, allow_nan=False).encode()])
    write_report_again(config)


def _table(views: Sequence[PromptView]) -> pa.Table:
    parts = []
    for i, view in enumerate(views):
        position, *rest = view.activations
        texts = np.array(view.tokens.texts, object)[position].tolist()
        columns = [np.full(len(position), i), position, view.tokens.ids[position], texts, *rest]
        parts.append(pa.table(dict(zip(COLUMNS.names, columns, strict=True)), schema=COLUMNS))
    return pa.concat_tables(parts)


def plain_effect(effect: Effect, tokenizer: Tokenizer) -> dict[str, Any]:
    """What interventions did, in the form of prompt.json."""

    def changes(found: list[TokenChange]) -> list[dict[str, Any]]:
        return [{"token": tokenizer.text([change.token_id])[0], **change._asdict()} for change in found]

    ends = {name: changes(getattr(effect, name)) for name in ("increased", "decreased", "watched")}
    return {**effect._asdict(), **ends, "next_changed": plain_tokens(effect.next_changed, tokenizer, "p_changed")}


def plain_tokens(found: Sequence[tuple[int, float]], tokenizer: Tokenizer, name: str) -> list[dict[str, Any]]:
    """Tokens and their probabilities, in the form of prompt.json."""
    return [{"token": tokenizer.text([i])[0], "token_id": i, name: p} for i, p in found]


def plain_prompt(view: PromptView, tokenizer: Tokenizer, most: int = MOST_LATENTS) -> dict[str, Any]:
    """A prompt's part of prompt.json, with at most `most` latents."""
    tokens, latents = view.tokens, view.latents
    return {
        "text": view.text,
        "tokens": [
            {"token": token, "token_id": int(i), "kept": bool(kept), "next": plain_tokens(after, tokenizer, "p_true")}
            for token, i, kept, after in zip(tokens.texts, tokens.ids, tokens.kept, view.run.next_at, strict=True)
        ],
        "next": plain_tokens(view.run.next_tokens, tokenizer, "p_true"),
        "n_active_latents": len(latents.latent),
        "latents": [
            {name: values[i].item() for name, values in latents._asdict().items()}
            for i in range(min(most, len(latents.latent)))
        ],
        "interventions": [
            {
                **asdict(intervention),
                "layers": (layers := [int(layer) for layer in intervention.layers or ()]),
                "layer": layers[0] if len(layers) == 1 else None,  # from when there could only be one
                **plain_effect(effect, tokenizer),
            }
            for intervention, effect in view.results
        ],
        "silent": view.silent,
    }
