"""What `analyze` prints: the summary in plain sentences and small tables, with units and directions.

Made from summary.json alone; no number is computed here. Tested in tests/analysis/test_run.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.baselines.nulls import NULLS
from analysis.model.together import group_words
from analysis.moments import VARIANCE_NAMES
from residscope.console import aligned, counted

_ROW_NAMES = {"mass": "by mass", "equal": "by token-latent pair", "latent": "by latent"}

_COLUMNS = {"fvu": "FVU", "fvu_without_few": "FVU without outlier tokens", "validation_fvu": "validation FVU"}
_COLUMNS |= {
    "pca_fvu": "PCA FVU",
    "mse": "MSE",
    "l0": "L0",
    "mean_norm": "mean norm",
    "cosine_to_next": "cosine to next",
}


def words(summary: Mapping[str, Any]) -> str:
    """The findings as a few dozen lines of text."""
    variance, compat = summary["variance"], summary["variance"]["mlsae_compat"]
    latents, sae = summary["latents"], summary["provenance"]["sae"]
    kind = sae["activation"] + (f", k {sae['k']}" if sae["k"] else "")
    few = summary["reconstruction"]["fvu_without_few"] is not None
    columns = {name: head for name, head in _COLUMNS.items() if few or name != "fvu_without_few"}
    lines = [
        f"{sae['name']} on {summary['provenance']['store']['name']}: {summary['n_layers']} layers, "
        f"{summary['n_latents']:,} latents, {kind}; "
        f"{latents['active']:,} fired, {latents['dead']:,} never did.",
        summary["split"]["text"],
        *(f"warning: {warning}" for warning in summary["warnings"]),
        "",
        "How latents spread over layers: variance of the layer index, in layers squared"
        + (", with 95 % intervals over documents" if summary["uncertainty"] else ""),
        *table(
            ("weighting", "within token", "between tokens", "between latents", "total", "aggregate / token-level"),
            [
                (
                    label,
                    *(shown(variance[w][name]) for name in VARIANCE_NAMES[:4]),
                    with_interval(variance[w], "aggregate_over_token"),
                )
                for w, label in _ROW_NAMES.items()
            ],
        ),
        "",
        *_headline(variance["mass"]["aggregate_over_token"], compat["rel_var_t"]),
        *filter(None, [(summary.get("convergence") or {}).get("text")]),
        "",
        *_persistence_words(summary["persistence"]["mass"]),
        *_null_words(summary),
        *_latent_words(summary),
        "",
        f"Reconstruction by layer{_left_out(summary)} "
        "(FVU and MSE: lower is better; FVU 1 is no better than the layer's mean)",
        *table(("layer", *columns.values()), _layer_rows(summary, *columns)),
        *_fvu_words(summary),
        *_model_words(summary),
    ]
    return "\n".join(lines)


def _headline(ratio: float | None, reference: float | None) -> list[str]:
    if ratio is None:
        return ["The token-level variance is 0: no latent is active at two layers of one token, so there is no ratio."]
    line = (
        f"The aggregate variance (within + between tokens) is {ratio:.3g} times "
        "the token-level variance (within token), by mass."
    )
    if not reference:
        return [line]
    return [
        line,
        f"The reference's formula on the same codes gives {1 / reference:.3g} times. Its averages include tokens at",
        "which a latent is silent, as if its mass were at layer 0: so it does not compare variances, and its ratio",
        "depends on how layers are numbered (docs/method.md).",
    ]


def _persistence_words(means: Mapping[str, Any]) -> list[str]:
    if means["n_layers_active"] is None:
        return []
    lines = [
        "Along the layers of a token, by mass: a latent is on at "
        f"{with_interval(means, 'n_layers_active')} layers, first at {shown(means['onset'])} and last at "
        f"{shown(means['offset'])}; its longest run is {with_interval(means, 'run_length')} layers."
    ]
    single, unbroken = means["single_layer"], means["unbroken_multi"]
    if unbroken is not None:
        lines.append(
            f"On at one layer only: {100 * single:.0f} %. Of the others, {100 * unbroken:.0f} % switch on once and "
            f"stay on until they switch off (contiguity {with_interval(means, 'contiguity_multi')})."
        )
    return lines


def _null_words(summary: Mapping[str, Any]) -> list[str]:
    if not (nulls := summary["nulls"]):
        return []
    rows = []
    for part, name, label in (
        ("variance", "within_token", "within token, layers squared"),
        ("variance", "aggregate_over_token", "aggregate / token-level"),
        ("persistence", "run_length", "longest run, layers"),
        ("persistence", "stays_on", "share still on at the next layer"),
    ):
        ratios = [nulls[null]["ratio"][part]["mass"] for null in NULLS]
        values = [nulls[null][part]["mass"][name] for null in NULLS]
        cells = (f"{shown(value)} (x {with_interval(r, name)})" for value, r in zip(values, ratios, strict=True))
        rows.append((label, shown(summary[part]["mass"][name]), *cells))
    head = ("null models, by mass (x: observed / null)", "observed", "layers permuted", "tokens permuted")
    return table(head, rows)


def _latent_words(summary: Mapping[str, Any]) -> list[str]:
    kinds, found = summary["profiles"], summary["redundancy"]
    lines = ["Kinds of latents: " + ", ".join(f"{part['latents']:,} {kind}" for kind, part in kinds.items()) + "."]
    if found:
        lines.append(
            f"Decoder rows: MMCS {shown(found['mmcs'])}; {found['parallel_pairs']:,} pairs with a cosine above "
            f"{found['cosine_threshold']:g}, {found['redundant_pairs']:,} of them with disjoint layer profiles."
        )
    return lines


def _fvu_words(summary: Mapping[str, Any]) -> list[str]:
    reconstruction, validation, pca = summary["reconstruction"], summary["validation"], summary["baseline"]["pca"]
    lines = [
        f"Mean over layers, analysed tokens: FVU {with_interval(reconstruction, 'fvu')}, "
        f"L0 {with_interval(reconstruction, 'l0')}."
    ]
    if reconstruction["fvu_without_few"] is not None:
        lines.append(f"Without the outlier tokens of the warning: FVU {shown(reconstruction['fvu_without_few'])}.")
    if validation:
        of = f"{validation['n_tokens']:,} validation tokens of {counted(validation['n_documents'], 'document')}"
        line = f"Mean over layers, {of}: FVU {shown(validation['fvu'])}"
        if pca:
            line += f"; PCA with {pca['k']} components on the same vectors {shown(pca['fvu'])}"
        lines.append(line + ".")
    return lines


def _layer_rows(summary: Mapping[str, Any], *names: str) -> list[tuple[str, ...]]:
    return [(str(row["layer"]), *(shown(row[name]) for name in names)) for row in some(summary["layers"])]


def _model_words(summary: Mapping[str, Any]) -> list[str]:
    reason = summary["transformer"]["reason"]
    if reason and summary["latent_logits"]:
        return ["", f"Downstream quality was not measured: {reason}.", *_token_words(summary["latent_logits"])]
    if reason:
        return [
            "",
            f"Downstream quality and the tokens that latents promote were skipped: {reason} (--model FOLDER says where "
            "the model is, --downstream-tokens N downloads it, --downstream-tokens 0 --no-latent-logits skips both.)",
        ]
    return [*_downstream_words(summary), *_token_words(summary["latent_logits"])]


def _downstream_words(summary: Mapping[str, Any]) -> list[str]:
    if not (found := summary["downstream"]):
        return []
    head = ("layer", "delta CE", "KL", "loss recovered (mean ablation)", "(zero ablation)", "delta CE, mean ablation")
    names = ("delta_ce", "kl", "loss_recovered_mean", "loss_recovered_zero", "mean_ablation_delta_ce")
    return [
        "",
        "Downstream, one layer at a time replaced by its reconstruction, "
        f"{found['n_tokens']:,} {found['tokens']} tokens "
        f"(true CE {shown(found['true_ce'])} nats; delta CE and KL in nats per token: lower is better; "
        "loss recovered: 1 is perfect, 0 as bad as ablation)",
        *table(head, _layer_rows(summary, *names)),
        f"Mean over layers: delta CE {with_interval(found, 'delta_ce')}, KL {with_interval(found, 'kl')}, "
        f"loss recovered {with_interval(found, 'loss_recovered_mean')} against mean ablation.",
        *_together_words(found.get("together")),
    ]


def _together_words(found: Mapping[str, Any] | None) -> list[str]:
    if not found:
        return []
    names = ("delta_ce", "sum_alone_delta_ce", "pca_delta_ce", "kl", "sum_alone_kl", "loss_recovered_mean")
    head = ("replaced together", "delta CE", "sum of single layers", "PCA", "KL", "sum of single layers", "recovered")
    groups = found["groups"]
    rows = [(group_words(one["kind"], one["n"]), *(with_interval(one, name) for name in names)) for one in groups]
    return [f"Several layers at once, at {found['n_tokens']:,} of these tokens:", *table(head, rows)]


def _token_words(found: Mapping[str, Any] | None) -> list[str]:
    if not found:
        return []
    return [
        "Decoder rows and tokens, median of the highest cosine (in brackets: of random directions): embedding "
        f"{shown(found['embedding_cosine'])} ({shown(found['embedding_chance'])}), unembedding "
        f"{shown(found['unembedding_cosine'])} ({shown(found['unembedding_chance'])})."
    ]


def _left_out(summary: Mapping[str, Any]) -> str:
    layers = summary["layers"]
    return f", {len(some(layers))} of {len(layers)}, all in layers.parquet" if len(some(layers)) < len(layers) else ""


def some(rows: Sequence[Any]) -> list[Any]:
    """At most twelve rows, evenly spaced, including the first and last."""
    if len(rows) <= 12:
        return list(rows)
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, 12).round().astype(int))]


def shown(value: float | None) -> str:
    """Three digits, or a dash if the number is not defined."""
    return "-" if value is None else f"{value:.3g}"


def with_interval(variance: Mapping[str, Any], name: str) -> str:
    """A number with its 95 % interval, if it has one."""
    interval = (variance.get("ci95") or {}).get(name)
    value = shown(variance[name])
    return f"{value} [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first column aligned left, the others right."""
    first = max(len(row[0]) for row in (head, *rows))
    return ["  " + line for line in aligned([(row[0].ljust(first), *row[1:]) for row in (head, *rows)])]
