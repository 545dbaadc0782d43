"""How a notebook displays a latent's card and a prompt's map: HTML and SVG with inline styles and no script."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from analysis.prompt.words import quoted
from analysis.report.charts import VIRIDIS
from analysis.report.markup import integer, show

N_EXAMPLES, N_LATENTS = 8, 20
CELL = 10
SAID, SAID_OF = "<p>Explained, {}: {} <small>{}</small></p>", ("where", "explanation", "said")


@dataclass(frozen=True, repr=False)
class Card:
    """What is known of a latent."""

    data: dict[str, Any]
    """As returned by `Analysis.card`."""

    def __repr__(self) -> str:
        card = self.data
        where = f"mean layer {show(card['layer_mean'])}; {integer(card['count'])} firings"
        return f"Latent {card['latent']}: fires on {_words(card)}; {where} (.data has all)"

    def _repr_html_(self) -> str:
        card = self.data
        words = ", ".join(map(quoted, card["fires_on"]))
        lines = [
            f"<h3>Latent {card['latent']}</h3>",
            f"<p>Fires at {integer(card['count'])} vectors of {integer(card['n_tokens'])} tokens, at "
            f"{card['n_layers_active']} layers; mean layer {show(card['layer_mean'])}, standard deviation "
            f"{show(card['layer_std'])}{'; profile: ' + escape(card['profile']) if card['profile'] else ''}.</p>",
            f"<p>Fires on {escape(words)}</p>" if words else "",
            *(SAID.format(*(escape(row[name] or "-") for name in SAID_OF)) for row in card["explanations"]),
            _bars(card["layers"], card["probs"]),
            *map(_example, card["examples"][:N_EXAMPLES]),
            "<p>Drawn at random:</p>" * bool(card["random_examples"]),
            *map(_example, card["random_examples"]),
        ]
        for name in ("promotes", "suppresses"):
            tokens = ", ".join(quoted(token["token"]) for token in card[name])
            if tokens and card["logits_above_chance"]:
                lines.append(f"<p>{name.capitalize()} {escape(tokens)}</p>")
        return f'<div style="font-family:sans-serif">{"".join(lines)}</div>'


@dataclass(frozen=True, repr=False)
class Prompt:
    """The latents of a text."""

    data: dict[str, Any]
    """As described in `Analysis.prompt`."""

    def __repr__(self) -> str:
        lines = [f"{quoted(self.data['text'])}: {integer(self.data['n_active_latents'])} latents active; the first:"]
        for latent in self.data["latents"][:N_EXAMPLES]:
            lines.append(f"  {latent['latent']}, mean layer {show(latent['layer_mean'])}, fires on {_words(latent)}")
        return "\n".join([*lines, "(.data has all)"])

    def _repr_html_(self) -> str:
        prompt = self.data
        likely = ", ".join(f"{quoted(token['token'])} {100 * token['p_true']:.0f} %" for token in prompt["next"][:5])
        best = sorted(prompt["latents"], key=lambda latent: -latent["specificity"])[:N_LATENTS]
        head = "".join(f"<th>{name}</th>" for name in ("Latent", "Mean layer", "Highest at each layer", "Fires on"))
        rows = "".join(
            f"<tr><td>{latent['latent']}</td><td>{show(latent['layer_mean'])}</td>"
            f"<td>{_strip(prompt['layers'], latent['cells'])}</td>"
            f"<td>{escape(', '.join(map(quoted, latent['fires_on'])))}</td></tr>"
            for latent in sorted(best, key=lambda latent: latent["layer_mean"])
        )
        return (
            f'<div style="font-family:sans-serif"><p><code>{escape(quoted(prompt["text"]))}</code>: '
            f"{integer(prompt['n_active_latents'])} latents active; likeliest next: {escape(likely)}. "
            f"The {len(best)} latents most specific to it, by mean layer:</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )


def _words(latent: Mapping[str, Any]) -> str:
    return ", ".join(map(quoted, latent["fires_on"])) or "nothing in particular"


def _bars(layers: Sequence[int], shares: Sequence[float | None]) -> str:
    """A bar chart of the share of its activation at each layer."""
    top, height = max([share or 0.0 for share in shares], default=0.0) or 1.0, 60
    bars = "".join(
        f'<rect x="{i * CELL}" y="{height - height * (share or 0.0) / top:.1f}" width="{CELL - 1}" '
        f'height="{height * (share or 0.0) / top:.1f}" fill="#31688e"><title>layer {layer}: {show(share)}</title>'
        "</rect>"
        for i, (layer, share) in enumerate(zip(layers, shares, strict=True))
    )
    return _svg(len(layers) * CELL, height, "Share of its activation at each layer", bars)


def _strip(layers: Sequence[int], cells: Sequence[Sequence[float]]) -> str:
    """A strip of its highest activation over the tokens, layer by layer."""
    best = dict.fromkeys(layers, 0.0)
    for _, layer, activation, *_ in cells:
        best[int(layer)] = max(best[int(layer)], activation)
    top = max(best.values()) or 1.0
    rects = "".join(
        f'<rect x="{i * CELL}" y="0" width="{CELL}" height="{CELL}" '
        f'fill="#{VIRIDIS[round(a / top * (len(VIRIDIS) - 1))]}">'
        f"<title>layer {layer}: {show(a)}</title></rect>"
        for i, (layer, a) in enumerate(best.items())
    )
    return _svg(len(layers) * CELL, CELL, "Highest activation at each layer", rects)


def _svg(width: int, height: int, name: str, body: str) -> str:
    return f'<svg role="img" aria-label="{name}" width="{width}" height="{height}">{body}</svg>'


def _example(example: Mapping[str, Any]) -> str:
    top = max([token["activation"] for token in example["tokens"]], default=0.0) or 1.0
    pieces: list[tuple[str, float, bool]] = []  # one that only continues a character is merged with its beginning
    for i, token in enumerate(example["tokens"]):
        before = ("", 0.0, False) if token["text"] or not pieces else pieces.pop()
        activation, own = max(before[1], token["activation"]), before[2] or i == example["position"]
        pieces.append((before[0] + token["text"], activation, own))
    text = "".join(
        f'<span style="background:rgba(253,231,37,{activation / top:.2f})'
        f'{";font-weight:bold" if own else ""}">{escape(words)}</span>'
        for words, activation, own in pieces
    )
    where = f"layer{'s' * (len(example['layers']) > 1)} {', '.join(map(str, example['layers']))}"
    return (
        f'<p style="margin:2px 0"><small>{where}, {show(example["activation"])}:</small> '
        f'<code style="white-space:pre-wrap">{text}</code></p>'
    )
