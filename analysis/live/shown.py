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
        of = self.data
        where = f"mean layer {show(of['layer_mean'])}; {integer(of['count'])} firings"
        return f"Latent {of['latent']}: fires on {_words(of)}; {where} (.data has all)"

    def _repr_html_(self) -> str:
        of = self.data
        words = ", ".join(map(quoted, of["fires_on"]))
        lines = [
            f"<h3>Latent {of['latent']}</h3>",
            f"<p>Fires at {integer(of['count'])} vectors of {integer(of['n_tokens'])} tokens, at "
            f"{of['n_layers_active']} layers; mean layer {show(of['layer_mean'])}, standard deviation "
            f"{show(of['layer_std'])}{'; profile: ' + escape(of['profile']) if of['profile'] else ''}.</p>",
            f"<p>Fires on {escape(words)}</p>" if words else "",
            *(SAID.format(*(escape(one[name] or "-") for name in SAID_OF)) for one in of["explanations"]),
            _bars(of["layers"], of["probs"]),
            *(_example(one) for one in of["examples"][:N_EXAMPLES]),
            "<p>Drawn at random:</p>" * bool(of["random_examples"]),
            *(_example(one) for one in of["random_examples"]),
        ]
        for name in ("promotes", "suppresses"):
            tokens = ", ".join(quoted(one["token"]) for one in of[name])
            if tokens and of["logits_above_chance"]:
                lines.append(f"<p>{name.capitalize()} {escape(tokens)}</p>")
        return f'<div style="font-family:sans-serif">{"".join(lines)}</div>'


@dataclass(frozen=True, repr=False)
class Prompt:
    """The latents of a text."""

    data: dict[str, Any]
    """As described in `Analysis.prompt`."""

    def __repr__(self) -> str:
        lines = [f"{quoted(self.data['text'])}: {integer(self.data['n_active_latents'])} latents active; the first:"]
        for one in self.data["latents"][:N_EXAMPLES]:
            lines.append(f"  {one['latent']}, mean layer {show(one['layer_mean'])}, fires on {_words(one)}")
        return "\n".join([*lines, "(.data has all)"])

    def _repr_html_(self) -> str:
        of = self.data
        likely = ", ".join(f"{quoted(one['token'])} {100 * one['p_true']:.0f} %" for one in of["next"][:5])
        best = sorted(of["latents"], key=lambda one: -one["specificity"])[:N_LATENTS]
        head = "".join(f"<th>{name}</th>" for name in ("Latent", "Mean layer", "Highest at each layer", "Fires on"))
        rows = "".join(
            f"<tr><td>{one['latent']}</td><td>{show(one['layer_mean'])}</td>"
            f"<td>{_strip(of['layers'], one['cells'])}</td>"
            f"<td>{escape(', '.join(map(quoted, one['fires_on'])))}</td></tr>"
            for one in sorted(best, key=lambda one: one["layer_mean"])
        )
        return (
            f'<div style="font-family:sans-serif"><p><code>{escape(quoted(of["text"]))}</code>: '
            f"{integer(of['n_active_latents'])} latents active; likeliest next: {escape(likely)}. "
            f"The {len(best)} latents most specific to it, by mean layer:</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )


def _words(of: Mapping[str, Any]) -> str:
    return ", ".join(map(quoted, of["fires_on"])) or "nothing in particular"


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


def _example(one: Mapping[str, Any]) -> str:
    top = max([token["activation"] for token in one["tokens"]], default=0.0) or 1.0
    pieces: list[tuple[str, float, bool]] = []  # one that only continues a character is merged with its beginning
    for i, token in enumerate(one["tokens"]):
        before = ("", 0.0, False) if token["text"] or not pieces else pieces.pop()
        activation, own = max(before[1], token["activation"]), before[2] or i == one["position"]
        pieces.append((before[0] + token["text"], activation, own))
    text = "".join(
        f'<span style="background:rgba(253,231,37,{activation / top:.2f})'
        f'{";font-weight:bold" if own else ""}">{escape(words)}</span>'
        for words, activation, own in pieces
    )
    layers = ", ".join(map(str, one["layers"]))
    return (
        f'<p style="margin:2px 0"><small>layer{"s" * (len(one["layers"]) > 1)} {layers}, {show(one["activation"])}:'
        "</small> "
        f'<code style="white-space:pre-wrap">{text}</code></p>'
    )
