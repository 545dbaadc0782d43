"""The text that `analyze --prompt` prints, from prompt.json alone. Tested in test_view.py."""

from collections.abc import Mapping
from typing import Any

from analysis.results.words import shown, table
from residscope.escape import printable

N_LATENTS = 12


def prompt_words(content: Mapping[str, Any]) -> str:
    """The strongest latents of each prompt and what the interventions did."""
    lines: list[str] = []
    for prompt in content["prompts"]:
        likely = ", ".join(f"{quoted(one['token'])} {100 * one['p_true']:.0f} %" for one in prompt["next"][:5])
        lines += [
            "",
            f"Prompt {quoted(prompt['text'])}: {len(prompt['tokens'])} tokens, {prompt['n_active_latents']:,} latents "
            f"active; most likely next tokens: {likely}.",
            "Most specific latents (mass: sum of activations; specificity: mass times log of mass over expected mass)",
            *_latents(prompt),
        ]
        if prompt["interventions"]:
            title = "Effect of latents on the next token (KL(true || changed), nats; probabilities before > after)"
            lines += [title, *_effects(prompt)]
        if prompt["silent"]:
            silent = ", ".join(map(str, prompt["silent"]))
            lines.append(f"Not ablated, because not active in this prompt: latent {silent}.")
    return "\n".join(lines)


def token_at(prompt: Mapping[str, Any], position: int) -> str:
    """The text of a token, or, if it only continues a character, of the token that begins it."""
    texts = [one["token"] for one in prompt["tokens"][: position + 1]]
    return next(filter(None, reversed(texts)), "")


def _latents(prompt: Mapping[str, Any]) -> list[str]:
    head = ("latent", "specificity", "mass", "mean layer", "highest activation", "strongest at layer", "at token")
    rows = []
    for one in prompt["latents"][:N_LATENTS]:
        numbers = (shown(one[name]) for name in ("specificity", "mass", "layer_mean", "peak"))
        where = (str(one["peak_layer"]), quoted(token_at(prompt, one["peak_position"])))
        rows.append((str(one["latent"]), *numbers, *where))
    return table(head, rows)


def _effects(prompt: Mapping[str, Any]) -> list[str]:
    rows = [
        (name_of(one), shown(one["kl_last"]), shown(one["kl_mean"]), _moves(one["increased"]), _moves(one["decreased"]))
        for one in prompt["interventions"]
    ]
    return table(("change", "KL at the last token", "mean KL over tokens", "rises most", "falls most"), rows)


def name_of(intervention: Mapping[str, Any]) -> str:
    """An intervention in a few words."""
    layers = intervention.get("layers") or [intervention["layer"]]  # earlier files have a single layer
    where = f"latent {intervention['latent']} at layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    by = "" if intervention["kind"] == "ablate" else f" by {intervention['coefficient']:+g}"
    at = f" at position{'s' * (len(p) > 1)} {', '.join(map(str, p))}" if (p := intervention.get("positions")) else ""
    return f"{intervention['kind']} {where}{by}{at}"


def quoted(text: str) -> str:
    """Text in quotes on one line."""
    return printable('"' + text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") + '"')


def _moves(changes: list[Mapping[str, Any]]) -> str:
    moves = (f"{quoted(c['token'])} {100 * c['p_true']:.2g}>{100 * c['p_changed']:.2g} %" for c in changes[:2])
    return ", ".join(moves) or "-"
