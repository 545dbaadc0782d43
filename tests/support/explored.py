"""The server of `residscope explore` in a thread, over any object with the methods of an `Analysis`; and stand-ins."""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd
import uvicorn

from analysis.explore.server import make_app
from analysis.live.opened import FOUND
from residscope.errors import UsageError

TOKEN = "token-of-the-tests"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any
    """JSON as objects, all else as text."""


class Served(NamedTuple):
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={TOKEN}"

    def ask(self, path: str, body: Any = None, **changes: str | None) -> Answer:
        """GET, or POST of a body: bytes, or an object as JSON. changes: of the headers, None for none."""
        given = {
            "Host": f"127.0.0.1:{self.port}",
            "X-Token": TOKEN,
            **{k.replace("_", "-"): v for k, v in changes.items()},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {name: value for name, value in given.items() if value is not None}
        connection.request("GET" if body is None else "POST", path, data, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, json.loads(text) if "json" in found.get("content-type", "") else text)


@contextmanager
def serving(analysis: Any) -> Iterator[Served]:
    """The server, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(make_app(analysis, TOKEN), log_level="critical", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield Served(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(timeout=60)


class Stub:
    """Answers with what it was asked; `work` is called, with the name of the method, before each answer."""

    def __init__(self, work: Callable[[str, dict[str, Any]], None] = lambda name, given: None) -> None:
        self._work = work
        self.summary: dict[str, Any] = {
            "provenance": {"store": {"model": "m", "dataset": "d"}, "sae": {"name": "s"}},
            **dict.fromkeys(("n_tokens", "n_layers", "n_latents"), 4),
            "layers": [],
        }
        self.live, self.stop = None, threading.Event()

    def _answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        self._work(name, given)
        return {"asked": name, **given}

    def card(self, **given: Any) -> Any:
        return self._answer("card", given)

    def search(self, **given: Any) -> Any:
        return pd.DataFrame([self._answer("search", given)])

    def prompt(self, **given: Any) -> Any:
        return SimpleNamespace(data=self._answer("prompt", given))

    def intervene(self, **given: Any) -> Any:
        return self._answer("intervene", given)


LAYERS = [2, 3, 4, 5, 6]
PLANTED = {7: "moves up a layer per token", 8: "stays on from layer 3 to 5 at every token", 9: "on at the last token"}
WORDS = {7: ["up", "\n"], 8: ["stays"], 9: ["<img src=x onerror=alert(1)>"], 10: []}


class Planted(Stub):
    """An analysis of a model with five layers and four latents, of which all is known: one token for each word, and
    latents that do at each text what `PLANTED` says. Latent 10 never fires."""

    def __init__(self) -> None:
        super().__init__()
        self.summary |= {
            "n_layers": len(LAYERS),
            "profiles": {"early": {}, "late": {}},
            "warnings": ["89 % of the variance of layer 4 is in 3 tokens"],
            "downstream": {
                "tokens": "validation",
                "n_tokens": 254,
                "n_documents": 1,
                "true_ce": 2.5,
                "together": {
                    "n_tokens": 64,
                    "groups": [{"kind": "all", "n": 5, "delta_ce": 3.0, "mean_ablation_delta_ce": 4.0}],
                },
            },
            "layers": [
                {"layer": layer, "fvu": 0.09996 + i / 1e3, "delta_ce": 1.25 if layer == 4 else 0.5, "kl": None}
                for i, layer in enumerate(LAYERS)
            ],
        }
        self.asked: list[dict[str, Any]] = []

    def card(self, **given: Any) -> Any:
        latent: int = given["latent"]
        if latent not in WORDS:
            raise UsageError(f"the latents are 7 to 10, found {latent}")
        counts = [[3, 2, 1, 1, 1], [0, 5, 5, 5, 0], [1, 1, 1, 1, 1], [0] * 5][latent - 7]
        tokens = [
            {"text": " be", "activation": 0.0},
            {"text": "fore\n", "activation": 1.5},
            {"text": "</p>", "activation": 0.5},
        ]
        example = {"layer": 3, "layers": [3, 4], "activation": 1.5, "tokens": tokens, "position": 1, "document": 0}
        promoted = [{"token": " up", "cosine": 0.25}, {"token": "\n  ", "cosine": 0.125}]
        return {
            "latent": latent,
            "count": sum(counts),
            "n_tokens": max(counts),
            "of_tokens": 40,
            "fires_on": WORDS[latent],
            "profile": "early",
            "layer_mean": 3.14159,
            "layer_std": 1.0,
            "n_layers_active": sum(c > 0 for c in counts),
            "layers": LAYERS,
            "counts": counts,
            "means": [c / 4 for c in counts],
            "probs": [c / max(sum(counts), 1) for c in counts],
            "histogram": {"edges": [0.0, 0.5, 1.0, 2.0], "rows": [[3, 1, 4, 5], [4, 0, 6]]},
            "examples": [example],
            "random_examples": [{**example, "activation": 0.5}],
            "promotes": promoted,
            "suppresses": promoted[:1],
            "logits_above_chance": latent == 7,
            "neighbours": [{"latent": 8, "cosine": 0.5}],
            "explanations": [{"where": "layer 3", "explanation": "of <ends>", "said": "fuzz: AUC 0.75 (8 examples)"}],
        }

    def search(self, **given: Any) -> Any:
        self.asked.append(given)
        words = given.get("tokens", "")
        rows = [
            (j, found, None, 3.5, 0.25, 8, 0.75, f"fires on {words}")
            for j, found in WORDS.items()
            if any(words and words in one for one in found)
        ]
        return pd.DataFrame(rows, columns=FOUND)

    def prompt(self, **given: Any) -> Any:
        text: str = given["text"]
        if text == "too long":
            raise UsageError("the text has 900 tokens: the model takes at most 256")
        self._work("prompt", {"text": text})
        words = ["<s>", *text.split(" ")]
        n = len(words)
        on = {
            7: [[t, LAYERS[t % 5], 1.0 + t] for t in range(1, n)],
            8: [[t, layer, 2.0] for t in range(1, n) for layer in (3, 4, 5)],
            9: [[n - 1, 2, 0.123456789], [n - 1, 6, 0.25]],
        }
        latents = [
            {
                "latent": latent,
                "mass": sum(cell[2] for cell in cells),
                "layer_mean": sum(cell[1] * cell[2] for cell in cells) / sum(cell[2] for cell in cells),
                "peak_layer": cells[0][1],
                "peak": max(cell[2] for cell in cells),
                "peak_position": n - 1,
                "fires_on": WORDS[latent],
                "specificity": float(latent),
                "share_of_tokens": 0.125 if latent == 9 else 0.0625,
                "cells": cells,
            }
            for latent, cells in on.items()
        ]
        tokens: list[dict[str, Any]] = [{"token": word, "token_id": t, "kept": t > 0} for t, word in enumerate(words)]
        for token in tokens:
            token["next"] = [{"token": f"{token['token']}?", "token_id": 5, "p_true": 0.25}]
        after, effects = given.get("effects_after"), {}
        if after is not None:
            self.asked.append(given)
            effects = {"effects": {"after": after, "token": " on", "against": given.get("effects_against")}}
            for latent in latents:
                of_layer = dict.fromkeys(LAYERS, 0.0)
                for cell in latent["cells"]:
                    cell.append((-1 if latent["latent"] == 8 else 0.5) * cell[2] * (cell[0] <= after))
                    of_layer[cell[1]] += cell[3]
                latent["effect_layer"] = max(of_layer, key=lambda layer: abs(of_layer[layer]))
                latent["effect"] = of_layer[latent["effect_layer"]]
        chances = [{"token": " on", "token_id": 3, "p_true": 0.5}, {"token": "\n", "token_id": 4, "p_true": 0.0625}]
        return SimpleNamespace(
            data={
                **effects,
                "text": text,
                "tokens": tokens,
                "layers": LAYERS,
                "next": chances,
                "latents": latents,
                "n_active_latents": 3,
            }
        )

    def intervene(self, **given: Any) -> Any:
        self.asked.append(given)
        true, changed = [{"token": " on", "token_id": 3, "p": 0.5}], [{"token": " off", "token_id": 5, "p": 0.75}]
        moved = {"token": " off", "token_id": 5, "p_true": 0.125, "p_changed": 0.75, "logit_change": 2.0}
        return {
            "kl_last": 0.123456,
            "kl_mean": 0.0,
            "notes": [],
            "next_true": true,
            "next_changed": changed,
            "increased": [moved],
            "decreased": [],
            "text_true": " and on",
            "text_changed": " and off",
        }
