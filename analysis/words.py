"""What `analyze` says on the terminal: the summary in plain sentences and small tables, with units and directions.

Made from summary.json alone. Not here: any number that is not in it.
"""

from collections.abc import Mapping
from typing import Any

from analysis.baselines.nulls import NULLS
from analysis.model.words import model_words
from analysis.moments import VARIANCE_NAMES
from analysis.word_tables import shown, some, table, with_interval

_ROW_NAMES = {"mass": "by mass", "equal": "by token-latent pair", "latent": "by latent"}


def words(summary: Mapping[str, Any]) -> str:
    """The findings in plain words, a few dozen lines."""
    variance, compat = summary["variance"], summary["variance"]["mlsae_compat"]
    latents, sae = summary["latents"], summary["provenance"]["sae"]
    lines = [
        f"{sae['name']} on {summary['provenance']['store']['name']}: {summary['n_layers']} layers, "
        f"{summary['n_latents']:,} latents, k {sae['k']}; "
        f"{latents['active']:,} fired, {latents['dead']:,} never did.",
        summary["split"]["text"],
        *(f"Note: {warning}" for warning in summary["warnings"]),
        "",
        "How latents spread over layers: variance of the layer, in layers squared"
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
        "",
        *_persistence_words(summary["persistence"]["mass"]),
        *_null_words(summary),
        *_latent_words(summary),
        "",
        "Reconstruction by layer (FVU and MSE: lower is better; FVU 1 is no better than the layer's mean)",
        *table(
            ("layer", "FVU", "validation FVU", "PCA FVU", "MSE", "L0", "mean norm", "cosine to next"),
            [_layer_words(row) for row in some(summary["layers"])],
        ),
        *_fvu_words(summary),
        *model_words(summary),
    ]
    return "\n".join(lines)


def _headline(ratio: float | None, reference: float | None) -> list[str]:
    if ratio is None:
        return [
            "The token-level variance is 0: no latent is active at two layers of one token, so there is no ratio to it."
        ]
    line = (
        f"The aggregate variance (within + between tokens) is {ratio:.3g} times "
        "the token-level variance (within token), by mass."
    )
    if not reference:
        return [line]
    return [
        line,
        f"The reference's formula on the same codes says {1 / reference:.3g} times. It differs: a token at which",
        "a latent is silent stays in its means, as no mass at any layer: what it compares are not variances of one",
        "distribution, and its ratio moves with how layers are numbered (docs/method.md).",
    ]


def _persistence_words(means: Mapping[str, Any]) -> list[str]:
    if means["n_layers_active"] is None:
        return []
    single = means["single_layer"]
    lines = [
        "Along the layers of a token, by mass: a latent is on at "
        f"{with_interval(means, 'n_layers_active')} layers, first at {shown(means['onset'])} and last at "
        f"{shown(means['offset'])}; its longest run is {with_interval(means, 'run_length')} layers.",
    ]
    if means["unbroken_multi"] is not None:
        lines.append(
            f"At one layer only: {100 * single:.0f} %. Of the rest {100 * means['unbroken_multi']:.0f} % switch on "
            f"once and stay on until they go off (contiguity {with_interval(means, 'contiguity_multi')})."
        )
    return lines


def _null_words(summary: Mapping[str, Any]) -> list[str]:
    nulls = summary["nulls"]
    if not nulls:
        return []
    rows = []
    for part, name, label in (
        ("variance", "within_token", "within token, layers squared"),
        ("variance", "aggregate_over_token", "aggregate / token-level"),
        ("persistence", "run_length", "longest run, layers"),
        ("persistence", "stays_on", "share on at the next layer too"),
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
    if validation:
        line = f"Mean over layers, {validation['n_tokens']:,} validation tokens: FVU {shown(validation['fvu'])}"
        if pca:
            line += f"; PCA with {pca['k']} components on the same vectors {shown(pca['fvu'])}"
        lines.append(line + ".")
    return lines


def _layer_words(row: Mapping[str, Any]) -> tuple[str, ...]:
    names = ("fvu", "validation_fvu", "pca_fvu", "mse", "l0", "mean_norm", "cosine_to_next")
    return (str(row["layer"]), *(shown(row[name]) for name in names))
