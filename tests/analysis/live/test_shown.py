"""What a notebook shows of a latent and a prompt: well-formed, escaped, without script, and with the numbers."""

from typing import Any
from xml.etree import ElementTree

from analysis.live.shown import Card, Prompt

EVIL = '<script>alert("1")</script>&\n'


def card() -> dict[str, Any]:
    token = {"text": EVIL, "activation": 2.0}
    return {
        "latent": 17,
        "count": 1234,
        "n_tokens": 99,
        "profile": "early",
        "layer_mean": 3.25,
        "layer_std": None,
        "n_layers_active": 2,
        "fires_on": [EVIL],
        "layers": [3, 5],
        "counts": [1, 2],
        "means": [1.0, 2.0],
        "probs": [0.25, 0.75],
        "histogram": None,
        "neighbours": [],
        "logits_above_chance": True,
        "examples": [{"layer": 3, "layers": [3, 5], "activation": 2.0, "tokens": [token, token], "position": 1}],
        "random_examples": [{"layer": 5, "layers": [5], "activation": 1.0, "tokens": [token], "position": 0}],
        "promotes": [{"token": EVIL, "logit": 1.0}],
        "suppresses": [],
        "explanations": [{"where": "all layers", "explanation": EVIL, "said": ""}],
    }


def shown(thing: Card | Prompt) -> ElementTree.Element:
    html = thing._repr_html_()
    root = ElementTree.fromstring(html)
    for element in root.iter():
        assert element.tag not in ("script", "iframe", "object", "link", "img")
        assert not any(name.startswith("on") or name in ("href", "src") for name in element.attrib)
    return root


def test_a_card() -> None:
    root = shown(Card(card()))
    text = "".join(root.itertext())
    assert "Latent 17" in text
    assert "1,234 vectors of 99 tokens, at 2 layers; mean layer 3.25" in text
    assert text.count("alert") == 6  # fires on, two tokens of an example, one of another, promotes, explained
    assert "Drawn at random:layer 5, 1.00:" in text
    assert repr(Card(card())).startswith("Latent 17: fires on ")
    assert repr(Card(card())).endswith("; mean layer 3.25; 1,234 firings (.data has all)")
    heights = [float(bar.attrib["height"]) for bar in root.iter("rect")]
    assert heights == [20, 60]
    assert "Promotes" not in "".join(shown(Card({**card(), "logits_above_chance": False})).itertext())


def test_a_piece_of_a_character_is_shown_with_its_beginning() -> None:
    tokens = [{"text": text, "activation": a} for text, a in (("x", 1.0), ("\U0001f308", 0.0), ("", 4.0), ("", 2.0))]
    example = {"layer": 5, "layers": [5], "activation": 4.0, "tokens": tokens, "position": 2}
    spans = {span.text: span.attrib["style"] for span in shown(Card({**card(), "examples": [example]})).iter("span")}
    assert spans["x"].endswith("0.25)")
    assert spans["\U0001f308"].endswith("1.00);font-weight:bold")


def test_a_prompt() -> None:
    latents = [
        {
            "latent": i,
            "layer_mean": 9.0 - i,
            "specificity": 30.0 - i,
            "fires_on": [EVIL],
            "cells": [[1, 3, 0.5], [2, 5, 1.0]],
        }
        for i in range(25)
    ]
    data = {
        "text": EVIL,
        "layers": [3, 5],
        "next": [{"token": EVIL, "token_id": 1, "p_true": 0.5}],
        "n_active_latents": 25,
        "latents": latents,
    }
    root = shown(Prompt(data))
    rows = [row.find("td").text for row in root.iter("tr") if row.find("td") is not None]  # type: ignore[union-attr]
    assert rows == [str(i) for i in range(19, -1, -1)]  # the 20 most specific, by mean layer
    first = [rect.attrib["fill"] for rect in root.iter("rect")][:2]
    assert first == ["#21918c", "#fde725"]
    assert "25 latents active" in "".join(root.itertext())
    lines = repr(Prompt(data)).splitlines()
    assert "25 latents active" in lines[0]
    assert [line.split(",")[0].strip() for line in lines[1:9]] == [str(i) for i in range(8)]
