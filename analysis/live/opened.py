"""An analysis opened again: its tables, what is known of each latent, and, if the model is available, live answers.

    analysis = residscope.open("ckpt.analysis")
    analysis.latents, analysis.layers                 pandas tables
    analysis.latent(17)                               a card, which a notebook displays
    analysis.prompt("def f():\\n    return")           its latents over layers and tokens

Numbers are those of the files, unchanged. Files are read when they are needed; the model is loaded at the first
question that needs it.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from analysis.delphi.scores import read_explanations
from analysis.inputs import open_inputs
from analysis.latents.search import search
from analysis.latents.windows import CONTEXTS, Context, read_contexts
from analysis.live.model import LiveModel
from analysis.live.shown import Card, Prompt
from analysis.model.findings import locate
from analysis.prompt.run import usual_of
from analysis.report.data import finite
from analysis.results import folder as files
from analysis.results.added import has_analysis
from analysis.results.summary import read_summary
from analysis.results.tables import read_table
from residscope.errors import IncompatibleError, UsageError
from residscope.reading import reading
from residscope.urls import as_path

SHARE = 0.5
"""The share of a latent's activation mass that must be at the layers asked for."""

FOUND = ("latent", "fires_on", "profile", "layer_mean", "share_of_tokens", "count", "score", "why")
"""Columns of what `search` returns. share_of_tokens: share of the analysed tokens at which it fires, 0 to 1."""

_AGAIN = "run `analyze` again"


