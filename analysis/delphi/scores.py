"""delphi's results: explanations of latents and their scores, read from its folders and saved in an analysis as
explanations.parquet. Formats and definitions: docs/delphi.md. Files of unknown scorers are left out."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.report.data import finite
from analysis.results.tables import read_table
from residscope.errors import IncompatibleError, UsageError
from residscope.reading import read_json, reading

MEASURES = {"balanced_accuracy": "balanced accuracy", "auc": "AUC", "correlation": "correlation"}
_SCORE = pa.struct([("scorer", pa.string()), ("examples", pa.int64()), *((name, pa.float64()) for name in MEASURES)])
COLUMNS = pa.schema(
    [("latent", pa.int64()), ("layer", pa.int64()), ("explanation", pa.string()), ("scores", pa.list_(_SCORE))]
)
"""explanations.parquet: a row for each latent and layer with a text or score; layer null: all layers."""


def modules_of(layers: Sequence[int]) -> dict[str, int | None]:
    """delphi's module names of the layers (the model's block indices), and last of all layers at once (None). Numbers
    have equal numbers of digits, because delphi finds a module's results by a part of its name."""
    digits = len(str(max(layers)))
    return {**{f"layers.{layer:0{digits}d}": layer for layer in layers}, "all_layers": None}


def read_results(folder: Path, layers: Sequence[int], n_latents: int, sae_hash: str) -> list[dict[str, Any]]:
    """Rows of explanations.parquet from a folder, sorted by latent, all layers before single ones. `UsageError` if it
    has no results, `IncompatibleError` if they are of another autoencoder or damaged."""
    for path in sorted(folder.glob("latents/*/config.json")):
        with reading(f"{path}: not as --export-delphi writes it"):
            if (of := read_json(path).get("residscope", {}).get("sae_hash", sae_hash)) != sae_hash:
                raise IncompatibleError(f"{path}: should be of the autoencoder {sae_hash}, found {of}: give its folder")
    modules, rows = modules_of(layers), dict[tuple[int, int], dict[str, Any]]()
    for path in sorted([*folder.glob("explanations/*.txt"), *folder.glob("scores/*/*.txt")]):
        module, _, number = path.stem.rpartition("_latent")
        if module not in modules or not re.fullmatch(r"\d+", number) or int(number) >= n_latents:
            wanted = f"MODULE_latentN.txt with MODULE one of {', '.join(modules)} and N below {n_latents}"
            raise IncompatibleError(f"{path}: should be {wanted}, as --export-delphi named them")
        latent, layer, content = int(number), modules[module], read_json(path)
        row = {"latent": latent, "layer": layer, "explanation": None, "scores": []}
        row = rows.setdefault((latent, -1 if layer is None else layer), row)
        with reading(f"{path}: not as delphi writes it"):
            if path.parent.parent == folder:
                row["explanation"] = str(content)
            else:
                row["scores"].append({"scorer": path.parent.name, **_score(content)})
    if not rows:
        wanted = "explanations/*.txt and scores/*/*.txt, as delphi leaves them"
        raise UsageError(f"--delphi-scores {folder}: nothing to read there; it should have {wanted}")
    return [rows[key] for key in sorted(rows)]


def _score(content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers in a score file; none if its format is not known."""
    if all({"activating", "prediction"} <= one.keys() for one in content):

        def of(name: str) -> list[np.ndarray]:
            """The values for active and for silent examples."""
            pairs = [(bool(one["activating"]), one.get(name)) for one in content]
            return [np.array([float(x) for on, x in pairs if on == side and x is not None]) for side in (True, False)]

        (hits, alarms), (on, off) = of("prediction"), of("probability")
        right = (hits.mean() + 1 - alarms.mean()) / 2 if hits.size and alarms.size else None
        wins = (on[:, None] > off).mean() + (on[:, None] == off).mean() / 2 if on.size and off.size else None
        return {"examples": hits.size + alarms.size, "balanced_accuracy": right, "auc": wins}
    if all("ev_correlation_score" in one for one in content):
        (every,) = [one for one in content if one["distance"] == 0]
        n = len(every["scored_sequence_simulations"])
        return {"examples": n, "correlation": finite(float(every["ev_correlation_score"]))}  # "nan" where one is flat
    return {}


def read_explanations(path: Path, latent: int | None = None) -> dict[int, list[dict[str, Any]]]:
    """The rows of explanations.parquet by latent, or only those of one, with the layer (`where`) and scores (`said`) as
    text. Empty if there is no such file."""
    found: dict[int, list[dict[str, Any]]] = {}
    if path.is_file():
        with reading(f"{path}: cannot be read", "give --delphi-scores again"):
            for row in read_table(path, filters=None if latent is None else [("latent", "=", latent)]).to_pylist():
                where = "all layers" if row["layer"] is None else f"layer {row['layer']}"
                row |= {"where": where, "said": "; ".join(map(_score_words, row["scores"]))}
                found.setdefault(row.pop("latent"), []).append(row)
    return found


def _score_words(score: Mapping[str, Any]) -> str:
    known = [name for name in MEASURES if finite(score.get(name)) is not None]
    numbers = [f"{MEASURES[name]} {score[name]:.2f}" for name in known]
    return f"{score['scorer']}: {', '.join(numbers) or 'not defined, or in an unknown format'}"


def summary_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much was read, and the mean numbers of each scorer."""
    scores: Any = pd.DataFrame([score for row in rows for score in row["scores"]], columns=["scorer", *MEASURES])
    means = scores.astype(dict.fromkeys(MEASURES, float)).groupby("scorer").mean().reset_index().to_dict("records")
    lines = [f"Read delphi's results for {len(rows):,} latents and layers, with {len(scores):,} scores."]
    return "\n".join([*lines, *(f"  Means of {_score_words(one)}" for one in means)])
