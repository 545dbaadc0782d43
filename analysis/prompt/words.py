"""What `analyze --prompt` says on the terminal, from prompt.json alone."""

from collections.abc import Mapping
from typing import Any

from analysis.results.words import shown, table

N_LATENTS = 12


def prompt_words(content: Mapping[str, Any]) -> str:
    """The strongest latents of each prompt and what the interventions did."""
    lines: list[str] = []
    for prompt in content["prompts"]:
        likely = ", ".join(f"{quoted(one['token'])} {100 * one['p_true']:.0f} %" for one in prompt["next"][:5])
        lines += [
            "",
            f"Prompt {quoted(prompt['text'])}: {len(prompt['tokens'])} tokens, {prompt['n_active_latents']:,} latents "
            f"active; the model goes on with {likely}.",
            "Strongest latents (mass: sum of activations over tokens and layers)",
            *table(
                ("latent", "mass", "mean layer", "strongest at layer", "highest activation", "at token"),
                [
                    (
                        str(one["latent"]),
                        shown(one["mass"]),
                        shown(one["layer_mean"]),
                        str(one["peak_layer"]),
                        shown(one["peak"]),
                        quoted(prompt["tokens"][one["peak_position"]]["token"]),
                    )
                    for one in prompt["latents"][:N_LATENTS]
                ],
            ),
        ]
        if prompt["interventions"]:
            lines += [
                "What a latent does to the next token (KL(true || changed), nats; probabilities before > after)",
                *table(
                    ("change", "KL", "KL per token", "rises most", "falls most"),
                    [
                        (
                            name_of(one),
                            shown(one["kl_last"]),
                            shown(one["kl_mean"]),
                            _moves(one["increased"]),
                            _moves(one["decreased"]),
                        )
                        for one in prompt["interventions"]
                    ],
                ),
            ]
        if prompt["silent"]:
            silent = ", ".join(map(str, prompt["silent"]))
            lines.append(f"Not ablated, since active nowhere in this prompt: latent {silent}.")
    return "\n".join(lines)


def name_of(intervention: Mapping[str, Any]) -> str:
    """An intervention in a few words."""
    where = f"latent {intervention['latent']} at layer {intervention['layer']}"
    if intervention["kind"] == "ablate":
        return f"ablate {where}"
    return f"steer {where} by {intervention['coefficient']:+g}"


def quoted(text: str) -> str:
    """Text in quotes on one line."""
    return '"' + text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + '"'


def _moves(changes: list[Mapping[str, Any]]) -> str:
    return (
        ", ".join(f"{quoted(c['token'])} {100 * c['p_true']:.2g}>{100 * c['p_changed']:.2g} %" for c in changes[:2])
        or "-"
    )
