"""Section: what each layer's reconstruction error costs the model, and how close decoder rows are to tokens."""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from analysis.model.together import group_words
from analysis.report.charts import layer_chart, lines_chart
from analysis.report.data import Results
from analysis.report.markup import Section, columns, figure, integer, layer_table, show, small, table

TITLE = "Downstream: what the errors cost the model"
DRAWN_FROM = -0.5
"""Lower values of loss recovered are drawn here: where there is little to lose, it is a ratio of two small numbers."""

COLUMNS = (
    ("delta_ce", "delta CE"),
    ("kl", "KL"),
    ("loss_recovered_mean", "loss recovered, mean ablation"),
    ("loss_recovered_zero", "loss recovered, zero ablation"),
    ("mean_ablation_delta_ce", "mean ablation's delta CE"),
    ("zero_ablation_delta_ce", "zero ablation's delta CE"),
    ("mean_ablation_kl", "mean ablation's KL"),
    ("zero_ablation_kl", "zero ablation's KL"),
)
"""Columns of layers.parquet in the table: name, heading."""

COSTS = (("delta_ce", "delta CE", "ours"), ("kl", "KL(true || reconstructed)", "other dashed"))
X_NAME, RECOVERED = "layer replaced (after block)", "loss recovered (share, higher is better)"

INTRODUCTION = """<p>The residual stream after one block is replaced by its reconstruction at {tokens} {whose} tokens of
{documents} documents, the rest of the model runs on it, and the predictions are compared with those of the unmodified
model (cross-entropy {true_ce} nats per token). Layers are replaced one at a time.</p>"""


def section(results: Results) -> Section:
    if not (found := results.get("downstream")):
        reason = results.get("transformer", "reason") or "this analysis was made without running the model"
        return Section(TITLE, f"<p>Not shown: {escape(str(reason))}</p>{_tokens(results)}")
    intervals = "Too few documents for 95 % intervals."
    if results.bounds("downstream", "kl"):
        intervals = "In small print: 95 % intervals over documents."
    introduction = INTRODUCTION.format(
        tokens=integer(found.get("n_tokens")),
        whose="held-out" if found.get("tokens") == "validation" else "analysed",
        documents=integer(found.get("n_documents")),
        true_ce=show(found.get("true_ce")),
    )
    mean, zero = (show(found.get(f"loss_recovered_{name}")) for name in ("mean", "zero"))
    body = (
        introduction
        + columns(
            figure(
                downstream_title(results),
                layer_chart(results, COSTS, "nats per token (lower is better)", X_NAME),
                "Delta CE: the rise in next-token cross-entropy. KL: how far the predicted distribution moves from "
                "the unmodified model's. 0 is perfect.",
            ),
            figure(
                f"Loss recovered, mean over layers: {mean} against mean ablation, {zero} against zero ablation",
                lines_chart(recovered_lines(results), RECOVERED, results.layer_numbers, X_NAME),
                "1: nothing is lost; 0: as bad as the layer's mean vector, or zero, at every position. "
                "Values below &minus;0.5 are drawn at &minus;0.5.",
            ),
        )
        + _together(results)
        + _tokens(results)
        + "<details><summary>Table by layer</summary>"
        + layer_table(results, [(name, words, show) for name, words in COLUMNS])
        + '<p class="note">Delta CE in nats per predicted token and KL in nats per token: lower is better. Loss '
        "recovered: share, higher is better. The ablations show how much there is to lose at a layer. "
        f"{intervals}</p></details>"
    )
    return Section(TITLE, body)


def downstream_title(results: Results) -> str:
    """What replacing a layer costs, averaged over layers."""
    delta, kl = (show(results.number("downstream", name)) for name in ("delta_ce", "kl"))
    return f"Replacing one layer costs {delta} nats of cross-entropy on average, and a KL of {kl} nats"


def recovered_lines(results: Results) -> list[tuple[np.ndarray, str, str]]:
    """Loss recovered as drawn, against both ablations: values [L], legend, class of report.css."""
    return [
        (np.maximum(results.layers[f"loss_recovered_{name}"], DRAWN_FROM), f"against {name} ablation", kind)
        for name, kind in (("mean", "ours"), ("zero", "other dashed"))
    ]


TOGETHER = """<h3>Several layers at once</h3>
<p>All layers of a group are replaced in one run, each by the reconstruction of what the replaced layers below leave,
at {tokens} of the tokens (cross-entropy {true_ce}). The sum of single layers adds up what the same layers cost when
replaced one at a time: the two agree only if errors neither grow nor cancel on the way. PCA has as many components as
a vector has active latents. In small print, where available: 95 % intervals over documents.</p>"""


def _together(results: Results) -> str:
    if not (found := results.get("downstream", "together")):
        return ""
    head = ("Layers replaced", "delta CE, nats", "sum of single layers", "PCA's delta CE", "KL, nats")
    names = ("delta_ce", "sum_alone_delta_ce", "pca_delta_ce", "kl", "sum_alone_kl", "pca_kl", "loss_recovered_mean")

    def row(group: Mapping[str, Any]) -> list[str]:
        bounds = group.get("ci95") or {}
        numbers = [show(group.get(name)) + small(bounds.get(name)) for name in (*names, "mean_ablation_delta_ce")]
        return [escape(group_words(group["kind"], group["n"])), *numbers]

    introduction = TOGETHER.format(tokens=integer(found["n_tokens"]), true_ce=show(found["true_ce"]))
    more = ("sum of single layers", "PCA's KL", "loss recovered, mean ablation", "mean ablation's delta CE")
    return introduction + table((*head, *more), map(row, found["groups"]))


def _tokens(results: Results) -> str:
    """A sentence on how close decoder rows are to tokens; empty where that was not computed."""
    if not (found := results.get("latent_logits")):
        return ""
    parts = [
        f"{show(found.get(f'{name}_cosine'))} to a token's {name} "
        f"(random directions: {show(found.get(f'{name}_chance'))})"
        for name in ("embedding", "unembedding")
    ]
    if found.get("above_chance") is not None:
        level = f"{show(found['unembedding_chance_99'])}, which 1 % of random directions exceed"
        parts[-1] += f"; {integer(found['above_chance'])} latents are above {level}: only what these promote is shown"
    return f"<p>Are latents tokens? The median highest cosine of a live decoder row is {', and '.join(parts)}.</p>"
