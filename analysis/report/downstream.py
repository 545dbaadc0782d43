"""The report's section on downstream quality: what each layer's reconstruction error costs the model, and, beside it,
how near decoder rows are to tokens.

A section as in `analysis.report.sections`. It says why it is empty where an analysis was made without the model. Here
too the sentence that states the finding, for the figure (`analysis.report.figures_downstream`) as well.
"""

from html import escape

import numpy as np

from analysis.report.charts import layer_ticks, lines_chart
from analysis.report.data import Results, between, finite, integer, show
from analysis.report.template import Section, fill

DRAWN_FROM = -0.5
"""Loss recovered below this is drawn here: near nothing to recover it is a ratio of two small numbers."""

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


def downstream_section(results: Results) -> Section:
    """Delta cross-entropy, KL and loss recovered by layer."""
    anchor, title = "downstream", "Downstream: what the errors cost the model"
    if not results.get("downstream"):
        reason = results.get("transformer", "reason") or "this analysis was made without running the model"
        return Section(anchor, title, f"<p>Not shown: {escape(str(reason))}</p>{_tokens(results)}")
    rows = ""
    for i, layer in enumerate(results.layer_numbers):
        cells = "".join(f"<td>{show(results.layers[name][i])}{_bounds(results, name, i)}</td>" for name, _ in COLUMNS)
        rows += f"<tr><th>{layer}</th>{cells}</tr>"
    costs = [(results.layers[name], words, kind) for name, words, kind in _COSTS]
    ends = [
        (results.layers[f"{name}_{end}"], "", f"bound {kind}") for name, _, kind in _COSTS for end in ("low", "high")
    ]
    recovered = [
        (np.maximum(results.layers[f"loss_recovered_{name}"], DRAWN_FROM), f"against {name} ablation", kind)
        for name, kind in (("mean", "ours"), ("zero", "other dashed"))
    ]
    ticks, x_name = layer_ticks(results.layer_numbers), "layer replaced (after block)"
    body = fill(
        "downstream.html",
        whose="held-out" if results.get("downstream", "tokens") == "validation" else "analysed",
        tokens=integer(results.get("downstream", "n_tokens")),
        documents=integer(results.get("downstream", "n_documents")),
        true_ce=show(results.get("downstream", "true_ce")),
        cost_title=escape(downstream_title(results)),
        cost_chart=lines_chart([*costs, *ends], "nats per token (lower is better)", ticks, x_name, 13),
        recovered_title=escape(recovered_title(results)),
        recovered_chart=lines_chart(recovered, "loss recovered (share, higher is better)", ticks, x_name, 13),
        columns="".join(f"<th>{words}</th>" for _, words in COLUMNS),
        rows=rows,
        intervals="Small numbers: 95 % intervals over documents."
        if results.bounds("downstream", "kl")
        else "Too few documents for 95 % intervals.",
        embedding=_tokens(results),
    )
    return Section(anchor, title, body)


_COSTS = (("delta_ce", "delta CE", "ours"), ("kl", "KL(true || reconstructed)", "other dashed"))


def downstream_title(results: Results) -> str:
    """What replacing a layer costs, in the mean over layers."""
    delta, kl = (show(results.number("downstream", name)) for name in ("delta_ce", "kl"))
    return f"Replacing one layer costs {delta} nats of cross-entropy on average, and a KL of {kl} nats"


def recovered_title(results: Results) -> str:
    """What share of the loss a layer's ablation costs is kept."""
    mean = show(results.number("downstream", "loss_recovered_mean"))
    zero = show(results.number("downstream", "loss_recovered_zero"))
    return f"Loss recovered, mean over layers: {mean} of what mean ablation costs, {zero} of zero ablation"


def _bounds(results: Results, name: str, i: int) -> str:
    ends = [finite(results.layers[f"{name}_{end}"][i]) for end in ("low", "high") if f"{name}_{end}" in results.layers]
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return ""
    return f"<small>{between((ends[0], ends[1]))}</small>"


def _tokens(results: Results) -> str:
    """How near decoder rows are to tokens: a sentence, or nothing."""
    found = results.get("latent_logits")
    if not found:
        return ""
    parts = [
        f"{show(results.number('latent_logits', f'{name}_cosine'))} to {words} (random directions: "
        f"{show(results.number('latent_logits', f'{name}_chance'))})"
        for name, words in (("embedding", "a token's embedding"), ("unembedding", "what a token's logit reads"))
    ]
    return f"<p>Are latents tokens? The highest cosine of a live latent's decoder row, median: {', '.join(parts)}.</p>"
