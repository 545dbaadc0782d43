"""Section: FVU by layer, with held-out text and PCA beside it, and L0. Tested in test_page.py."""

from analysis.report.charts import layer_chart
from analysis.report.data import Results
from analysis.report.markup import Section, columns, figure, integer, layer_table, percent, prose, show

COLUMNS = (
    ("fvu", "FVU", show),
    ("validation_fvu", "FVU, held-out", show),
    ("pca_fvu", "FVU of PCA, held-out", show),
    ("mse", "MSE", show),
    ("l0", "L0", show),
    ("mean_norm", "Mean norm", show),
    ("cosine_to_next", "Cosine to next", show),
    ("active_latents", "Active latents", integer),
    ("mass_share", "Mass share", percent),
)
"""Columns of layers.parquet in the table: name, heading, formatter."""

WITH_FEW = (COLUMNS[0], ("fvu_without_few", "FVU without outlier tokens", show), *COLUMNS[1:])
"""The same where a warning says that a few tokens carry much of a layer's variance."""

INTRODUCTION = """<p>FVU, the fraction of variance unexplained, is 0 for a perfect reconstruction and 1 for one that is
no better than the layer's mean vector. Lower is better.</p>"""

FEW = """<p class="warning">{words}. FVU is a ratio of sums of squares, so at such layers it measures how well these few
tokens are reconstructed; the line and column without outlier tokens measure the rest.</p>"""

ABOUT_L0 = """TopK keeps k latents of each vector; fewer are active where a kept value is not positive. With other
activation functions, L0 varies from vector to vector, and k, where used, is its mean or its target."""


def section(results: Results) -> Section:
    """FVU and L0 over the layers, and the table."""
    missing = ["the last layer has no next layer"]
    if results.get("validation") is None:
        missing.append("this run has no held-out tokens")
    if results.get("baseline", "pca") is None:
        missing.append("the PCA baseline was not computed")
    l0_title = f"On average {show(results.number('reconstruction', 'l0'))} latents are active per vector"
    fvu_chart = layer_chart(results, fvu_lines(results), "FVU (no unit, lower is better)")
    l0_chart = layer_chart(results, [("l0", "latents per vector", "ours")], "L0 (active latents per vector)")
    few = results.get("reconstruction", "few_tokens")
    body = (
        INTRODUCTION
        + (FEW.format(words=prose(str(few))) if few else "")
        + columns(figure(reconstruction_title(results), fvu_chart), figure(l0_title, l0_chart, ABOUT_L0))
        + "<details open><summary>Table by layer</summary>"
        + layer_table(results, COLUMNS if results.number("reconstruction", "fvu_without_few") is None else WITH_FEW)
        + '<p class="note">MSE and mean norm are in units of the residual stream (squared for MSE), so they grow with '
        f"the layer's norm. An en dash: not defined ({'; '.join(missing)}).</p></details>"
    )
    return Section("Reconstruction by layer", body)


def reconstruction_title(results: Results) -> str:
    """Mean FVU over layers, with that on held-out text and of the PCA baseline."""
    if (fvu := results.number("reconstruction", "fvu")) is None:
        return "The reconstruction error is not defined on these tokens"
    pca_k = integer(results.get("baseline", "pca", "k"))
    beside = {f"PCA of {pca_k} components": results.number("baseline", "pca", "fvu")}
    beside = {"without outlier tokens": results.number("reconstruction", "fvu_without_few")} | beside
    if results.get("split", "name") != "validation":
        beside = {"held-out text": results.number("validation_fvu")} | beside
    known = "; ".join(f"{name} {percent(value)}" for name, value in beside.items() if value is not None)
    return f"{percent(fvu)} of the variance is left unexplained" + (f" ({known})" if known else "")


def fvu_lines(results: Results) -> list[tuple[str, str, str]]:
    """The lines of the FVU chart: column of layers.parquet, legend, class of report.css."""
    lines = [("fvu", "SAE", "ours")]
    if results.get("split", "name") != "validation":
        lines.append(("validation_fvu", "SAE, held-out text", "ours dotted"))
    if results.number("reconstruction", "fvu_without_few") is not None:
        lines.append(("fvu_without_few", "SAE, without outlier tokens", "other dashed"))
    components = integer(results.get("baseline", "pca", "k"))
    return [*lines, ("pca_fvu", f"PCA of {components} components, held-out text", "base dashed")]
