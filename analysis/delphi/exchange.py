"""`analyze --export-delphi` and `--delphi-scores`: exports latents for EleutherAI's delphi (github.com/EleutherAI/
delphi, version 0.1.3), and adds its results to the analysis in the output folder. Files and use: docs/delphi.md.

To delphi, a latent is silent at every token without an activation, so rows are pieces of sequences in which every kept
token was analysed. Activations are float32: in delphi's own float16 some would be infinite.

Shapes: T tokens of a tile, L layers, R rows, C tokens of a row, n activations.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tqdm import tqdm

from analysis.config import AnalyzeConfig
from analysis.delphi.scores import COLUMNS, modules_of, read_results, summary_words
from analysis.encoder import sae_hash
from analysis.inputs import Inputs, open_inputs, opened_here
from analysis.model.sequences import sequence_bounds
from analysis.results.added import make_unless_there, require_there, write_report_again
from analysis.results.folder import EXPLANATIONS, LATENTS
from analysis.results.tables import read_table, write_table
from analysis.run import task_spec
from analysis.task import codes_again
from residscope.destinations import partial_folder
from residscope.errors import UsageError
from residscope.reading import reading
from store.arrays import TokenTable
from store.folder import refuse_inside_store

WINDOW = 32  # tokens in an example that delphi shows; a row is a whole number of them
LEAST_TOKENS = 200  # tokens at which a latent must have fired to be exported by default
MOST = 2**27  # most activations to export, at about 30 bytes of memory each

_Cells = tuple[NDArray[Any], ...]  # of activations above zero [n]: row * C + position, latent, activation


def exchange_with_delphi(config: AnalyzeConfig) -> dict[str, Any]:
    """Export, read back, or both; print and return what was done. Raises like `analyze`, and before any work if an
    option makes no sense."""
    options, inputs = config.delphi, open_inputs(config.store, config.sae)
    n_latents, out = inputs.sae.config.n_latents, options.export_delphi
    if out:
        refuse_inside_store(out, "--export-delphi")
        if (out / "latents").exists():
            raise UsageError(f"--export-delphi {out}: already holds an export; choose another folder, or remove it")
        if wrong := [latent for latent in options.delphi_latents if not 0 <= latent < n_latents]:
            raise UsageError(f"--delphi-latents: the autoencoder has latents 0 to {n_latents - 1}, found {wrong[0]}")
    found, done = None, dict[str, Any](exported=None, read=None)
    if options.delphi_scores:
        found = read_results(options.delphi_scores, inputs.layer_numbers, n_latents, sae_hash(inputs.sae))
    say = partial(print, file=sys.stderr) if config.output.json else print
    make_unless_there(config, inputs)
    if out:
        done["exported"] = made = _export(config, inputs, _chosen(config), out)
        say(
            f"Exported {made['activations']:,} activations of {made['latents']:,} latents in {made['rows']:,} rows of "
            f"{made['context_length']} tokens to {out / 'latents'}; {made['tokens_left_out']:,} tokens are in no row."
        )
    if found:
        require_there(config, inputs)
        with partial_folder(config.out_dir) as folder:
            write_table(pa.Table.from_pylist(found, schema=COLUMNS), folder / EXPLANATIONS)
            (folder / EXPLANATIONS).replace(config.out_dir / EXPLANATIONS)
            write_report_again(config)
        done["read"] = {"rows": len(found), "scores": sum(len(row["scores"]) for row in found)}
        say(summary_words(found))
        say(f"Written to {config.out_dir}: {EXPLANATIONS}" + (", report.html." if config.output.report else "."))
    if config.output.json:
        print(json.dumps(done, allow_nan=False))
    return done


def _chosen(config: AnalyzeConfig) -> NDArray[np.int64]:
    if config.delphi.delphi_latents:
        return np.unique(config.delphi.delphi_latents)
    path = config.out_dir / LATENTS
    with reading(f"{path}: cannot be read", "run `analyze` again"):
        fired = np.asarray(read_table(path, columns=["n_tokens"])["n_tokens"])
    if not (latents := np.flatnonzero(fired >= LEAST_TOKENS)).size:
        raise UsageError(f"--export-delphi: no latent fired at {LEAST_TOKENS} tokens; name some with --delphi-latents")
    return latents


def _export(config: AnalyzeConfig, inputs: Inputs, latents: NDArray[np.int64], out: Path) -> dict[str, Any]:
    """Write the activations of `latents` at the tokens that `config` chooses; returns what was written."""
    tokens, n_latents, selection = inputs.store.tokens, inputs.sae.config.n_latents, inputs.select(config.tokens)
    rows = rows_of(tokens, selection.analysed)
    place = np.full(len(tokens.keep), -1, np.int64)
    place[rows] = np.arange(rows.size).reshape(rows.shape)
    wanted = np.isin(np.arange(n_latents), latents)
    spec, size = task_spec(config, inputs, selection, None), 0
    found: list[list[_Cells]] = [[] for _ in (*inputs.layer_numbers, None)]
    with opened_here(spec, inputs, selection):
        codes = codes_again(spec, selection.analysed & (place >= 0))
        for token, values, indices in tqdm(codes, desc="delphi", unit=" tiles", disable=None):
            on = (values > 0) & wanted[indices]  # [T, L, k]
            t, layer, _ = np.nonzero(on)
            cells = place[token[t]].astype(np.uint32), indices[on].astype(np.uint32), values[on].astype(np.float32)
            found[-1].append(highest(cells))
            for i, parts in enumerate(found[:-1]):
                parts.append(tuple(column[layer == i] for column in cells))
            if (size := size + len(t) + len(found[-1][-1][0])) > MOST:
                less = "export fewer latents (--delphi-latents) or tokens (--max-tokens)"
                raise UsageError(f"--export-delphi {out}: more than {MOST:,} activations; {less}")
    modules, provenance = modules_of(inputs.layer_numbers), inputs.store.meta.provenance
    origin = {"model_name": provenance.get("model"), "dataset_repo": provenance.get("dataset"), "dataset_column": ""}
    origin |= {"ctx_len": rows.shape[1], "dataset_split": provenance.get("split") or "", "dataset_name": ""}
    with partial_folder(out, "--export-delphi") as folder:
        for (module, layer), parts in zip(modules.items(), found, strict=True):
            (there := folder / "latents" / module).mkdir(parents=True)
            where, latent, activations = (np.concatenate(column) for column in zip(*parts, strict=True))
            locations = np.stack([*np.divmod(where, np.uint32(rows.shape[1])), latent], axis=1)
            data = {"locations": locations, "activations": activations, "tokens": tokens.token_id[rows]}
            save_file(data, there / f"0_{n_latents - 1}.safetensors")
            record = origin | {"residscope": {"sae_hash": spec.sae_hash, "layer": layer}}
            (there / "config.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        (folder / "latents").rename(out / "latents")
    sizes = {"latents": len(latents), "activations": size, "rows": len(rows), "context_length": rows.shape[1]}
    left = selection.n_analysed - int(selection.analysed[rows].sum())
    return {"folder": str(out), "modules": [*modules], **sizes, "tokens_left_out": left}


def rows_of(tokens: TokenTable, analysed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[R, C] positions in the store of the tokens to export, from `analysed` (bool [tokens of the store]). C: half of
    all tokens are in sequences at least this long; rounded down to a multiple of `WINDOW`. Longer sequences give
    several rows, without the rest at their ends. `UsageError` if there is no row."""
    starts, stops = sequence_bounds(tokens.position)
    lengths = np.sort(stops - starts)
    half = int(lengths[np.searchsorted(np.cumsum(lengths), len(tokens.keep) / 2)])
    context = max(1, half // WINDOW) * WINDOW
    first = [np.arange(start, stop - context + 1, context) for start, stop in zip(starts, stops, strict=True)]
    rows = np.concatenate(first)[:, None] + np.arange(context)
    rows = rows[analysed[rows].any(axis=1) & ~(tokens.keep & ~analysed)[rows].any(axis=1)]
    if not rows.size:
        way_out = "harvest with a longer --context-length, or analyse more tokens"
        raise UsageError(f"--export-delphi: no {context} consecutive tokens of a sequence are all analysed: {way_out}")
    return rows


def highest(cells: _Cells) -> _Cells:
    """The highest activation of each latent at each place, in the order of places."""
    order = np.lexsort((-cells[2], cells[1], cells[0]))
    place, latent, activation = (column[order] for column in cells)
    new = np.append(True, (np.diff(place) != 0) | (np.diff(latent) != 0))[: len(place)]
    return place[new], latent[new], activation[new]
