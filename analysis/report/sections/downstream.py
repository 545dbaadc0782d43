"""Section: what each layer's reconstruction error costs the model, and how close decoder rows are to tokens.

Where an analysis was made without the model, it says why.
"""

from html import escape

import numpy as np

from analysis.report.charts import layer_chart, lines_chart
from analysis.report.data import Results
from analysis.report.markup import Section, columns, figure, integer, show, small, table

TITLE = "Downstream: what the errors cost the model"
DRAWN_FROM = -0.5
"""Loss recovered below this is drawn here: where there is little to recover it is a ratio of two small numbers."""

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
"""Columns of layers.parquet in the table: name and heading."""

COSTS = (("delta_ce", "delta CE", "ours"), ("kl", "KL(true || reconstructed)", "other dashed"))
X_NAME = "layer replaced (after block)"

INTRODUCTION = """<p>The residual stream after one block is replaced by its reconstruction at {tokens} {whose} tokens of
{documents} documents, the rest of the model runs on, and its predictions are compared with those of the unmodified
model (cross-entropy {true_ce} nats per token). Each layer is replaced alone.</p>"""


def section(results: Results) -> Section:
    """Delta cross-entropy, KL and loss recovered by layer."""
    found = results.get("downstream")
    if not found:
        reason = results.get("transformer", "reason") or "this analysis was made without running the model"
        return Section(TITLE, f"<p>Not shown: {escape(str(reason))}</p>{_tokens(results)}")
    rows = [
        (str(layer), *(show(results.layers[name][i]) + small(results.layer_bounds(name, i)) for name, _ in COLUMNS))
        for i, layer in enumerate(results.layer_numbers)
    ]
    has_intervals = results.bounds("downstream", "kl") is not None
    intervals = (
        "Small numbers: 95 % intervals over documents." if has_intervals else "Too few documents for 95 % intervals."
    )
    introduction = INTRODUCTION.format(
        tokens=integer(results.number("downstream", "n_tokens")),
        whose="held-out" if results.get("downstream", "tokens") == "validation" else "analysed",
        documents=integer(results.number("downstream", "n_documents")),
        true_ce=show(results.number("downstream", "true_ce")),
    )
    body = (
        introduction
        + columns(
            figure(
                downstream_title(results),
                layer_chart(results, COSTS, "nats per token (lower is better)", X_NAME),
                "Delta CE: by how much the cross-entropy of the next token rises. KL: how far the predicted "
                "distribution moves from the true run's. 0 is perfect.",
            ),
            figure(
                _recovered_title(results),
                _recovered_chart(results),
                "1: no loss; 0: as bad as the layer's mean vector, or zero, at every position. "
                "Values below &minus;0.5 are drawn there.",
            ),
        )
        + _tokens(results)
        + "<details><summary>Table by layer</summary>"
        + table(("Layer", *(words for _, words in COLUMNS)), rows)
        + '<p class="note">Delta CE in nats per predicted token and KL in nats per token: lower is better. Loss '
        "recovered: share, higher is better. The ablations say how much there is to lose at a layer. "
        f"{intervals}</p></details>"
    )
    return Section(TITLE, body)


def downstream_title(results: Results) -> str:
    """What replacing a layer costs, in the mean over layers."""
    delta, kl = (show(results.number("downstream", name)) for name in ("delta_ce", "kl"))
    return f"Replacing one layer costs {delta} nats of cross-entropy on average, and a KL of {kl} nats"


def recovered(results: Results, ablation: str) -> np.ndarray:
    """Loss recovered against "mean" or "zero" ablation as it is drawn, [L]."""
    return np.maximum(results.layers[f"loss_recovered_{ablation}"], DRAWN_FROM)


def _recovered_title(results: Results) -> str:
    mean, zero = (show(results.number("downstream", f"loss_recovered_{name}")) for name in ("mean", "zero"))
    return f"Loss recovered, mean over layers: {mean} of what mean ablation costs, {zero} of zero ablation"


def _recovered_chart(results: Results) -> str:
    lines = [
        (recovered(results, name), f"against {name} ablation", kind)
        for name, kind in (("mean", "ours"), ("zero", "other dashed"))
    ]
    return lines_chart(lines, "loss recovered (share, higher is better)", results.layer_numbers, X_NAME)


def _tokens(results: Results) -> str:
    """How close decoder rows are to tokens: a sentence, or nothing."""
    if not results.get("latent_logits"):
        return ""
    parts = [
        f"{show(results.number('latent_logits', f'{name}_cosine'))} to {words} (random directions: "
        f"{show(results.number('latent_logits', f'{name}_chance'))})"
        for name, words in (("embedding", "a token's embedding"), ("unembedding", "a token's unembedding"))
    ]
    return f"<p>Are latents tokens? The highest cosine of a live latent's decoder row, median: {', '.join(parts)}.</p>"
