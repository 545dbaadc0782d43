"""Section: what `analyze --prompt` found. Tables are made here, heat maps by assets/prompt.js."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from analysis.prompt.words import name_of, quoted, token_at
from analysis.report.charts import VIRIDIS
from analysis.report.data import Results
from analysis.report.markup import Section, fill, integer, pack_arrays, percent, show, table
from residscope.escape import printable

N_ROWS = 12
"""Latents in the table of a prompt."""

LINK = '<a href="#latent-{0:d}">{0:d}</a>'  # to a latent's row in the table
INTRODUCTION = """<p>Texts given with --prompt, seen through the autoencoder. Activations are in units of the
standardised residual stream; each map's colours run from 0 to its own highest value. Latents are ordered by
specificity: activation compared with what is usual for the latent, so that one that is on in any text ranks low,
however strong. Greyed-out tokens are excluded: the start of the sequence and special tokens.</p>"""


def section(results: Results) -> Section:
    if results.prompts is None:
        how = "<code>analyze --prompt &quot;...&quot;</code> with the same store and autoencoder"
        return Section("Prompts", f"<p>No prompt was given. {how} adds the latents of a text to this page.</p>")
    prompts, layers = results.prompts["prompts"], results.prompts["layers"]
    body = INTRODUCTION + "".join(_prompt(i, prompt) for i, prompt in enumerate(prompts))
    data = "".join(_numbers(results.prompt_rows, layers, i, prompt) for i, prompt in enumerate(prompts))
    return Section("Prompts", body, data)


def _numbers(rows: Mapping[str, np.ndarray], layers: Sequence[int], i: int, prompt: Mapping[str, Any]) -> str:
    """Activations of the latents that prompt.json lists, as a data block: latents by rank, layers by index."""
    numbers = np.array([latent["latent"] for latent in prompt["latents"]], np.int64)
    chosen = (rows["prompt"] == i) & np.isin(rows["latent"], numbers)
    order = np.argsort(numbers)
    rank = order[np.searchsorted(numbers[order], rows["latent"][chosen])] if len(numbers) else np.empty(0)
    arrays = {
        "latent": rank.astype("<u2"),
        "position": rows["position"][chosen].astype("<u2"),
        "layer": np.searchsorted(layers, rows["layer"][chosen]).astype("<u2"),
        "activation": rows["activation"][chosen].astype("<f4"),
    }
    return pack_arrays(
        f"prompt-data-{i}",
        arrays,
        layers=layers,
        tokens=[token["token"] for token in prompt["tokens"]],
        latents=[[latent["latent"], round(latent["layer_mean"], 3)] for latent in prompt["latents"]],
        colours=VIRIDIS,
    )


def _prompt(i: int, prompt: Mapping[str, Any]) -> str:
    tokens = "".join(
        f'<span class="{"token" if token["kept"] else "token out"}">{escape(_visible(token["token"]))}</span>'
        for token in prompt["tokens"]
    )
    n, silent = len(prompt["latents"]), ", ".join(map(str, prompt["silent"]))
    fewer = f" The maps show the {n} most specific to it." if prompt["n_active_latents"] > n else ""
    return fill(
        "prompt.html",
        i=str(i),
        text=escape(prompt["text"]),
        tokens=tokens,
        likely=", ".join(f"{_token(t['token'], t['token_id'])} {percent(t['p_true'])}" for t in prompt["next"]),
        n_latents=integer(prompt["n_active_latents"]),
        fewer=fewer,
        latents=_latents(prompt),
        effects=_effects(prompt),
        silent=f'<p class="note">Not active in this prompt, so not ablated: latent {silent}.</p>' if silent else "",
    )


def _latents(prompt: Mapping[str, Any]) -> str:
    head = ("Latent", "Specificity", "Mass", "Mean layer", "Highest activation", "Strongest at layer", "At token")
    names, rows = ("specificity", "mass", "layer_mean", "peak"), []
    for latent in prompt["latents"][:N_ROWS]:
        where = (str(latent["peak_layer"]), _token(token_at(prompt, latent["peak_position"])))
        rows.append((LINK.format(latent["latent"]), *(show(latent.get(name)) for name in names), *where))
    return table(head, rows)


def _effects(prompt: Mapping[str, Any]) -> str:
    kl = ("KL at the last token, nats", "KL, mean over tokens, nats")
    rows = []
    for change in prompt["interventions"]:
        numbers = (show(change["kl_last"]), show(change["kl_mean"]))
        name = escape(name_of(change)).replace(f"latent {change['latent']}", f"latent {LINK.format(change['latent'])}")
        rows.append((name, *numbers, _changes(change["increased"]), _changes(change["decreased"])))
    return table(("Change, at all kept or the given positions", *kl, "Rises most", "Falls most"), rows, "effects")


def _changes(tokens: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f"<div>{_token(token['token'], token['token_id'])} {percent(token['p_true'])} → {percent(token['p_changed'])}"
        f" <small>logit {'+' if token['logit_change'] >= 0 else ''}{show(token['logit_change'], 2)}</small></div>"
        for token in tokens[:5]
    )


def _token(text: str, number: int | None = None) -> str:
    """A token, with its number if it is only part of a character, which cannot be shown."""
    piece = f" ({number})" if "\N{REPLACEMENT CHARACTER}" in text and number is not None else ""
    return f"<code>{escape(quoted(text))}</code>{piece}"


def _visible(text: str) -> str:
    return printable(text.replace("\n", "\N{RETURN SYMBOL}")) or "\N{MIDDLE DOT}"
