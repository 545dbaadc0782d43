"""The report's section on prompts: tables made here, heat maps drawn by assets/prompt.js from packed numbers.

A section as in `analysis.report.sections`, made where `analyze --prompt` left prompt.json and prompt.parquet beside the
analysis. For each prompt: layer x latent over all tokens or at one, layer x token of one latent, the strongest latents
side by side in the order of their mean layer, and what interventions did. Not here: any computing but of picking.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis.prompt.words import name_of, quoted
from analysis.report.charts import VIRIDIS
from analysis.report.data import Results, integer, percent, show
from analysis.report.template import Section, fill

MOST_DRAWN = 256
"""Latents of a prompt whose activations are in the page, by falling mass; prompt.parquet has all."""

N_ROWS = 12
"""Latents in the table."""


class Prompts(NamedTuple):
    """What `analyze --prompt` wrote."""

    content: dict[str, Any]
    """prompt.json."""

    rows: dict[str, np.ndarray]
    """Columns prompt, position, layer, latent and activation of prompt.parquet."""


def load_prompts(out_dir: Path) -> Prompts | None:
    """Read prompt.json and prompt.parquet; None where there is none."""
    if not ((out_dir / "prompt.json").is_file() and (out_dir / "prompt.parquet").is_file()):
        return None
    import pyarrow.parquet as pq

    names = ["prompt", "position", "layer", "latent", "activation"]
    table = pq.read_table(out_dir / "prompt.parquet", columns=names)
    content = json.loads((out_dir / "prompt.json").read_text(encoding="utf-8"))
    return Prompts(content, {name: np.asarray(table[name].to_numpy()) for name in names})


def prompt_section(results: Results) -> Section:
    """The prompts, one after another."""
    anchor, title = "prompt", "Prompts"
    if results.prompts is None:
        return Section(
            anchor,
            title,
            "<p>None was given. <code>analyze --prompt &quot;...&quot;</code> with the same store and "
            "autoencoder adds the latents of a text to this page.</p>",
        )
    parts = [_prompt(i, prompt) for i, prompt in enumerate(results.prompts.content["prompts"])]
    return Section(anchor, title, fill("prompt.html", prompts="".join(parts)))


def prompt_data(results: Results) -> list[tuple[str, dict[str, np.ndarray], dict[str, str]]]:
    """Data blocks for `analysis.report.page.pack_arrays`: id, arrays and attributes, one for each prompt."""
    if results.prompts is None:
        return []
    content, rows = results.prompts
    layers = np.array(content["layers"])
    blocks = []
    for i, prompt in enumerate(content["prompts"]):
        drawn = prompt["latents"][:MOST_DRAWN]
        numbers = np.array([one["latent"] for one in drawn], np.int64)
        chosen = (rows["prompt"] == i) & np.isin(rows["latent"], numbers)
        order = np.argsort(numbers)
        rank = order[np.searchsorted(numbers[order], rows["latent"][chosen])] if len(numbers) else np.empty(0)
        arrays = {
            "latent": rank.astype("<u2"),
            "position": rows["position"][chosen].astype("<u2"),
            "layer": np.searchsorted(layers, rows["layer"][chosen]).astype("<u2"),
            "activation": rows["activation"][chosen].astype("<f4"),
        }
        attributes = {
            "layers": json.dumps(content["layers"]),
            "tokens": json.dumps([one["token"] for one in prompt["tokens"]]),
            "latents": json.dumps([[one["latent"], round(one["layer_mean"], 3)] for one in drawn]),
            "colours": json.dumps(VIRIDIS),
        }
        blocks.append((f"prompt-data-{i}", arrays, attributes))
    return blocks


def _prompt(i: int, prompt: Mapping[str, Any]) -> str:
    tokens = "".join(
        f'<span class="{"token" if token["kept"] else "token out"}">{escape(_visible(token["token"]))}</span>'
        for token in prompt["tokens"]
    )
    likely = ", ".join(f"{_token(one['token'])} {percent(one['p_true'])}" for one in prompt["next"])
    drawn = prompt["latents"]
    fewer = f" The maps hold the {len(drawn)} with the most mass." if prompt["n_active_latents"] > len(drawn) else ""
    rows = "".join(
        f"<tr><th>{one['latent']}</th><td>{show(one['mass'])}</td><td>{show(one['layer_mean'])}</td>"
        f"<td>{one['peak_layer']}</td><td>{show(one['peak'])}</td>"
        f"<td>{_token(prompt['tokens'][one['peak_position']]['token'])}</td></tr>"
        for one in drawn[:N_ROWS]
    )
    effects = "".join(_effect(one) for one in prompt["interventions"])
    silent = ", ".join(map(str, prompt["silent"]))
    return fill(
        "prompt_one.html",
        i=str(i),
        text=escape(prompt["text"]),
        tokens=tokens,
        likely=likely,
        n_latents=integer(prompt["n_active_latents"]),
        fewer=fewer,
        rows=rows,
        effects=effects,
        silent=f'<p class="note">Active nowhere in this prompt, so not ablated: latent {silent}.</p>' if silent else "",
    )


def _effect(one: Mapping[str, Any]) -> str:
    return (
        f"<tr><th>{escape(name_of(one))}</th><td>{show(one['kl_last'])}</td><td>{show(one['kl_mean'])}</td>"
        f"<td>{_changes(one['increased'])}</td><td>{_changes(one['decreased'])}</td></tr>"
    )


def _changes(found: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f"<div>{_token(one['token'])} {percent(one['p_true'])} → {percent(one['p_changed'])}"
        f" <small>logit {'+' if one['logit_change'] >= 0 else ''}{show(one['logit_change'], 2)}</small></div>"
        for one in found[:5]
    )


def _token(text: str) -> str:
    return f"<code>{escape(quoted(text))}</code>"


def _visible(text: str) -> str:
    return text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}") or "\N{MIDDLE DOT}"