class Analysis:
    """What `analyze` wrote into a folder, with the store, autoencoder and model that it came from."""

    def __init__(self, folder: Path, store: Path | None, sae: Path | None, model: str | None, lens: str | None) -> None:
        self.folder, self._places, self._model, self._lens = folder, (store, sae), model, lens
        self.summary = read_summary(folder / files.SUMMARY)
        self.stop = Event()
        """Set by another thread, it ends the answer that the model is computing, with a `ResidscopeError`."""

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        store: str | Path | None = None,
        sae: str | Path | None = None,
        model: str | None = None,
        lens: str | None = None,
    ) -> "Analysis":
        """The analysis in `folder`. store, sae: where they are now; by default where `analyze` read them, else in
        the folder or beside it. model, lens: as for `analyze`. Raises `UsageError` if there is no analysis."""
        place = as_path(folder)
        if not (place / files.SUMMARY).is_file():
            raise UsageError(f"{folder}: no analysis there (no {files.SUMMARY}); give the folder that `analyze` wrote")
        places = [None if one is None else as_path(one) for one in (store, sae)]
        return cls(place, places[0], places[1], model, lens)

    @property
    def layer_numbers(self) -> list[int]:
        """The model's block index for each entry of lists by layer, such as `probs`."""
        return [int(layer) for layer in self.summary["layer_numbers"]]

    @cached_property
    def latents(self) -> pd.DataFrame:
        """latents.parquet: a row for each latent, dead ones too."""
        return self._table.to_pandas()

    @cached_property
    def layers(self) -> pd.DataFrame:
        """layers.parquet: a row for each layer."""
        with reading(f"{self.folder / files.LAYERS}: cannot be read", _AGAIN):
            return read_table(self.folder / files.LAYERS).to_pandas()

    @cached_property
    def contexts(self) -> dict[int, list[Context]]:
        """The distinct contexts of each latent, which `search` reads."""
        with reading(f"{self.folder / files.EXAMPLES}: cannot be read", _AGAIN):
            return read_contexts(self.folder / files.EXAMPLES, CONTEXTS)

    @cached_property
    def live(self) -> LiveModel:
        """The model, loaded at the first use. Raises `ResidscopeError`, with the way out, if something is not found or
        is not what was analysed."""
        with reading(f"{self.folder / files.CONFIG}: cannot be read", "give store and sae"):
            recorded = tomllib.loads((self.folder / files.CONFIG).read_text(encoding="utf-8"))
        paths = []
        for name, given in zip(("store", "sae"), self._places, strict=True):
            before = as_path(str(recorded.get(name)))
            candidates = [given] if given else [before, self.folder / before.name, self.folder.parent / before.name]
            path = next((path for path in candidates if path.exists()), None)
            if path is None:
                where = " or ".join(map(str, candidates))
                raise UsageError(f"{self.folder}: its {name} was not found at {where}; say where it is: {name}=...")
            paths.append(path)
        inputs = open_inputs(*paths)
        if not has_analysis(self.folder, inputs):
            what = f"not an analysis of {paths[0]} and {paths[1]} by this version"
            raise IncompatibleError(f"{self.folder}: {what}; give its own store and sae, or {_AGAIN}")
        model = locate(inputs.store, self._model, self._lens, offline=self._model is None)
        return LiveModel(inputs, model, usual_of(self.folder), self.stop)

    def card(self, latent: int) -> dict[str, Any]:
        """All that is known of a latent, in plain values, None if undefined. `UsageError` for no such latent."""
        row = self._row(latent)
        names = ("latent", "count", "n_tokens", "profile", "layer_mean", "layer_std", "n_layers_active")
        near = zip(row.get("neighbours") or [], row.get("neighbour_cosines") or [], strict=True)
        with reading(f"{self.folder}: a table is damaged, or of another version", _AGAIN):
            return _plain(
                {
                    **{name: row.get(name) for name in names},
                    "of_tokens": self.summary["n_tokens"],
                    "fires_on": self._fires_on[latent],
                    "layers": self.layer_numbers,
                    **{name: row[name] for name in ("counts", "means", "probs")},
                    "histogram": self._histogram(latent),
                    "examples": self._examples(files.EXAMPLES, latent),
                    "random_examples": self._examples(files.RANDOM_EXAMPLES, latent),
                    **self._ends(latent),
                    "explanations": read_explanations(self.folder / files.EXPLANATIONS, latent).get(latent, []),
                    "neighbours": [{"latent": other, "cosine": cosine} for other, cosine in near],
                }
            )

    def latent(self, latent: int) -> Card:
        """The card, as an object that a notebook displays; `.data` is what `card` returns."""
        return Card(self.card(latent))

    def prompt(
        self, text: str, most: int = 60, effects_after: int | None = None, effects_against: str | None = None
    ) -> Prompt:
        """The latents of a text, as an object that a notebook displays. most: how many, the most specific. `.data` has
        plain values: those of prompt.json and, for each latent, its `cells` [[position, layer, activation]], what it
        fires on, and the share of the analysed tokens at which it fires (0 to 1).

        effects_after: a position in the text. Each cell then ends with its effect on the log probability of the token
        that is likeliest after it, minus that of `effects_against` if given (as in `attribute`). Each latent has
        `effect`, the sum at one layer in nats, and `effect_layer`, the layer where that is furthest from 0; those with
        the largest effects come first."""
        data = self.live.prompt(text, most, effects_after, effects_against)
        for latent in data["latents"]:
            latent["fires_on"] = self._fires_on[latent["latent"]]
            latent["share_of_tokens"] = self._share_of_tokens(latent["latent"])
        return Prompt(data)

    def intervene(
        self, text: str, changes: Sequence[Mapping[str, Any]], continue_tokens: int = 0, tokens: Sequence[str] = ()
    ) -> dict[str, Any]:
        """What all changes together do to the token after a text, and how the text continues with and without them.

        changes: {"kind": "ablate" or "steer", "latent", "layers": [int] or "all", "coefficient" to steer: the
        activation to add, "positions": [int] in the text, from 0; if left out, all}. continue_tokens: at most 64.
        tokens: texts with their space; `watched` has their probabilities and changes of logit (less the mean one)."""
        return _plain(self.live.intervene(text, changes, continue_tokens, tokens))

    def attribute(
        self, text: str, token: str | None = None, *, against: str | None = None, position: int | None = None
    ) -> pd.DataFrame:
        """How much each activation in a text contributes to a prediction, to first order (see
        `analysis.prompt.attribution`): a row for each, the largest effect first, with what its latent fires on.

        token: the predicted token, as text with its space (" the"); default: the likeliest. against: another token.
        position: the token of the text after which it is predicted, from 0, the opening token included; default: the
        last. `effect`: the nats that the token's log probability would lose if the latent were taken out at this
        position after this layer alone; with `against`, that its logit would lose relative to the other's. Below 0, the
        latent works against the token. `.attrs` has what was asked, and `missed`: by layer, the effect of what the
        autoencoder misses there, its error at the kept positions."""
        found = self.live.effects(text, token, against, position)
        table = pd.DataFrame({**found.activations._asdict(), "effect": found.effect})
        table.insert(1, "token", [found.texts[place] for place in table["position"]])
        table["fires_on"] = [self._fires_on[latent] for latent in table["latent"]]
        asked = {"text": text, "token": found.token, "against": against, "position": found.position}
        table.attrs = {**asked, "missed": found.missed}
        return table.sort_values("effect", key=np.abs, ascending=False, kind="stable", ignore_index=True)

    def search(
        self,
        *,
        tokens: str | Sequence[str] | None = None,
        promotes: str | None = None,
        on: str | None = None,
        off: str | None = None,
        from_layer: int | None = None,
        to_layer: int | None = None,
        profile: str | None = None,
        explained: str | None = None,
        limit: int = 50,
    ) -> pd.DataFrame:
        """Latents that meet all conditions, the best first: by `score`, the product of the conditions' scores
        (comparable only within one search); `why` says it in words.

        tokens: words or phrases, one of which is enough; scored by how specific a latent is to them
        (`analysis.latents.search`). promotes: a token; scored by its rank among those promoted. on, off: texts, active
        in one and not in the other; scored by mass (needs the model). from_layer, to_layer: scored by the share of its
        mass there, at least `SHARE`. profile: the kind of its layer profile, as in the table. explained: words, or
        parts of them, all in one of its explanations by delphi, if those were read back."""
        conditions: list[dict[int, tuple[float, str]]] = []  # by latent its score, and why
        if tokens:
            with reading("tokens should be a text or a list of texts", kind=UsageError):
                wanted = tokens if isinstance(tokens, str) else ", ".join(tokens)
            conditions.append({hit.latent: (hit.score, hit.why) for hit in search(self.contexts, wanted)})
        if promotes:
            conditions.append(self._promoting(promotes.strip().lower()))
        if on or off:
            conditions.append(self._on_and_off(on, off))
        numbers, live = np.array(self.layer_numbers), np.flatnonzero(self.latents["count"] > 0)
        if from_layer is not None or to_layer is not None:
            low = numbers[0] if from_layer is None else from_layer
            high = numbers[-1] if to_layer is None else to_layer
            there = (numbers >= low) & (numbers <= high)
            share = np.array(self.latents["probs"].to_list())[live][:, there].sum(axis=1)
            why = f"of its activation at layers {low} to {high}"
            pairs = zip(live.tolist(), share.tolist(), strict=True)
            conditions.append({latent: (part, f"{100 * part:.0f} % {why}") for latent, part in pairs if part >= SHARE})
        if profile:
            if profile not in (kinds := list(self.summary.get("profiles") or {})):
                raise UsageError(f"profile should be one of {', '.join(kinds)}, found {profile!r}")
            same = live[self.latents["profile"].to_numpy()[live] == profile]
            conditions.append(dict.fromkeys(same.tolist(), (1.0, f"profile: {profile}")))
        if explained and explained.strip():
            conditions.append(self._explained(explained.lower().split()))
        if not conditions:
            return pd.DataFrame(columns=FOUND)
        common = set(conditions[0]).intersection(*conditions[1:])
        scores = {latent: float(np.prod([hits[latent][0] for hits in conditions])) for latent in common}
        best = sorted(common, key=lambda latent: (-scores[latent], latent))[:limit]
        table = self.latents.iloc[best]
        columns = {
            "latent": best,
            "fires_on": [self._fires_on[latent] for latent in best],
            **{name: table[name].to_list() for name in ("profile", "layer_mean", "count")},
            "share_of_tokens": [self._share_of_tokens(latent) for latent in best],
            "score": [scores[latent] for latent in best],
            "why": ["; ".join(hits[latent][1] for hits in conditions) for latent in best],
        }
        return pd.DataFrame(columns, columns=FOUND)

    def __repr__(self) -> str:
        model = self.summary["provenance"]["store"].get("model") or "unnamed model"
        size = f"{self.summary['n_layers']} layers, {self._table.num_rows:,} latents"
        return f"Analysis({str(self.folder)!r}: {model}, {size})"

    def _explained(self, words: Sequence[str]) -> dict[int, tuple[float, str]]:
        if not (self.folder / files.EXPLANATIONS).is_file():
            raise UsageError("this analysis has no explanations: add them with `analyze --delphi-scores`")
        return {
            latent: (1.0, f"explained, {row['where']}: {row['explanation']}")
            for latent, rows in read_explanations(self.folder / files.EXPLANATIONS).items()
            for row in reversed(rows)  # the first that matches is named
            if all(word in (row["explanation"] or "").lower() for word in words)
        }

    def _share_of_tokens(self, latent: int) -> float:
        return float(self.latents["n_tokens"].iloc[latent]) / self.summary["n_tokens"]

    @cached_property
    def _table(self) -> Any:
        with reading(f"{self.folder / files.LATENTS}: cannot be read", _AGAIN):
            return read_table(self.folder / files.LATENTS).combine_chunks()

    @cached_property
    def _fires_on(self) -> list[list[str]]:
        known = self._table["fires_on"].to_pylist() if "fires_on" in self._table.column_names else []
        return [words or [] for words in known] or [[]] * self._table.num_rows

    def _row(self, latent: int) -> dict[str, Any]:
        if not isinstance(latent, Integral) or not 0 <= latent < self._table.num_rows:
            raise UsageError(f"there are latents 0 to {self._table.num_rows - 1}, found {latent!r}")
        return self._table.slice(latent, 1).to_pylist()[0]

    def _rows(self, name: str, latent: int) -> list[dict[str, Any]]:
        """A latent's rows of a file that an analysis may lack."""
        path = self.folder / name
        with reading(f"{path}: cannot be read", _AGAIN):
            return read_table(path, filters=[("latent", "=", latent)]).to_pylist() if path.is_file() else []

    def _histogram(self, latent: int) -> dict[str, Any] | None:
        """Sizes of activations: the bins' edges, and for each layer its number, the first bin with a count, counts."""
        if not (rows := self._rows(files.HISTOGRAMS, latent)):
            return None
        edges = json.loads((pq.read_schema(self.folder / files.HISTOGRAMS).metadata or {}).get(b"edges", b"[]"))
        found = []
        for row in rows:
            some = np.flatnonzero(row["counts"])
            found.append([row["layer"], int(some[0]), *row["counts"][some[0] : some[-1] + 1]])
        return {"edges": edges, "rows": found}

    def _examples(self, file: str, latent: int) -> list[dict[str, Any]]:
        """Distinct contexts, each at its strongest layer, with all the layers at which it is an example. Those that are
        the strongest of some layer come first."""
        contexts: dict[int, list[dict[str, Any]]] = {}
        for row in self._rows(file, latent):
            contexts.setdefault(row["token"], []).append(row)
        found = []
        for rows in contexts.values():
            top = max(rows, key=lambda row: (row["activation"], -row["layer"]))
            pairs = zip(top["texts"], top["activations"], strict=True)
            example = {
                "layer": top["layer"],
                "layers": sorted(row["layer"] for row in rows),
                "activation": top["activation"],
                "tokens": [{"text": text or "", "activation": a or 0.0} for text, a in pairs],
                "position": top["marked"],
                "document": top["document"],
            }
            found.append((all(row["rank"] for row in rows), -top["activation"], top["token"], example))
        return [example for *_, example in sorted(found, key=lambda one: one[:3])[:CONTEXTS]]

    def _ends(self, latent: int) -> dict[str, Any]:
        """The tokens that it promotes and suppresses by the direct path, and whether its cosine is above chance."""
        rows = self._rows(files.LATENT_LOGITS, latent)
        above = bool(rows) and (rows[0]["unembedding_cosine"] or 0.0) > self._chance
        ends: dict[str, Any] = {"logits_above_chance": above}
        for name, column in (("promotes", "promoted"), ("suppresses", "suppressed")):
            pairs = [pair for row in rows for pair in zip(row[column], row[f"{column}_logits"], strict=True)]
            ends[name] = [{"token": token, "logit": logit} for token, logit in pairs]
        return ends

    @property
    def _chance(self) -> float:
        logits = self.summary.get("latent_logits") or {}
        return logits.get("unembedding_chance_99") or logits.get("unembedding_chance") or 0.0

    def _promoting(self, token: str) -> dict[int, tuple[float, str]]:
        path = self.folder / files.LATENT_LOGITS
        if not path.is_file():
            raise UsageError(f"{self.folder} has no promoted tokens: {_AGAIN} where the model is available")
        found = {}
        for row in read_table(path, columns=["latent", "promoted", "unembedding_cosine"]).to_pylist():
            places = [i for i, text in enumerate(row["promoted"]) if text.strip().lower() == token]
            if places and (row["unembedding_cosine"] or 0.0) > self._chance:
                why = f"promotes it, rank {places[0] + 1} of {len(row['promoted'])}"
                found[row["latent"]] = (row["unembedding_cosine"] / (places[0] + 1), why)
        return found

    def _on_and_off(self, on: str | None, off: str | None) -> dict[int, tuple[float, str]]:
        off_latents = set(self.live.activations(off).latent.tolist()) if off else set()
        if on is None:
            live = np.flatnonzero(self.latents["count"] > 0).tolist()
            return {latent: (1.0, "off") for latent in live if latent not in off_latents}
        found = self.live.activations(on)
        mass = np.bincount(found.latent, found.activation.astype(np.float64))
        active = np.unique(found.latent).tolist()
        return {i: (float(mass[i]), f"mass {mass[i]:.3g} in the text") for i in active if i not in off_latents}


def _plain(value: Any) -> Any:
    """The value with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return finite(value) if isinstance(value, float) else value


open = Analysis.open
"""`residscope.open`."""
